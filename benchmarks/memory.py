"""Peak memory of a running session beside onnxruntime's, each in a process of its own that does nothing else.

    python -m benchmarks.memory [--only resnet50] [--runs 20] [--json memory.json]

A process opens the model, runs it and reads its own peak (VmHWM) and what of its memory is shared with the file cache
(weights that are mapped from the engine file: every process with the same engine has the same pages, and the system may
drop them). `private` is the rest. What Python with numpy takes before anything is opened is stated and not subtracted.
The last line is the claim: `ingot A MiB, onnxruntime B MiB: ratio`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import ingot
from benchmarks.models import MODELS, model_path
from benchmarks.timing import available_threads, write_json

MIB = 2**20
# Each prints what it held; the argument is the file, the inputs come from a file of arrays.
PROGRAM = """
import sys, numpy as np
runtime, path, inputs, runs, threads = sys.argv[1:4] + list(map(int, sys.argv[4:]))
def fields(file, *names):
    lines = dict(line.split(":", 1) for line in open(f"/proc/self/{file}") if ":" in line)
    return {name: int(lines[name].split()[0]) * 1024 for name in names}
feeds = dict(np.load(inputs))
before = fields("status", "VmRSS")["VmRSS"]
if runtime == "ingot":
    import ingot.runtime
    from ingot.engine import Engine
    from ingot.runtime.session import Session
    run = Session(Engine.load(path), threads=threads).run
else:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    run = lambda feeds: session.run(None, feeds)
for _ in range(runs):
    run(feeds)
held = fields("status", "VmHWM", "VmRSS", "RssFile", "RssAnon")
import json
print(json.dumps(held | {"before": before}))
"""


@dataclass(frozen=True)
class Row:
    """Bytes of a process: its peak, what was private and what mapped from files in the end, and before it opened."""

    model: str
    runtime: str
    peak: int
    private: int
    mapped: int
    before: int


def measure(model: str, runtime: str, path: Path, inputs: Path, runs: int) -> Row:
    words = [sys.executable, "-c", PROGRAM, runtime, str(path), str(inputs), str(runs), str(available_threads())]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    held = json.loads(printed.splitlines()[-1])
    return Row(model, runtime, held["VmHWM"], held["RssAnon"], held["RssFile"], held["before"])


def rows(name: str, runs: int, folder: Path) -> list[Row]:
    """Both runtimes on the same inputs."""
    import numpy as np

    from benchmarks.models import example_inputs

    engine, inputs = folder / f"{name}.engine", folder / f"{name}.npz"
    config = ingot.BuildConfig(verify=False, timing_cache=Path("build/timing.cache"))
    ingot.build(model_path(name), config).save(engine)
    np.savez(inputs, **example_inputs(name))  # type: ignore[arg-type]
    files = {"ingot": engine, "onnxruntime": model_path(name)}
    return [measure(name, runtime, path, inputs, runs) for runtime, path in files.items()]


def describe(row: Row) -> str:
    sizes = (row.peak, row.private, row.mapped, row.before)
    return f"{row.model:<14}{row.runtime:<14}" + "".join(f"{size / MIB:>12.1f}" for size in sizes)


def claim(ours: Row, theirs: Row) -> str:
    ratio = ours.peak / theirs.peak
    return f"ingot {ours.peak / MIB:.0f} MiB, onnxruntime {theirs.peak / MIB:.0f} MiB: {ratio:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, default="resnet50")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures here")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = rows(chosen.only, chosen.runs, Path(folder))
    print(f"{'MiB':<28}{'peak':>12}{'private':>12}{'mapped':>12}{'before':>12}")
    print("\n".join(map(describe, measured)))
    line = claim(*measured)
    if chosen.json:
        write_json(chosen.json, "peak memory of a running session", [asdict(row) for row in measured], line=line)
    print(line)
    return 0 if measured[0].peak <= measured[1].peak else 1


if __name__ == "__main__":
    sys.exit(main())

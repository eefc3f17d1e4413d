"""How near each step of a network on a GPU comes to what the GPU can do at most.

    python -m benchmarks.cuda_limits resnet50 [--run ours.json] [--batch 128] [--form int8] [--name h200-limits]

Without --run the network is built and its steps are timed here; with it the steps come from a run of cuda_peers. The
limit of a step is the longer of its operations at the matrix units' rate and its bytes at the speed of a copy, both
measured in the same run (int8: twice fp16's rate). A step's time is taken by events, which take some microseconds
themselves: the time of its graph is the measure of a network, and steps of few microseconds have none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ingot
from benchmarks.cuda_rows import folder, row_of
from benchmarks.timing import RESULTS
from ingot.plan.plan import GraphSegment, Step

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Limit:
    """One step: its time, its work, the time that the work must take, and which of the two binds it."""

    step: str
    kernel: str
    microseconds: float
    bytes: int
    operations: int
    limit: float
    bound: str

    @property
    def share(self) -> float:
        return self.limit / self.microseconds


def work_of(name: str) -> list[Step]:
    """The steps of the row's engine as it would be built for an H200; their work does not depend on tactics."""
    model = folder(row_of(name)) / "model.onnx"
    if not model.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.cuda_peers", "export", "--row", name], check=True, cwd=ROOT)
    engine = ingot.build(model, target="cuda:sm_90", precision="fp16", verify=False, level=0)
    segments = engine.variants[0].plan.segments
    return [step for segment in segments if isinstance(segment, GraphSegment) for step in segment.steps]


def limits(timed: Sequence[Mapping[str, Any]], works: Mapping[str, Step], machine: Mapping[str, Any],
           narrow: bool) -> list[Limit]:  # fmt: skip
    """A row for each step that does something."""
    found = []
    for entry in timed:
        work = works.get(entry["step"])
        if work is None or entry["kernel"] == "transpose_seen":
            continue
        rate = machine["fp16 matmul TFLOP/s"] * (2 if narrow and work.op == "Conv" else 1)
        computing, moving = int(work.flops) / rate / 1e6, int(work.bytes) / machine["copy TB/s"] / 1e6
        bound = "operations" if computing > moving else "bytes"
        found.append(Limit(work.name, entry["kernel"], entry["us"], int(work.bytes), int(work.flops),
                           max(computing, moving), bound))  # fmt: skip
    return found


def measured(arguments: argparse.Namespace, name: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(the row of a run, the machine it ran on)"""
    path = arguments.run
    if path is None:
        path = ROOT / "build" / "cuda_limits" / "ours.json"
        path.unlink(missing_ok=True)  # what lies there is not measured again
        command = [sys.executable, "-m", "benchmarks.cuda_peers", "ours", "--out", str(path.parent), "--only", name]
        subprocess.run(command, check=True, cwd=ROOT)
    held = json.loads(path.read_text())
    return held["rows"][name], held["machines"][-1]


def show(rows: Sequence[Limit], row: Mapping[str, Any]) -> None:
    """The table, the slowest first, and the sums."""
    print(f"{'step':28}{'kernel':18}{'us':>8}{'MB':>9}{'GFLOP':>9}{'limit us':>10}{'share':>7}  bound")
    for r in sorted(rows, key=lambda r: -r.microseconds):
        print(f"{r.step[:27]:28}{r.kernel[:17]:18}{r.microseconds:8.1f}{r.bytes / 1e6:9.1f}{r.operations / 1e9:9.2f}"
              f"{r.limit:10.1f}{r.share:7.0%}  {r.bound}")  # fmt: skip
    limit = sum(r.limit for r in rows)
    print(f"{len(rows)} steps, {sum(r.microseconds for r in rows):.0f} us by events")
    print(f"the graph takes {1e3 * row['graph ms']:.0f} us, its steps' limits {limit:.0f} us, "
          f"{limit / 1e3 / row['graph ms']:.0%} of it")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--run", type=Path, help="ours.json of benchmarks.cuda_peers")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--form", default="", help="int8")
    parser.add_argument("--name", default="h200-limits")
    arguments = parser.parse_args()
    name = f"{arguments.model} b{arguments.batch} {arguments.form}".strip()
    row, machine = measured(arguments, name)
    works = {step.name: step for step in work_of(name)}
    rows = limits(row["steps"], works, machine, arguments.form == "int8")
    show(rows, row)
    whole = {"claim": f"{name}: each step against what binds it", "machine": machine, "graph ms": row["graph ms"],
             "limit ms": sum(r.limit for r in rows) / 1e3, "steps": [{**asdict(r), "share": r.share} for r in rows]}
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

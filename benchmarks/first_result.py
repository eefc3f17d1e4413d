"""How soon a ResNet-50 engine answers, and whether two builds from one timing cache are the same bytes.

    python -m benchmarks.first_result [--level 1] [--json results.json]

Load → first result is taken in fresh processes from a warm page cache, every byte of the file verified: a copy with one
weight byte changed must be refused. Exits 1 if the median is above 80 ms or the builds differ.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.models import model_path
from benchmarks.timing import write_json

FOLDER = Path("build/first_result")
LIMIT, PROCESSES = 80.0, 7

LOAD = """
import json, sys, time
import numpy as np
begin = time.perf_counter()
import ingot
from ingot.runtime.session import Session
from ingot.engine import Engine
x = np.ones((1, 3, 224, 224), np.float32)
imported = time.perf_counter()
session = Session(Engine.load(sys.argv[1]), device="cpu", threads=2)
loaded = time.perf_counter()
session.run({"x": x})
done = time.perf_counter()
heavy = {"onnx", "onnx_ir", "llvmlite", "torch", "triton"} & set(sys.modules)
print(json.dumps({"import": imported - begin, "load": loaded - imported, "run": done - loaded, "heavy": sorted(heavy)}))
"""

BUILD = """
import sys, ingot
config = ingot.BuildConfig(target="cpu", level=int(sys.argv[3]), timing_cache=sys.argv[4])
ingot.build(sys.argv[1], config).save(sys.argv[2])
"""


def child(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def checked(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        raise SystemExit(f"a child process failed:\n{done.stderr}")
    return done.stdout


def build_twice(level: int) -> tuple[Path, bool]:
    """An engine, and whether a second build in another process from the same timing cache has the same bytes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    paths, cache = [FOLDER / f"{name}.engine" for name in ("first", "second")], FOLDER / "timing.cache"
    cache.unlink(missing_ok=True)
    for path in paths:
        checked(child(BUILD, model_path("resnet50"), path, level, cache))
    first, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    return paths[0], first == second


def refuses_damage(path: Path) -> bool:
    """Whether a changed byte in the middle of the file, where the weights are, keeps the first result from coming."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = path.with_name("damaged.engine")
    damaged.write_bytes(data)
    done = child(LOAD, damaged)
    damaged.unlink()
    return done.returncode != 0 and "EngineError" in done.stderr


def measure(path: Path) -> list[dict[str, Any]]:
    """Seconds a stage in each fresh process; one process before them warms the page cache."""
    checked(child(LOAD, path))
    return [json.loads(checked(child(LOAD, path))) for _ in range(PROCESSES)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path, same = build_twice(options.level)
    runs, damage = measure(path), refuses_damage(path)
    medians = {stage: statistics.median(run[stage] for run in runs) * 1e3 for stage in ("import", "load", "run")}
    first = statistics.median(run["load"] + run["run"] for run in runs) * 1e3
    good = same and damage and first <= LIMIT and not any(run["heavy"] for run in runs)
    if options.json:
        write_json(options.json, "ResNet-50: load to first result", runs, milliseconds=first, same_bytes=same)
    print(f"engine {path.stat().st_size / 1e6:.1f} MB; " + ", ".join(f"{k} {v:.1f} ms" for k, v in medians.items()))
    print(f"a changed byte is {'refused' if damage else 'NOT refused'}")
    print(f"two builds from one timing cache are {'' if same else 'NOT '}byte-identical")
    print(f"load to first result: {first:.0f} ms (at most {LIMIT:.0f})  {'PASS' if good else 'FAIL'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Everything a first look at a GPU needs, in one command: kernels right, models right, then their times.

    python -m benchmarks.cuda_check --out DIR [--only kernels,models,…] [--level 0] [--cases Attention]

Kernels are checked in children: one that faults is named, and the others go on (with INGOT_SANITIZE=1 children run
under compute-sanitizer, whose words end in DIR/sanitizer.log). Every stage writes its
DIR/cuda-<stage>.json as soon as it is done, and prints a few lines; nothing stops the stages after it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import ingot
from benchmarks import models
from ingot.compiler import toolchain
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.standalone import Standalone
from ingot.plan.plan import GraphSegment
from ingot.report import last_log
from ingot.runtime import cuda
from ingot.runtime.cuda_executor import CudaFrame

ROOT = Path(__file__).parent.parent
_LIMIT = 8  # candidates of a case
_FAULT = 3  # exit code of a child whose context is gone
_PEAKS = """
import torch, json
def time(call, runs):
    call(); torch.cuda.synchronize()
    best = 1e9
    for _ in range(5):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); [call() for _ in range(runs)]; b.record(); torch.cuda.synchronize()
        best = min(best, a.elapsed_time(b) / runs)
    return best
x = torch.randn(8192, 8192, device="cuda", dtype=torch.half)
y = torch.empty(1 << 30, device="cuda", dtype=torch.uint8); z = torch.empty_like(y)
print(json.dumps({"fp16 matmul TFLOP/s": 2 * 8192**3 / time(lambda: x @ x, 10) / 1e9,
                  "copy TB/s": 2 * (1 << 30) / time(lambda: z.copy_(y), 10) / 1e9, "torch": torch.__version__}))
"""


def target_here() -> Any:
    return architecture(cuda.first_architecture())


# where we are


def place(arguments: argparse.Namespace) -> dict[str, Any]:
    """The device, its driver, versions; what torch's matmul and copy reach here."""
    found = subprocess.run([sys.executable, "-c", _PEAKS], capture_output=True, text=True)
    peaks = json.loads(found.stdout) if found.returncode == 0 else {"failed": found.stderr[-300:]}
    driver = cuda.driver().call("cuDriverGetVersion")
    return {"devices": [str(d) for d in cuda.devices()], "driver": driver, "cores": os.cpu_count(), **peaks,
            "toolchain": toolchain(("triton", "cuda-bindings"))}  # fmt: skip


# kernels


def kernels(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every case of tests/kernels/cuda, several candidates each, against numpy; compiled beforehand on all cores."""
    cases = _cases(arguments.cases)
    seconds = _compile_cases(cases)
    results: list[dict[str, Any]] = []
    while len(results) < len(cases):
        results += _child(len(results), cases, arguments)
    failed = [r for r in results if r["failed"]]
    for result in failed:
        print("  FAILED", result["name"], *result["failed"][:3], sep="\n    ")
    ran = sum(r["ran"] for r in results)
    right = len(results) - len(failed)
    print(f"  {right} of {len(results)} cases right, {ran} candidates, compiled in {seconds:.0f} s")
    return {"cases": results, "failed": len(failed), "candidates": ran, "compile seconds": seconds}


def _cases(begin: str) -> list[Any]:
    """Those whose name begins so."""
    from tests.kernels.cuda.cases import CASES

    return [case for case in CASES if case.name.startswith(begin)]


def _compile_cases(cases: Any) -> float:
    from tests.kernels.cuda.picking import compile_ahead

    start = time.perf_counter()
    for message in compile_ahead(cases, target_here(), _LIMIT):
        print("  does not compile:", message[:300])
    return time.perf_counter() - start


def _child(first: int, cases: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Results from case `first` on; the last one may be the one that killed its child."""
    command = [sys.executable, "-m", "benchmarks.cuda_check", "--cases", arguments.cases, "--cases-from", str(first)]
    if os.environ.get("INGOT_SANITIZE"):
        log = arguments.out / "sanitizer.log"
        command = ["compute-sanitizer", "--target-processes", "all", "--log-file", str(log), *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    named = done.returncode == _FAULT and bool(results)
    if done.returncode and not named and first + len(results) < len(cases):
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        results.append({"name": cases[first + len(results)].name, "ran": 0, "failed": [f"its process ended: {reason}"]})
    return results


def check_cases(begin: str, first: int) -> int:
    """A child's work: a line of JSON per case."""
    context, target = cuda.context_of(cuda.select("cuda")), target_here()
    for case in _cases(begin)[first:]:
        print(json.dumps(_checked(case, target, context)), flush=True)
        if context.fault:
            return _FAULT
    return 0


def _checked(case: Any, target: Any, context: cuda.Context) -> dict[str, Any]:
    from tests.kernels.cuda.picking import compare, picked

    node, inputs, expected = case.node()
    failed, ran, (relative, absolute) = [], 0, case.tolerance
    for candidate in picked(node, target, _LIMIT):
        what = f"{candidate.label} {candidate.ports}"
        try:
            mine = Standalone(node, candidate, target, context)(*inputs)
            for y, wanted in zip(mine, expected, strict=True):
                compare(y, wanted, relative, absolute, what)
        except Exception as error:  # noqa: BLE001  reported with the candidate's name
            failed.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
        ran += 1
        if context.fault:
            break
    return {"name": case.name, "ran": ran, "failed": failed}


# models

MODELS = (
    ("resnet50", 1, "fp16"), ("bert_base", 1, "fp16"), ("mobilenet_v2", 1, "fp16"), ("resnet50", 8, "fp16"),
    ("resnet50", 128, "fp16"), ("bert_base", 128, "fp16"), ("mobilenet_v2", 128, "fp16"), ("resnet50", 1, "fp32"),
    ("bert_base", 1, "fp32"),
)  # fmt: skip


def run_models(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each model built here, compared with the reference on its first item, timed."""
    rows: list[dict[str, Any]] = []
    for name, batch, precision in MODELS:
        row: dict[str, Any] = {"model": name, "batch": batch, "precision": precision, "level": arguments.level}
        rows.append(row | _guarded(lambda: _model(name, batch, precision, arguments)))  # noqa: B023  called at once
        print("  " + _line(rows[-1]), flush=True)
        _write(arguments, "models", {"models": rows})
    return {"models": rows}


def _model(name: str, batch: int, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    cache = arguments.out / "cuda-times.json"
    engine = ingot.build(models.model_path(name, batch), target="cuda", precision=precision, verify=False,
                         level=arguments.level, timing_cache=cache if arguments.level else None)  # fmt: skip
    built, log = time.perf_counter() - start, last_log()
    feeds = models.example_inputs(name, batch)
    with ingot.Session(engine, device="cuda") as session:
        start = time.perf_counter()
        mine = session.run(feeds)
        first = time.perf_counter() - start
        difference = _difference(name, feeds, mine)
        frame = session._executor.take(tuple(x.shape for x in feeds.values()))
        assert isinstance(frame, CudaFrame)
        times = _times(frame, session, feeds)
    return {"build s": built, "stages": dict(log.seconds), "first run s": first, **difference, **times,
            "figures": log.figures, "notices": [str(n) for n in log.notices if n.kind != "not fused"]}  # fmt: skip


def _difference(name: str, feeds: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """Against the numpy meaning of the first item."""
    alone = ingot.build(models.model_path(name, 1), target="host", verify=False)
    with ingot.Session(alone, device="host") as session:
        wanted = session.run({k: np.ascontiguousarray(x[:1]) for k, x in feeds.items()})
    worst = 0.0
    for key, y in wanted.items():
        scale = float(np.abs(y).max()) or 1.0
        worst = max(worst, float(np.abs(mine[key][:1].astype(np.float64) - y).max()) / scale)
    return {"difference": worst}


def _times(frame: CudaFrame, session: ingot.Session, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds of the graphs alone, of a whole run from numpy to numpy, microseconds of each step."""
    found = {i: s for i, s in enumerate(frame.plan.segments) if isinstance(s, GraphSegment)}
    steps = [
        {"step": step.name, "op": step.op, "kernel": step.kernel, "tactic": dict(step.tactic), "us": round(us, 2),
         "shape": frame.plan.values[step.outputs[0]].shape}
        for segment in found.values()
        for step, us in zip(segment.steps, frame.step_times(segment, 20), strict=True)
    ]  # fmt: skip
    graphs = [_graph_time(frame, number) for number in found]
    samples = [_seconds(lambda: session.run(feeds)) for _ in range(60)]
    return {"graph ms": sum(graphs), "run ms": statistics.median(samples) * 1e3, "steps": steps,
            "launches": sum(len(segment.launches) for segment in found.values()),
            "host steps": len(frame.plan.host_steps)}  # fmt: skip


def _graph_time(frame: CudaFrame, number: int, runs: int = 30) -> float:
    """Milliseconds of one launch among many in a row, the median of seven such rows."""
    context, rows = frame.context, []
    begin, end = context.event(), context.event()
    frame.launch(number)
    for _ in range(7):
        context.call("cuEventRecord", begin, frame.stream)
        for _ in range(runs):
            frame.launch(number)
        context.call("cuEventRecord", end, frame.stream)
        frame.wait("timing")
        rows.append(context.call("cuEventElapsedTime", begin, end) / runs)
    return statistics.median(rows)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _line(row: Mapping[str, Any]) -> str:
    head = f"{row['model']} b{row['batch']} {row['precision']}"
    if "failed" in row:
        return f"{head}: FAILED {row['failed'].splitlines()[-1][:300]}"
    return (f"{head}: {row['graph ms']:.3f} ms on the GPU, {row['run ms']:.3f} ms numpy to numpy, difference "
            f"{row['difference']:.1e}, {row['launches']} launches, {row['host steps']} host steps, built in "
            f"{row['build s']:.1f} s")  # fmt: skip


# the command


def _guarded(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What failed is part of the results."""
    try:
        return call()
    except Exception:  # noqa: BLE001  reported, the other stages go on
        return {"failed": traceback.format_exc()[-3000:]}


def _write(arguments: argparse.Namespace, stage: str, found: Mapping[str, Any]) -> None:
    (arguments.out / f"cuda-{stage}.json").write_text(json.dumps(found, indent=1, default=str))


STAGES: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "place": place, "kernels": kernels, "models": run_models,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--only", default=",".join(STAGES), help="stages, separated by commas")
    parser.add_argument("--level", type=int, default=0, help="how much the models' builds time")
    parser.add_argument("--cases", default="", help="only cases whose name begins so")
    parser.add_argument("--cases-from", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cases_from is not None:
        return check_cases(arguments.cases, arguments.cases_from)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for stage in arguments.only.split(","):
        start = time.perf_counter()
        found = _guarded(lambda: STAGES[stage](arguments))  # noqa: B023  called at once
        _write(arguments, stage, found)
        print(f"{stage}: {found.get('failed', 'done')} ({time.perf_counter() - start:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

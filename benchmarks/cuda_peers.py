"""Networks on one GPU beside PyTorch: eager, eager in a CUDA graph, torch.compile (max-autotune, frozen).

    python -m benchmarks.cuda_peers ours  --out DIR [--only "resnet50 b1"] [--level 3]
    python -m benchmarks.cuda_peers peers --out DIR [--only …] [--peers eager,graph,compile]
    python -m benchmarks.cuda_peers merge DIR/ours.json DIR/peers.json … [--name h200-peers]

Both sides have the same modules (benchmarks/torch_models.py): PyTorch runs them in fp16, channels last; Ingot builds
their export with inputs and outputs in fp16 as PyTorch's are. Both record the same matmul and copy, so that their runs
can be set side by side. All weights are what the module has. Three times are taken of each:
  ms         one call among 30 in a row by events on the GPU, the median of seven such rows: what a busy server sees
  alone ms   one call on an idle GPU, between two events, the median of 50: what one request sees
  call ms    the same by the clock of who calls and waits, tensors on the device on both sides
Rows of one item are held against torch.compile `alone` where both were measured so, larger ones in a row.

Every row is measured in a child and written at once to DIR/ours.json or DIR/peers.json; what lies there is not measured
again, so that both commands can be stopped and continued. No child outlives --budget seconds. Commands with folders of
their own may run side by side: builds and times take turns on the GPU. `merge` goes on from the committed
benchmarks/results/<name>.json (rows that no file holds stay) and prints which thresholds hold.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cuda_check, cuda_merge
from benchmarks.cuda_merge import PEERS
from benchmarks.cuda_peer_torch import ALONE, peer
from benchmarks.cuda_rows import CACHE, ROWS, Row, difference, export, feeds_of, folder, ratio_to_noise, row_of
from benchmarks.timing import RESULTS
from ingot.runtime import cuda
from ingot.tune.turns import alone_on

ROOT = Path(__file__).parent.parent
LEAST = {"eager": 30.0, "graph": 30.0, "compile": 120.0, "library": 60.0}  # seconds that must be left to begin


# in a child: Ingot


def ours(row: Row, level: int, cache: Path) -> dict[str, Any]:
    """The row built, run and timed; torch is not imported."""
    import ingot
    from ingot.report import last_log
    from ingot.runtime.cuda_executor import CudaFrame

    start = time.perf_counter()
    engine = ingot.build(folder(row) / "model.onnx", target="cuda", precision="fp16", verify=False, level=level,
                         timing_cache=cache, input_types=("float16",), output_types=("float16",))  # fmt: skip
    built, log = time.perf_counter() - start, last_log()
    engine.save(folder(row) / "model.engine")
    feeds = feeds_of(row, engine.inputs)
    with ingot.Session(engine, device="cuda") as session, alone_on(cuda.select("cuda")):
        (mine,) = session.run(feeds).values()
        frame = session._executor.take(tuple(x.shape for x in feeds.values()))
        assert isinstance(frame, CudaFrame)
        times = {**cuda_check._times(frame, session, feeds), **_one_at_a_time(frame, session, feeds),
                 **_launch_cost(frame), **_first_result(row)}  # fmt: skip
    return {"build s": built, "stages": dict(log.seconds), "difference": difference(row, mine),
            "SNR dB": ratio_to_noise(row, mine), "torch imported": "torch" in sys.modules, **times,
            "notices": [str(n) for n in log.notices if n.kind != "not fused"]}  # fmt: skip


def _one_at_a_time(frame: Any, session: Any, feeds: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of one inference on an idle GPU: its graph between two events, and a whole run by the clock."""
    context, number = frame.context, _graph_number(frame)
    lent = {name: _on_device(context, x) for name, x in feeds.items()}
    out = session.run(feeds, on_device=True)
    for _ in range(5):
        session.run(lent, out=out)
    begin, end, alone, calls = context.event(), context.event(), [], []
    for _ in range(ALONE):
        context.call("cuEventRecord", begin, frame.stream)
        frame.launch(number)
        context.call("cuEventRecord", end, frame.stream)
        frame.wait("timing")
        alone.append(context.call("cuEventElapsedTime", begin, end))
    for _ in range(ALONE):
        start = time.perf_counter()
        session.run(lent, out=out)
        calls.append(time.perf_counter() - start)
    return {"alone ms": statistics.median(alone), "call ms": statistics.median(calls) * 1e3}


def _on_device(context: Any, array: np.ndarray) -> Any:
    """The array in device memory, as a tensor that a session takes as it lies."""
    from ingot.runtime import dlpack

    memory = context.allocate(array.nbytes, "an input")
    context.call("cuMemcpyHtoD", memory.address, array.ctypes.data, array.nbytes)
    view = dlpack.View(memory.address, array.shape, array.dtype.name, memory)
    return dlpack.DeviceArray(view, context.device.ordinal, None)


def _graph_number(frame: Any) -> int:
    return next(i for i, s in enumerate(frame.plan.segments) if type(s).__name__ == "GraphSegment")


def _launch_cost(frame: Any) -> dict[str, float]:
    """Microseconds of putting one inference on the stream, and how many of them are Python's, not the driver's."""
    number = _graph_number(frame)
    whole, put = _enqueued(frame, lambda: frame.launch(number)), frame.context.driver.raw("cuGraphLaunch")
    graph = frame._graphs[(number,), frame._addresses]
    return {"launch us": whole, "python us": whole - _enqueued(frame, lambda: put(graph, frame.stream))}


def _enqueued(frame: Any, call: Callable[[], object]) -> float:
    """Microseconds until the call is back: it waits for no work, as one is done before the next is asked for."""
    spent = []
    for _ in range(100):
        frame.wait("timing")
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    frame.wait("timing")
    return statistics.median(spent) * 1e6


def _first_result(row: Row) -> dict[str, Any]:
    """Seconds from a file to its first result, in a fresh process that has imported ingot."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.cuda_peers", "first", "--row", row.name],
                          capture_output=True, text=True, cwd=ROOT)  # fmt: skip
    return _last_line(done) if done.returncode == 0 else {"first result s": None, "first failed": done.stderr[-500:]}


def first(row: Row) -> dict[str, Any]:
    import ingot

    feeds = feeds_of(row, ingot.Engine.load(folder(row) / "model.engine").inputs)
    start = time.perf_counter()
    engine = ingot.Engine.load(folder(row) / "model.engine")
    with ingot.Session(engine, device="cuda") as session:
        session.run(feeds)
    return {"first result s": time.perf_counter() - start}


# the two commands


@dataclass(frozen=True)
class Run:
    """What is measured into a file, until when."""

    path: Path
    deadline: float
    found: dict[str, Any]

    def measure(self, key: str, command: Sequence[str], least: float) -> None:
        """The child's figures under `key`, unless they are known or the time is up."""
        left = self.deadline - time.monotonic()
        if key in self.found["rows"] or left < least:
            return
        result = _child(command, left)
        if result is None:
            print(f"{key}: not done in the {left:.0f} s that were left", flush=True)
            return
        self.found["rows"][key] = {**result, "measured": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
        self.path.write_text(json.dumps(self.found, indent=1, default=str))
        print(f"{key}: {_brief(result)}", flush=True)


def _child(command: Sequence[str], seconds: float) -> dict[str, Any] | None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor")}
    full = [sys.executable, "-m", "benchmarks.cuda_peers", *command]
    try:
        done = subprocess.run(full, capture_output=True, text=True, cwd=ROOT, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return {"failed": "\n".join(done.stderr.strip().splitlines()[-12:])[-2000:]}
    return _last_line(done)


def _last_line(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _brief(result: Mapping[str, Any]) -> str:
    if "failed" in result:
        return f"FAILED {result['failed'].splitlines()[-1][:300]}"
    shown = ("graph ms", "alone ms", "call ms", "run ms", "ms", "difference", "build s", "launches", "host steps",
             "first result s", "launch us", "python us", "prepared s")  # fmt: skip
    kept = {k: v for k, v in result.items() if k in shown}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in kept.items())


def opened(arguments: argparse.Namespace, kind: str) -> Run:
    """The run's file with what is known, and with the machine it goes on."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{kind}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    rows = {k: v for k, v in known.get("rows", {}).items() if "failed" not in v}
    with alone_on(cuda.select("cuda")):
        machines = [*known.get("machines", []), cuda_check.place(arguments)]
    return Run(path, arguments.deadline, {"machines": machines, "rows": rows})


def measure_ours(arguments: argparse.Namespace) -> int:
    run = opened(arguments, "ours")
    for row in chosen(arguments):
        if row.name in run.found["rows"]:
            continue
        if not (folder(row) / "model.onnx").exists():
            _prepare(run, row)
        cache = (arguments.out / "cuda-times.json").resolve()
        run.measure(row.name, ["one", "--row", row.name, "--level", str(arguments.level), "--cache", str(cache)], 30)
    return 0


def _prepare(run: Run, row: Row) -> None:
    made = _child(["export", "--row", row.name], max(run.deadline - time.monotonic(), 1))
    if made is None or "failed" in made:
        print(f"{row.name}: its export failed: {made}", flush=True)


def measure_peers(arguments: argparse.Namespace) -> int:
    run = opened(arguments, "peers")
    wanted = arguments.peers.split(",")
    for which in (p for p in PEERS if p in wanted):
        for row in chosen(arguments):
            if row.form or (which == "library" and not row.library):
                continue
            if not (folder(row) / "expected.npy").exists():
                _prepare(run, row)
            run.measure(f"{row.name} {which}", ["peer", "--row", row.name, "--peer", which], LEAST[which])
    return 0


def chosen(arguments: argparse.Namespace) -> list[Row]:
    names = arguments.only.split(",") if arguments.only else [row.name for row in ROWS]
    return [row_of(name.strip()) for name in names]


def merge(arguments: argparse.Namespace) -> int:
    """The result file gone on from, and its table; 1 when a threshold does not hold."""
    whole = cuda_merge.write(RESULTS / f"{arguments.name}.json", arguments.files)
    print(*cuda_merge.lines(whole), sep="\n")
    return int(whole["failed"] > 0)


CHILDREN: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "export": lambda a: export(row_of(a.row)),
    "one": lambda a: ours(row_of(a.row), a.level, a.cache),
    "first": lambda a: first(row_of(a.row)),
    "peer": lambda a: peer(row_of(a.row), a.peer),
}
COMMANDS = {"ours": measure_ours, "peers": measure_peers, "merge": merge}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*COMMANDS, *CHILDREN])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--only", default="", help="rows, separated by commas")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument("--budget", type=float, default=570, help="seconds of the whole command")
    parser.add_argument("--name", default="h200-peers")
    for hidden in ("--row", "--peer"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.deadline = time.monotonic() + arguments.budget
    if arguments.command in CHILDREN:
        print(json.dumps(CHILDREN[arguments.command](arguments), default=str))
        return 0
    return COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())

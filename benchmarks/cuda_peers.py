"""Networks on one GPU beside PyTorch: eager, eager in a CUDA graph, torch.compile (max-autotune, frozen).

    python -m benchmarks.cuda_peers ours  --out DIR [--known ours.json]  [--only "resnet50 b1"] [--level 3]
    python -m benchmarks.cuda_peers peers --out DIR [--known peers.json] [--only …] [--peers eager,graph,compile]
    python -m benchmarks.cuda_peers merge ours.json peers.json [--name h200-peers]

Both sides have the same modules (benchmarks/torch_models.py): PyTorch runs them in fp16, channels last; Ingot builds
their export. Both record the same matmul and copy, so that their runs can be set side by side. A figure is the time of
one call among 30 in a row by events on the GPU, the median of seven such rows; all weights are what the module has.

Every row is measured in a child and written at once to DIR/ours.json or DIR/peers.json; with --known what an earlier
run measured is not measured again, so that both commands can be stopped and continued. No child outlives --budget
seconds. `merge` writes benchmarks/results/<name>.json and prints which thresholds hold.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cuda_check
from benchmarks.timing import RESULTS

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "cuda_peers"
PEERS = ("eager", "graph", "compile")
CALLS, ROUNDS = 30, 7
TOLERANCE = 3e-2  # of the largest magnitude, against float32
NARROW_TOLERANCE = 0.2  # of int8, every layer of it: what may stay narrow is another question (docs/precision.md)
CALIBRATORS = {"int8": "percentile", "fp8": "minmax"}  # E4M3 has the range, only clipping hurts
LEAST = {"eager": 30.0, "graph": 30.0, "compile": 120.0}  # seconds that must be left to begin with a peer


@dataclass(frozen=True)
class Row:
    """A network at a batch size, how much faster than torch.compile it must be, and what it must take at most. `form`:
    its layers are in int8 or fp8, which torch has no peer for; `faster` than our own fp16 it must be then."""

    model: str
    batch: int
    ratio: float | None
    most: float | None = None  # milliseconds
    form: str = ""
    faster: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model} b{self.batch} {self.form}".strip()

    @property
    def wide(self) -> "Row":
        """The same in fp16."""
        return row_of(f"{self.model} b{self.batch}")


ROWS = (
    Row("resnet50", 1, 2.0, 0.30), Row("bert_base", 1, 2.0, 0.35), Row("resnet50", 128, 1.0, 128 / 38.0),
    Row("bert_base", 128, 1.0, 6.0), Row("vit_b16", 1, 1.3), Row("mobilenet_v2", 1, 1.3), Row("detector", 1, 1.3),
    Row("unet_block", 1, 1.3), Row("vit_b16", 64, 1.0), Row("mobilenet_v2", 128, 1.0),
    Row("resnet50", 128, None, 128 / 50.0, "int8"), Row("bert_base", 128, None, None, "int8", 1.4),
    Row("resnet50", 128, None, None, "fp8"), Row("bert_base", 128, None, None, "fp8", 1.4),
)  # fmt: skip


def row_of(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def folder(row: Row) -> Path:
    return CACHE / row.name.replace(" ", "_")


# in a child: the export, and what float32 gives for the first item


def export(row: Row) -> dict[str, Any]:
    """model.onnx, inputs.npz and expected.npy (of the first item) in the row's folder."""
    return quantise(row) if row.form else _export(row)


def quantise(row: Row) -> dict[str, Any]:
    """The fp16 row's files; in the model every layer that can be has QuantizeLinear and DequantizeLinear, with ranges
    from what the network for one item is given there."""
    import onnx_ir

    from ingot.importers import onnx
    from ingot.ir import shapes
    from ingot.precision import formats
    from ingot.precision.calibrate import calibrate
    from ingot.precision.quantize import Float8, Int8

    form = {"int8": Int8(activations="int8"), "fp8": Float8()}[row.form]
    where, one = folder(row), row_of(f"{row.model} b1")
    for needed in (one, row.wide):
        if not (folder(needed) / "model.onnx").exists():
            _export(needed)
    where.mkdir(parents=True, exist_ok=True)
    small, whole = (onnx.load(folder(r) / "model.onnx") for r in (one, row.wide))
    for model in (small, whole):
        shapes.infer(model)
    held = np.load(folder(row.wide) / "inputs.npz")
    samples = [{str(v.name): x[i : i + 1] for v, x in zip(small.graph.inputs, held.values(), strict=True)}
               for i in range(min(8, row.batch))]  # fmt: skip
    ranges = calibrate(small, samples, CALIBRATORS[row.form])
    narrow = dict.fromkeys(formats.quantizable(whole, ranges), form)
    for name in ("inputs.npz", "expected.npy"):
        (where / name).write_bytes((folder(row.wide) / name).read_bytes())
    onnx_ir.save(formats.apply(whole, narrow, ranges), where / "model.onnx")
    return {}


def _export(row: Row) -> dict[str, Any]:
    import torch

    from benchmarks import torch_models

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    module, inputs = torch_models.module(row.model), torch_models.inputs(row.model, row.batch)
    where = folder(row)
    where.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.onnx.export(module, tuple(inputs), str(where / "partial.onnx"), dynamo=True, external_data=False)
    with torch.inference_mode():
        wanted = module.to(device)(*(x[:1].to(device) for x in inputs))
    np.save(where / "expected.npy", wanted.float().cpu().numpy())
    np.savez(where / "inputs.npz", *(x.numpy() for x in inputs))
    (where / "partial.onnx").rename(where / "model.onnx")
    return {}


def difference(row: Row, mine: np.ndarray) -> float:
    """Of the first item, relative to the largest magnitude."""
    wanted = np.load(folder(row) / "expected.npy")
    return float(np.abs(mine[:1].astype(np.float64) - wanted).max() / np.abs(wanted).max())


def ratio_to_noise(row: Row, mine: np.ndarray) -> float:
    """Decibels of float32's results for the first item over what is added to them here."""
    wanted = np.load(folder(row) / "expected.npy").astype(np.float64)
    noise = mine[:1].astype(np.float64) - wanted
    return float(10 * np.log10((wanted**2).sum() / max((noise**2).sum(), 1e-300)))


# in a child: Ingot


def ours(row: Row, level: int, cache: Path) -> dict[str, Any]:
    """The row built, run and timed; torch is not imported."""
    import ingot
    from ingot.report import last_log
    from ingot.runtime.cuda_executor import CudaFrame

    start = time.perf_counter()
    engine = ingot.build(folder(row) / "model.onnx", target="cuda", precision="fp16", verify=False, level=level,
                         timing_cache=cache)  # fmt: skip
    built, log = time.perf_counter() - start, last_log()
    held = np.load(folder(row) / "inputs.npz")
    feeds = {spec.name: held[key] for spec, key in zip(engine.inputs, held.files, strict=True)}
    with ingot.Session(engine, device="cuda") as session:
        (mine,) = session.run(feeds).values()
        frame = session._executor.take(tuple(x.shape for x in feeds.values()))
        assert isinstance(frame, CudaFrame)
        times = cuda_check._times(frame, session, feeds)
        launch = _launch_cost(frame)
    engine.save(folder(row) / "model.engine")
    return {"build s": built, "stages": dict(log.seconds), "difference": difference(row, mine),
            "SNR dB": ratio_to_noise(row, mine), "launch us": launch,
            "torch imported": "torch" in sys.modules, **times, **_first_result(row),
            "notices": [str(n) for n in log.notices if n.kind != "not fused"]}  # fmt: skip


def _launch_cost(frame: Any, runs: int = 100) -> float:
    """Microseconds of Python for putting one inference on the stream."""
    number = next(i for i, s in enumerate(frame.plan.segments) if type(s).__name__ == "GraphSegment")
    spent = 0.0
    for _ in range(runs):  # one at a time: a full queue of launches would make the next one wait
        frame.wait("timing")
        start = time.perf_counter()
        frame.launch(number)
        spent += time.perf_counter() - start
    frame.wait("timing")
    return spent / runs * 1e6


def _first_result(row: Row) -> dict[str, Any]:
    """Seconds from a file to its first result, in a fresh process that has imported ingot."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.cuda_peers", "first", "--row", row.name],
                          capture_output=True, text=True, cwd=ROOT)  # fmt: skip
    return _last_line(done) if done.returncode == 0 else {"first result s": None, "first failed": done.stderr[-500:]}


def first(row: Row) -> dict[str, Any]:
    import ingot

    held = np.load(folder(row) / "inputs.npz")
    arrays = [held[key] for key in held.files]
    start = time.perf_counter()
    engine = ingot.Engine.load(folder(row) / "model.engine")
    with ingot.Session(engine, device="cuda") as session:
        session.run({spec.name: x for spec, x in zip(engine.inputs, arrays, strict=True)})
    return {"first result s": time.perf_counter() - start}


# in a child: PyTorch


def peer(row: Row, which: str) -> dict[str, Any]:
    """The row's module run by PyTorch one way."""
    import torch

    from benchmarks import torch_models

    torch.backends.cudnn.benchmark = True
    module = torch_models.module(row.model).half().cuda().to(memory_format=torch.channels_last)
    inputs = [_placed(x) for x in torch_models.inputs(row.model, row.batch)]
    start = time.perf_counter()
    with torch.no_grad():
        call = {"eager": _eager, "graph": _graphed, "compile": _compiled}[which](module, inputs)
        result = call().clone()  # a graph's output is written over by its next run
        seconds = time.perf_counter() - start
        found = {"ms": _time(call), "prepared s": seconds, "torch": torch.__version__}
    return {**found, "difference": difference(row, result.float().cpu().numpy())}


def _placed(x: Any) -> Any:
    import torch

    moved = x.half().cuda() if x.is_floating_point() else x.cuda()
    return moved.to(memory_format=torch.channels_last) if moved.dim() == 4 else moved


def _eager(module: Any, inputs: Sequence[Any]) -> Callable[[], Any]:
    return lambda: module(*inputs)


def _graphed(module: Any, inputs: Sequence[Any]) -> Callable[[], Any]:
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            module(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = module(*inputs)

    def call() -> Any:
        graph.replay()
        return held

    return call


def _compiled(module: Any, inputs: Sequence[Any]) -> Callable[[], Any]:
    import torch
    import torch._inductor.config as inductor

    inductor.freezing = True
    made = torch.compile(module, mode="max-autotune")
    for _ in range(3):  # compiles, warms up, captures its graphs
        made(*inputs)
    return lambda: made(*inputs)


def _time(call: Callable[[], Any]) -> float:
    """Milliseconds of one call among many in a row."""
    import torch

    rows = []
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(5):
        call()
    for _ in range(ROUNDS):
        begin.record()
        for _ in range(CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
        rows.append(begin.elapsed_time(end) / CALLS)
    return sorted(rows)[ROUNDS // 2]


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
        self.found["rows"][key] = result
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
    kept = {k: v for k, v in result.items() if k in ("graph ms", "run ms", "ms", "difference", "build s", "launches",
                                                     "host steps", "first result s", "launch us", "prepared s")}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in kept.items())


def opened(arguments: argparse.Namespace, kind: str) -> Run:
    """The run's file with what is known, and with the machine it goes on."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    known = json.loads(arguments.known.read_text()) if arguments.known and arguments.known.exists() else {}
    rows = {k: v for k, v in known.get("rows", {}).items() if "failed" not in v}
    machine = cuda_check.place(arguments)
    runs = [*known.get("machines", []), machine]
    return Run(arguments.out / f"{kind}.json", arguments.deadline, {"machines": runs, "rows": rows})


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
            if row.form:
                continue
            if not (folder(row) / "expected.npy").exists():
                _prepare(run, row)
            run.measure(f"{row.name} {which}", ["peer", "--row", row.name, "--peer", which], LEAST[which])
    return 0


def chosen(arguments: argparse.Namespace) -> list[Row]:
    names = arguments.only.split(",") if arguments.only else [row.name for row in ROWS]
    return [row_of(name.strip()) for name in names]


# both together


def merge(arguments: argparse.Namespace) -> int:
    """The result file and the table; 1 when a threshold does not hold."""
    mine, theirs = (json.loads(path.read_text()) for path in arguments.files)
    rows = [_merged(row, mine["rows"], theirs["rows"]) for row in ROWS]
    claim = "networks in fp16 (and int8) on one GPU beside PyTorch, by model and batch"
    passed = [row["passed"] for row in rows]
    whole = {"claim": claim, "ours on": mine["machines"], "peers on": theirs["machines"],
             "passed": sum(p is True for p in passed), "failed": sum(p is False for p in passed), "rows": rows}
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    for cells in (["row", "ours ms", *PEERS, "x compile", "verdict"], *map(_cells, rows)):
        print(f"{cells[0]:20}" + "".join(f"{cell:>11}" for cell in cells[1:-1]) + f"   {cells[-1]}")
    return int(any(p is False for p in passed))


def _merged(row: Row, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    own = mine.get(row.name, {})
    ms = own.get("graph ms")
    peers = {which: theirs.get(f"{row.name} {which}", {}).get("ms") for which in PEERS}
    ratio = peers["compile"] / ms if ms and peers["compile"] else None
    most = NARROW_TOLERANCE if row.form else TOLERANCE
    checks: dict[str, bool | None] = {"as float32": None if ms is None else own["difference"] <= most}
    if row.ratio is not None:
        checks[f"at least {row.ratio} x torch.compile"] = None if ratio is None else ratio >= row.ratio
    if row.faster is not None:
        wide = mine.get(row.wide.name, {}).get("graph ms")
        checks[f"at least {row.faster} x fp16"] = None if ms is None or wide is None else wide / ms >= row.faster
    if row.most is not None:
        checks[f"at most {row.most:.3g} ms"] = None if ms is None else ms <= row.most
    passed = None if None in checks.values() else all(checks.values())
    kept = {k: own.get(k) for k in ("run ms", "launch us", "build s", "first result s", "difference", "launches",
                                    "host steps", "earlier ms", "measured", "torch imported")}  # fmt: skip
    return {"row": row.name, "ours ms": ms, "peers ms": peers, "ratio": ratio, "checks": checks, "passed": passed,
            **kept}  # fmt: skip


def _cells(row: Mapping[str, Any]) -> list[str]:
    def number(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    failed = [what for what, held in row["checks"].items() if held is False]
    verdict = "not measured" if row["passed"] is None and not failed else "passed" if row["passed"] else "FAILED"
    peers = [number(row["peers ms"][which]) for which in PEERS]
    return [row["row"], number(row["ours ms"]), *peers, number(row["ratio"], ".2f"),
            f"{verdict} {'; '.join(failed)}".strip()]  # fmt: skip


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
    parser.add_argument("--known", type=Path)
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

"""`ingot compare`: the same inputs through engine, reference and onnxruntime; per output, and to the first node that
differs."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

import ingot
from ingot.errors import ConfigError
from ingot.evidence import index_limits
from ingot.importers import onnx as importer
from ingot.ir import shapes
from ingot.ir.oracle import compile_model
from ingot.plan.plan import TensorSpec
from ingot.tools import files
from ingot.tools.accuracy import Closeness, closeness
from ingot.tools.inputs import make_feeds, pairs
from ingot.tools.shapes import parse_shapes

Runner = Callable[[Mapping[str, Any]], dict[str, Any]]
_ERRORS = {"elemwise": "mismatched", "max": "largest", "mean": "mean", "median": "median"}


@dataclass(frozen=True)
class Row:
    """One output of one runner beside the first runner's."""

    output: str
    runner: str
    against: str
    passed: bool
    statistics: Closeness


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("model", help="an ONNX file")
    parser.add_argument(
        "--runners", help="comma list of engine, reference, onnxruntime (default: all that are installed)"
    )
    parser.add_argument("--engine", help="an engine file to compare instead of building one")
    parser.add_argument("--shapes", default="", help="input shapes, e.g. x:1x3x224x224")
    parser.add_argument("--load-inputs", default="", metavar="NAME:FILE", help="inputs from .npy files")
    parser.add_argument("--save-outputs", metavar="FOLDER", help="write every runner's outputs as .npy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atol", type=float, default=1e-4)
    parser.add_argument("--rtol", type=float, default=1e-3)
    parser.add_argument("--check-error-stat", choices=[*_ERRORS, "cosine"], default="elemwise")
    parser.add_argument("--level", type=int, default=0, help="builder level of the engine (default 0)")
    parser.add_argument("--validate", action="store_true", help="also fail on NaN or infinite outputs")
    parser.add_argument("--layers", action="store_true", help="compare every tensor inside, in order")
    parser.add_argument("--bisect", action="store_true", help="name the first node whose output differs")
    parser.add_argument("--against", metavar="MODEL", help="with --layers: an engine of this other form of the model, "
                        "its 8-bit one say, in place of the model's own")  # fmt: skip
    parser.add_argument("--html", metavar="FILE", help="with --layers: a page with histograms")
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Compare and print; 1 if an output differs by more than the tolerance."""
    model = importer.load(arguments.model)
    shapes.infer(model)
    given = parse_shapes(arguments.shapes), pairs(arguments.load_inputs)
    feeds = make_feeds(specs_of(model), *given, arguments.seed, index_limits(model))
    if arguments.layers or arguments.bisect:
        from ingot.tools import compare_layers

        return compare_layers.run(model, feeds, arguments)
    names = _runner_names(arguments)
    results, seconds = {}, {}
    for name in names:
        runner = _RUNNERS[name](model, arguments)
        start = time.perf_counter()
        results[name] = runner(feeds)
        seconds[name] = time.perf_counter() - start
    _save(results, arguments.save_outputs)
    rows = [row_of(output, other, names[0], results, arguments) for other in names[1:] for output in results[names[0]]]
    invalid = _invalid(results) if arguments.validate else []
    _print(rows, invalid, seconds, arguments)
    return 0 if all(r.passed for r in rows) and not invalid else 1


def specs_of(model: onnx_ir.Model) -> list[TensorSpec]:
    """The model's inputs as an engine would name them."""
    from ingot.ir.graph import dtype_of

    tensors = [(v, isinstance(v.type, onnx_ir.TensorType) and v.dtype is not None) for v in model.graph.inputs]
    return [
        TensorSpec(v.name or "", dtype_of(v) if known else "object", shapes.shape_of(v) or ()) for v, known in tensors
    ]


def _engine_runner(model: onnx_ir.Model, arguments: argparse.Namespace) -> Runner:
    if arguments.engine:
        engine = ingot.Engine.load(arguments.engine)
    else:
        engine = ingot.build(arguments.model, level=arguments.level, verify=False)
    return ingot.Session(engine).run


def _reference_runner(model: onnx_ir.Model, arguments: argparse.Namespace) -> Runner:
    return compile_model(model)


def _onnxruntime_runner(model: onnx_ir.Model, arguments: argparse.Namespace) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(arguments.model, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


_RUNNERS: Mapping[str, Callable[[onnx_ir.Model, argparse.Namespace], Runner]] = {
    "reference": _reference_runner,
    "onnxruntime": _onnxruntime_runner,
    "engine": _engine_runner,
}


def _runner_names(arguments: argparse.Namespace) -> list[str]:
    import importlib.util

    present = importlib.util.find_spec("onnxruntime") is not None
    asked = (
        arguments.runners.split(",") if arguments.runners else [n for n in _RUNNERS if n != "onnxruntime" or present]
    )
    for name in asked:
        if name not in _RUNNERS:
            raise ConfigError(f"there is no runner {name!r}; choose from {', '.join(_RUNNERS)}")
    if "onnxruntime" in asked and not present:
        raise ConfigError("onnxruntime is not installed: pip install 'ingot[peers]', or leave it out of --runners")
    if len(asked) < 2:
        raise ConfigError("comparing needs at least two runners")
    return sorted(asked, key=list(_RUNNERS).index)


def row_of(
    output: str, runner: str, against: str, results: Mapping[str, Mapping[str, Any]], arguments: argparse.Namespace
) -> Row:
    """One output of `runner` beside that of `against`."""
    mine, wanted = np.asarray(results[runner][output]), np.asarray(results[against][output])
    if mine.shape != wanted.shape or mine.dtype == object:
        same = mine.shape == wanted.shape and np.array_equal(mine, wanted)
        gap = 0.0 if same else float("inf")
        return Row(
            output,
            runner,
            against,
            same,
            Closeness(gap, gap, gap, gap, float(same), np.inf if same else -np.inf, int(not same), mine.size),
        )
    statistics = closeness(mine, wanted, arguments.atol, arguments.rtol)
    return Row(output, runner, against, _passes(statistics, wanted, arguments), statistics)


def _passes(found: Closeness, wanted: Any, arguments: argparse.Namespace) -> bool:
    kind = arguments.check_error_stat
    if kind == "elemwise":
        return found.mismatched == 0
    if kind == "cosine":
        return found.cosine >= 1 - arguments.rtol
    scale = float(np.abs(wanted.astype(np.float64)).max(initial=0))
    return bool(getattr(found, _ERRORS[kind]) <= arguments.atol + arguments.rtol * scale)


def _invalid(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{runner}: {name} holds NaN or infinity"
        for runner, outputs in results.items()
        for name, y in outputs.items()
        if np.asarray(y).dtype.kind == "f" and not np.isfinite(np.asarray(y)).all()
    ]


def _save(results: Mapping[str, Mapping[str, Any]], folder: str | None) -> None:
    for runner, outputs in results.items() if folder else ():
        for name, y in outputs.items():
            path = Path(folder or "") / runner / f"{name.replace('/', '_')}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            np.save(content, np.asarray(y), allow_pickle=False)
            files.write(path, content.getvalue())


def _print(
    rows: Sequence[Row], invalid: Sequence[str], seconds: Mapping[str, float], arguments: argparse.Namespace
) -> None:
    if arguments.json:
        content = {"rows": [asdict(r) for r in rows], "invalid": list(invalid), "seconds": dict(seconds)}
        print(files.json_text(content))
        return
    for r in rows:
        s = r.statistics
        print(
            f"{'PASSED' if r.passed else 'FAILED'} {r.output}: {r.runner} against {r.against}: largest {s.largest:.3e}"
            f", mean {s.mean:.3e}, cosine {s.cosine:.7f}, SNR {s.signal_to_noise:.1f} dB, {s.mismatched} of "
            f"{s.elements} outside atol {arguments.atol:g} + rtol {arguments.rtol:g}"
        )
    for line in invalid:
        print(f"FAILED {line}")

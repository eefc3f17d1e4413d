"""The flags of precision, of `ingot build` and of trtexec: what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ingot
from ingot.config import PRECISIONS, BuildConfig
from ingot.errors import ConfigError
from ingot.precision import constraints
from ingot.precision.request import Request
from ingot.tools import files

FORMATS = ("int8", "fp8", "int4")
_REST = {"fp16": "float16", "bf16": "bfloat16", "tf32": "float32 with products of 10 bits"}
_HERE = {"cpu": ("int8", "int4"), "cuda": FORMATS, "host": ("int8", "int4")}  # what has kernels, or a meaning at least


@dataclass(frozen=True)
class Asked:
    """The precision of what is wide, and what may be narrow; None where nothing but a plain build is asked for."""

    rest: str
    request: Request | None
    notes: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    group = parser.add_argument_group("precision")
    rest = group.add_mutually_exclusive_group()
    for name, said in _REST.items():
        rest.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=f"{said} inside")
    group.add_argument("--int8", action="store_true", help="layers may be in 8-bit integers")
    group.add_argument("--fp8", action="store_true", help="layers may be in float8 E4M3 (CUDA)")
    group.add_argument("--int4", action="store_true", help="weights may be in 4-bit integers, in groups")
    group.add_argument("--smooth", action="store_true", help="with --int8: magnitudes may move from tensors into "
                       "weights (SmoothQuant)")  # fmt: skip
    group.add_argument("--best", action="store_true", help="everything this target has, whatever is fastest")
    group.add_argument("--data", help="samples: .npy, .npz, a folder, a Python file with samples()")
    group.add_argument("--preprocess", metavar="FILE", help="how images become inputs (see docs/calibration.md)")
    group.add_argument("--metric", help="a Python file with metric(outputs, samples); default cosine to float32")
    group.add_argument("--budget", help="what may be lost of the metric, e.g. 0.5%% or 0.02; default anything")
    group.add_argument("--confidence", type=float, default=0.95, help="of keeping the budget (default 0.95)")
    group.add_argument("--calibrator", default="auto", help="how ranges are chosen (default auto: by the error made)")
    group.add_argument("--calib", metavar="FILE", help="cache of ranges, read or written")
    group.add_argument("--layerPrecisions", default="", metavar="SPEC", help="layer:precision,… with one * at most")
    group.add_argument("--layerOutputTypes", default="", metavar="SPEC", help="the same for what layers write")
    group.add_argument("--precisionConstraints", default="none", choices=constraints.KINDS)
    group.add_argument("--save-model", metavar="FILE", help="write the model with its Q/DQ as ONNX")


def asked(arguments: argparse.Namespace) -> Asked:
    """What `ingot build`'s flags ask for."""
    given = {name: getattr(arguments, name) for name in FORMATS}
    kind = arguments.target.partition(":")[0]
    rest = arguments.precision or "fp32"
    if arguments.best:
        given, rest = {**given, **dict.fromkeys(_HERE.get(kind, ()), True)}, arguments.precision or _widest(kind)
    formats = tuple(name for name in FORMATS if given[name])
    _refuse_missing(formats, kind)
    if arguments.smooth:
        if not given["int8"]:
            raise ConfigError("--smooth says how layers become 8-bit integers: give it with --int8")
        formats = (*formats, "int8_smooth")
    rules = constraints.parse(arguments.precisionConstraints, arguments.layerPrecisions, arguments.layerOutputTypes)
    if not formats and arguments.data is None:
        for name in ("metric", "budget", "calib"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} needs a narrower precision to judge (--int8, --fp16, …) and --data")
        return Asked(rest, None)
    request = Request(
        formats, arguments.data, arguments.metric, arguments.budget, arguments.confidence, arguments.calibrator,
        arguments.calib, arguments.preprocess, rules,
    )  # fmt: skip
    return Asked(rest, request)


def _widest(kind: str) -> str:
    """The 16-bit precision of a target: what its wide layers are fastest in."""
    return next((p for p in ("fp16", "bf16") if p in PRECISIONS.get(kind, ())), "fp32")


def _refuse_missing(formats: tuple[str, ...], kind: str) -> None:
    missing = [name for name in formats if name not in _HERE.get(kind, FORMATS)]
    if missing:
        raise ConfigError(f"--{missing[0]} has no kernels on target {kind}; it has {', '.join(_HERE[kind])}")


def of_trtexec(flags: Mapping[str, str]) -> Asked:
    """What trtexec's flags ask for, with its meanings: each flag allows a precision, none demands it."""
    notes: list[str] = []
    allowed = _allowed(flags, notes.append)
    formats = tuple(name for name in ("int8", "int4") if name in allowed)
    rest = "bf16" if "bf16" in allowed else "fp32"
    rules = constraints.parse(
        flags.get("precisionConstraints", "none"), flags.get("layerPrecisions", ""), flags.get("layerOutputTypes", "")
    )
    if not formats:
        return Asked(rest, None, tuple(notes))
    data = flags.get("calibrationData")
    return Asked(rest, Request(formats, data, cache=flags.get("calib"), constraints=rules), tuple(notes))


def _allowed(flags: Mapping[str, str], tell: Callable[[str], None]) -> set[str]:
    asked = {name for name in ("fp16", "bf16", "int8", "fp8", "int4") if name in flags}
    if "best" in flags:
        asked |= {"fp16", "bf16", "int8"}
    if "stronglyTyped" in flags and asked:
        tell(f"--stronglyTyped: the model's types are kept, so {', '.join('--' + n for n in sorted(asked))} is ignored")
        return set()
    return asked


def build(
    model: Any, config: BuildConfig, wanted: Asked, progress: Callable[[str, float], None] | None
) -> tuple[ingot.Engine, dict[str, Any] | None, Any]:
    """(engine, precision report, the model it was built from): the latter two None for a plain build."""
    config = replace(config, precision=wanted.rest)
    if wanted.request is None:
        return ingot.build(model, config, progress), None, None
    if config.input_types or config.output_types:
        raise ConfigError("what is searched with --data or for narrow layers takes and gives what the model does; "
                          "leave --inputIOFormats and --outputIOFormats out")  # fmt: skip
    from ingot.precision import mixed

    if not wanted.request.formats and wanted.request.budget is None:
        config, notes = mixed.without_overflow(model, config, wanted.request)
        return ingot.build(model, config, progress), {"notes": notes} if notes else None, None
    outcome = mixed.build_mixed(model, config, wanted.request, progress)
    return outcome.engine, outcome.report.as_json(), outcome.model


def save(report: Mapping[str, Any] | None, model: Any, engine: Path, path: str | None) -> None:
    """The precision report beside the engine; the model with its Q/DQ where a path is given."""
    from ingot.precision.report import SUFFIX

    if report is not None and "trials" in report:
        files.write(engine.with_name(engine.name + SUFFIX), files.json_text(report) + "\n")
    if path is not None:
        if model is None:
            raise ConfigError("--save-model writes a model with Q/DQ: ask for --int8, --fp8 or --int4")
        import onnx_ir

        files.write(path, onnx_ir.to_proto(model).SerializeToString())

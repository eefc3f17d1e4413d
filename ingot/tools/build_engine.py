"""`ingot build model.onnx -o model.engine`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ingot
from ingot.config import LIBRARIES, TARGETS, BuildConfig
from ingot.errors import ConfigError
from ingot.precision import report as precision_report
from ingot.report import BuildLog, last_log
from ingot.retune import retune
from ingot.tools import precision_flags
from ingot.tools.files import json_text
from ingot.tools.progress import build_progress
from ingot.tools.shapes import profile_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("model", help="an ONNX file")
    parser.add_argument("-o", "--output", help="engine file to write (default: beside the model, ending in .engine)")
    parser.add_argument("--shapes", help="shapes or ranges for dynamic inputs, e.g. ids:1..16x128,mask:1..16x128")
    parser.add_argument("--minShapes", help="smallest shapes of a profile, e.g. x:1x3x224x224")
    parser.add_argument("--optShapes", help="shapes to tune for")
    parser.add_argument("--maxShapes", help="largest shapes of a profile")
    parser.add_argument(
        "--level", type=int, default=3, help="0 (nothing timed, fastest build) to 5 (everything timed); default 3"
    )
    parser.add_argument("--target", default="cpu", help=f"{', '.join(TARGETS)}, or cuda:sm_90 without such a GPU")
    precision_flags.add_arguments(parser)
    parser.add_argument(
        "--variants", default="", help="instruction sets to hold, e.g. avx512_vnni,avx2; default: this machine's best"
    )
    parser.add_argument(
        "--tacticSources", default="", help="libraries tried beside generated kernels on a GPU, e.g. -CUDNN,+CUBLAS_LT"
    )
    for end in ("input", "output"):
        parser.add_argument(f"--{end}IOFormats", default="", help=f"types of {end}s, for each or one for all: fp16:chw")
    parser.add_argument("--timingCacheFile", help="file of measured times, read and extended")
    parser.add_argument(
        "--retune", action="store_true", help="time anew on this machine what the engine holds for it; its options stay"
    )
    parser.add_argument("--exact", action="store_true", help="no kernel that rounds float32 more coarsely")
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison with the reference")
    parser.add_argument("--atol", type=float, help="absolute tolerance of the comparison")
    parser.add_argument("--rtol", type=float, help="relative tolerance of the comparison")
    parser.add_argument(
        "--memory-limit", type=float, metavar="MIB", help="refuse plans that need more activation memory"
    )
    parser.add_argument("--json", action="store_true", help="print the build report as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Build, save, report."""
    output = Path(arguments.output or Path(arguments.model).with_suffix(".engine"))
    wanted = precision_flags.asked(arguments)
    with build_progress(arguments.quiet) as progress:
        if arguments.retune:
            known = ingot.Engine.load(output)
            engine, precision, model = retune(known, arguments.model, arguments.timingCacheFile, progress), None, None
        else:
            engine, precision, model = precision_flags.build(arguments.model, config_from(arguments), wanted, progress)
        engine.save(output)
    precision_flags.save(precision, model, output, arguments.save_model)
    summary = {**summarise(engine, last_log(), output), **({"precision": precision} if precision else {})}
    print(json_text(summary) if arguments.json else as_text(summary))
    return 0


def config_from(arguments: argparse.Namespace) -> BuildConfig:
    """The configuration the options stand for."""
    profile = profile_from(arguments.shapes, arguments.minShapes, arguments.optShapes, arguments.maxShapes)
    limit = None if arguments.memory_limit is None else int(arguments.memory_limit * 2**20)
    return BuildConfig(
        target=arguments.target,
        profiles=(profile,) if profile else (), level=arguments.level,
        variants=tuple(filter(None, arguments.variants.split(","))), verify=not arguments.no_verify,
        exact=arguments.exact, libraries=libraries_from(arguments.tacticSources),
        atol=arguments.atol, rtol=arguments.rtol, timing_cache=arguments.timingCacheFile, memory_limit=limit,
        input_types=types_from(arguments.inputIOFormats), output_types=types_from(arguments.outputIOFormats),
    )  # fmt: skip


_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_KEPT_TYPES = ("int8", "int32", "int64", "uint8", "bool", "fp8")  # trtexec wants them named; they stay


def types_from(text: str) -> tuple[str, ...]:
    """What trtexec's `--inputIOFormats` names: float types of row-major tensors; "" where it names no such type."""
    words = [word.partition(":") for word in filter(None, text.split(","))]
    for kind, _, layout in words:
        if layout not in ("", "chw") or kind not in (*_TYPES, *_KEPT_TYPES):
            raise ConfigError(f"there is no format {kind}:{layout}; write fp32:chw, fp16:chw or bf16:chw")
    return tuple(_TYPES.get(kind, "") for kind, _, _ in words)


_SOURCES = {"CUBLAS_LT": "cublaslt", "CUDNN": "cudnn"}


def libraries_from(text: str) -> tuple[str, ...]:
    """The libraries left or added by trtexec's `--tacticSources`; ConfigError for a source that cannot be switched."""
    wanted = dict.fromkeys(LIBRARIES)
    for word in filter(None, text.split(",")):
        name, add = word.lstrip("+-").upper(), not word.startswith("-")
        if name == "TRITON" and add:
            continue
        if name not in _SOURCES:
            reason = "every step has a generated kernel" if name == "TRITON" else "it is not known"
            known = ", ".join((*_SOURCES, "TRITON"))
            raise ConfigError(f"--tacticSources={word}: {reason}; sources are {known}, of which TRITON stays")
        wanted.pop(_SOURCES[name], None)
        wanted.update({_SOURCES[name]: None} if add else {})
    return tuple(name for name in LIBRARIES if name in wanted)


def summarise(engine: ingot.Engine, log: BuildLog, path: Path) -> dict[str, Any]:
    """The build report as data."""
    plan = engine.variants[0].plan
    memory = max((m.bytes for m in plan.memory), default=None)
    return {
        "engine": str(path),
        "bytes": path.stat().st_size,
        "variants": [f"{v.target} {v.isa}".strip() for v in engine.variants],
        "steps": {k.split()[0]: v for k, v in log.figures.items() if k.endswith(" steps")},
        "activation_bytes": memory,
        "seconds": {k: round(v, 3) for k, v in log.seconds.items()},
        "evidence": engine.details.get("evidence", []),
        "notices": [vars(n) | {} for n in log.notices if n.kind != "not fused"],
    }


def as_text(summary: dict[str, Any]) -> str:
    """The build report for people."""
    steps = summary["steps"]
    lines = [
        f"{summary['engine']}: {summary['bytes'] / 2**20:.2f} MiB, {', '.join(summary['variants'])}",
        f"steps: {steps.get('native', 0)} native, {steps.get('host', 0)} host"
        + (
            f"; activations {summary['activation_bytes'] / 2**20:.2f} MiB"
            if summary["activation_bytes"] is not None
            else ""
        ),
        "time: " + ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in summary["seconds"].items()),
    ]
    for evidence in summary["evidence"]:
        shapes = ", ".join(f"{k}{v}" for k, v in evidence["shapes"].items())
        lines.append(f"verified {evidence['output']} at {shapes}: largest difference {evidence['largest']:.1e}")
    lines += [
        f"{n['kind']}: {n['node']}: {n['reason']}" + (f" ({n['remedy']})" if n["remedy"] else "")
        for n in summary["notices"]
    ]
    if "precision" in summary:
        lines += precision_report.as_text(summary["precision"])
    return "\n".join(lines)

"""`ingot debug precision model.onnx --int8 --data …`: the layers that break accuracy, and what to do about each."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, replace

from ingot.config import TARGETS, BuildConfig
from ingot.errors import ConfigError
from ingot.precision import budget as budgets
from ingot.precision import culprits, mixed
from ingot.precision.culprits import Culprit, Findings
from ingot.tools import files, precision_flags
from ingot.tools.progress import build_progress
from ingot.tools.shapes import profile_from

_BROKEN = {"snr": "20dB"}  # taken for broken where no budget says more
_DEFAULT = "1%"
_ALIKE = 3.0  # decibels between two causes that both count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the kind: those of `ingot build`."""
    parser.add_argument("model", help="an ONNX file")
    parser.add_argument("--shapes", help="shapes or ranges for dynamic inputs, e.g. ids:1..16x128")
    parser.add_argument("--target", default="cpu", help=f"{', '.join(TARGETS)}")
    precision_flags.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Find, print; 1 if everything narrow is outside the budget."""
    wanted = precision_flags.asked(arguments)
    if wanted.request is None or not wanted.request.formats or arguments.data is None:
        raise ConfigError("`ingot debug precision` needs a narrow format and samples: --int8 --data FILE, say")
    profile = profile_from(arguments.shapes)
    config = BuildConfig(
        target=arguments.target, profiles=(profile,) if profile else (), level=0, precision=wanted.rest, verify=False
    )
    with build_progress(arguments.quiet or arguments.json) as progress:
        bench = mixed.prepare(arguments.model, config, replace(wanted.request, confidence=0.5), progress)
        name = bench.trials.metric.name
        allowed = budgets.parse(arguments.budget or _BROKEN.get(name, _DEFAULT), bench.trials.metric)
        findings = culprits.find(bench, allowed)
    print(files.json_text(asdict(findings)) if arguments.json else "\n".join(_lines(findings)))
    return 1 if findings.breaks else 0


def _lines(found: Findings) -> list[str]:
    scores = f"all {found.layers} layers narrow: {found.metric} {found.narrow:.6g}, float32 {found.reference:.6g}"
    if not found.breaks:
        return [f"{scores}; within the budget {found.budget}: no layer breaks it"]
    spec = ",".join(f"{c.node}:fp32" for c in found.culprits)
    kinds = ((True, "by themselves"), (False, "together with others"))
    lines = [f"{scores}; outside the budget {found.budget}"]
    for alone, how in kinds:
        mine = [c for c in found.culprits if c.alone is alone]
        lines += [f"{len(mine)} break it {how}:"] * bool(mine) + [f"  {_line(c)}" for c in mine]
    return [
        *lines,
        f"with these wide: {found.metric} {found.mended:.6g}; the same for `ingot build`:",
        f"  --layerPrecisions='{spec}' --precisionConstraints=obey",
    ]


def _line(c: Culprit) -> str:
    span = "" if math.isnan(c.low) else f"; reads {c.tensor} in [{c.low:.4g}, {c.high:.4g}], {c.clipped:.2%} beyond"
    return f"{c.node} in {c.precision} alone: score {c.score:.6g}, signal to noise {c.decibels:.1f} dB{_cause(c)}{span}"


def _cause(c: Culprit) -> str:
    """Whether the weights or the tensor that is read lose more."""
    if c.weights is None:
        return ""
    share = f"its weights alone {c.weights:.1f} dB"
    if c.weights - c.decibels > _ALIKE:
        return f" ({share}: it is the tensor it reads)"
    return f" ({share}: it is the weights)"

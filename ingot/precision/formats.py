"""Formats of single nodes: a frozen configuration and one registered transform each, from model to model.

A transform takes a prepared copy of the imported model and the products that shall be narrow; it inserts standard
QuantizeLinear and DequantizeLinear, which the passes fold into integer kernels. Names of nodes and tensors stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ingot.errors import ConfigError
from ingot.precision import nodes
from ingot.precision.nodes import Target
from ingot.precision.opsets import raised
from ingot.precision.ranges import Ranges

Transform = Callable[[Any, ir.Model, Sequence[Target], Ranges], None]


@dataclass(frozen=True)
class Format:
    """A name, its default configuration, its transform; `calibrated`: whether it needs ranges; `opset`: the first
    that has its operators."""

    name: str
    config: Any
    transform: Transform
    calibrated: bool
    opset: int


FORMATS: dict[str, Format] = {}


def precision_format(
    name: str, config: Any, calibrated: bool = True, opset: int = 0
) -> Callable[[Transform], Transform]:
    """Register a transform under a name, with the configuration that the name alone stands for."""

    def register(transform: Transform) -> Transform:
        FORMATS[name] = Format(name, config, transform, calibrated, opset)
        return transform

    return register


def quantizable(model: ir.Model, ranges: Ranges | None = None) -> list[str]:
    """Names of the nodes whose precision can be chosen, in the order of the graph; with `ranges` those whose input
    calibration has seen. Shapes must have been inferred."""
    found = nodes.targets(nodes.prepared(model))
    return [target.name for target in found if ranges is None or target.x.name in ranges]


def apply(model: ir.Model, assignment: Mapping[str, Any], ranges: Ranges | None = None) -> ir.Model:
    """A copy of the imported model with each node of `assignment` in its format: a name of `FORMATS`, or a
    configuration of one. All others stay as they are. ConfigError names a node that cannot be narrow."""
    wanted = max((_format(chosen)[0].opset for chosen in _by_format(assignment)), default=0)
    changed = nodes.prepared(raised(model, wanted))
    known = {target.name for target in nodes.targets(changed)}
    for name in assignment:
        if name not in known:
            raise ConfigError(f"node {name!r} cannot be narrow: it is no Conv, Gemm or MatMul of float32 with constant "
                              "weights, or is in integers already")  # fmt: skip
    for chosen, names in _by_format(assignment).items():
        format_, config = _format(chosen)
        if format_.calibrated and ranges is None:
            raise ConfigError(f"{format_.name} needs ranges: calibrate the model on samples first")
        members = [target for target in nodes.targets(changed) if target.name in names]
        format_.transform(config, changed, members, ranges or Ranges({}))
    return changed


def _by_format(assignment: Mapping[str, Any]) -> dict[Any, set[str]]:
    """Nodes by their format; fp32 is none."""
    grouped: dict[Any, set[str]] = {}
    for name, chosen in assignment.items():
        if chosen != "fp32":
            grouped.setdefault(chosen, set()).add(name)
    return grouped


def _format(chosen: Any) -> tuple[Format, Any]:
    """The format and its configuration."""
    _load()
    if isinstance(chosen, str):
        if chosen not in FORMATS:
            raise ConfigError(f"there is no format {chosen!r}; choose from fp32, {', '.join(FORMATS)}")
        return FORMATS[chosen], FORMATS[chosen].config
    for format_ in FORMATS.values():
        if type(format_.config) is type(chosen):
            return format_, chosen
    raise ConfigError(f"{chosen!r} is the configuration of no format; there are {', '.join(FORMATS)}")


def _load() -> None:
    """The modules that register the formats."""
    from ingot.precision import quantize, weight_only  # noqa: F401

"""Which calibrator's range disturbs the model's outputs least, tensor by tensor.

One engine is enough: every tensor is rounded to steps that are inputs of the engine, and only one at a time to steps
that are not far below float32's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.build import build
from ingot.config import BuildConfig
from ingot.ir.graph import add_constant, make_node
from ingot.precision import nodes
from ingot.precision.calibrators import LEVELS, Bounds
from ingot.precision.scales import affine
from ingot.runtime.session import Session

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Any]
Progress = Callable[[str, float], None]
Setting = tuple[float, float, float]  # lowest, highest, step
_OFF: Setting = (-math.inf, math.inf, 2.0**-40)
_ALIKE = 0.01


def least_disturbing(
    model: ir.Model, offers: Mapping[str, Mapping[str, Bounds]], feeds: Sequence[Feeds], progress: Progress
) -> dict[str, str]:
    """The name of the best offer per tensor, by the noise it alone makes at the outputs."""
    with Session(build(_rounding(model, list(offers)), BuildConfig(level=0, verify=False))) as session:
        trial = _Trial(session, list(offers), feeds)
        chosen = {}
        for position, (tensor, choices) in enumerate(offers.items()):
            progress("choose calibrators", position / len(offers))
            different = _different(choices)
            noise = {name: trial.noise(tensor, choices[name]) for name in different} if len(different) > 1 else {}
            chosen[tensor] = min(noise, key=lambda name: noise[name]) if noise else different[0]
        return chosen


def _different(choices: Mapping[str, Bounds]) -> list[str]:
    """Names whose steps differ by more than a hundredth from those before."""
    kept: dict[str, Bounds] = {}
    for name, (low, high) in choices.items():
        spans = [abs((high - low) / (b - a) - 1) if b > a else 0.0 for a, b in kept.values()]
        if not spans or min(spans) > _ALIKE:
            kept[name] = (low, high)
    return list(kept)


class _Trial:
    """An engine with rounded tensors, and the outputs without any rounding."""

    def __init__(self, session: Session, tensors: Sequence[str], feeds: Sequence[Feeds]) -> None:
        self.session, self.tensors, self.feeds = session, tensors, feeds
        self.settings = {key: value for tensor in tensors for key, value in _inputs(tensor, _OFF).items()}
        self.reference = self._outputs({})

    def noise(self, tensor: str, bounds: Bounds) -> float:
        """Noise over signal, summed over the floating point outputs, with this tensor in 8 bits over the range."""
        scale, zero = affine(*bounds)
        setting = (-zero * scale, (LEVELS - zero) * scale, scale)
        mine = self._outputs(_inputs(tensor, setting))
        return sum(_noise(a, b) for a, b in zip(mine, self.reference, strict=True))

    def _outputs(self, settings: Feeds) -> list[dict[str, Array]]:
        return [self.session.run({**feed, **self.settings, **settings}) for feed in self.feeds]


def _noise(mine: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    floats = [name for name, array in wanted.items() if array.dtype.kind == "f" and array.size]
    return sum(float(((mine[n] - wanted[n]) ** 2).mean() / ((wanted[n] ** 2).mean() + 1e-30)) for n in floats)


def _inputs(tensor: str, setting: Setting) -> dict[str, Array]:
    parts = zip(("low", "high", "step"), setting, strict=True)
    return {f"{tensor}.{part}": np.array(value, np.float32) for part, value in parts}


def _rounding(model: ir.Model, tensors: Sequence[str]) -> ir.Model:
    """x => floor(min(max(x, low), high) / step + 0.5) * step, in operators that every opset has."""
    copy = model.clone()
    for target in nodes.targets(copy):
        x = target.x
        if x.name in tensors and f"{x.name}.low" not in {v.name for v in copy.graph.inputs}:
            _round(copy.graph, x, target.node)
    return copy


def _round(graph: ir.Graph, x: ir.Value, reader: ir.Node) -> None:
    float32 = ir.TensorType(ir.DataType.FLOAT)
    low, high, step = (ir.Value(name=f"{x.name}.{part}", shape=ir.Shape([]), type=float32)
                       for part in ("low", "high", "step"))  # fmt: skip
    graph.inputs.extend([low, high, step])
    half = add_constant(graph, np.array(0.5, np.float32), f"{x.name}.half")
    value, made = x, []
    uses = list(x.uses())
    for op, operand in (("Max", low), ("Min", high), ("Div", step), ("Add", half), ("Floor", None), ("Mul", step)):
        node = make_node(op, [value] if operand is None else [value, operand], domain="", name=f"{x.name}.{op}")
        value = node.outputs[0]
        value.name, value.type, value.shape = f"{x.name}.{op}", x.type, x.shape
        made.append(node)
    place, anchor, behind = nodes.place_after(x, reader)
    (place.insert_after if behind else place.insert_before)(anchor, made)
    for node, index in uses:
        node.replace_input_with(index, value)

"""INT8 (W8A8) and FP8: both factors of a product in 8 bits, as QuantizeLinear and DequantizeLinear in the model.

Weights are symmetric, a scale an output channel; tensors have one scale, and a zero point where they are not symmetric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.errors import ConfigError
from ingot.ir.graph import add_constant
from ingot.precision import nodes, scales
from ingot.precision.formats import precision_format
from ingot.precision.nodes import Target
from ingot.precision.ranges import Ranges, TensorRange
from ingot.precision.smooth import smooth

Array = np.ndarray[Any, Any]
_PER_AXIS = 13  # the opset of standard Q/DQ with scales along an axis; before it, Microsoft's of the same meaning
_FLOAT8_OPSET = 19
_FLOAT8_LARGEST = 448.0
_STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Int8:
    """activations: "uint8" with a zero point where the range is not symmetric, "int8" without one. smooth: strengths of
    SmoothQuant that MatMul and Gemm may have, () for none. shared: which other readers of a tensor take it narrow too
    ("convolutions": where a convolution reads it; "all"; "none")."""

    activations: str = "uint8"
    smooth: tuple[float, ...] = ()
    shared: str = "convolutions"

    def __post_init__(self) -> None:
        if self.activations not in ("uint8", "int8") or self.shared not in ("convolutions", "all", "none"):
            raise ConfigError(f"{self}: activations are uint8 or int8, shared is convolutions, all or none")
        if not all(0 <= strength <= 1 for strength in self.smooth):
            raise ConfigError(f"smooth has numbers from 0 to 1, not {self.smooth}")


@dataclass(frozen=True)
class Float8:
    """E4M3 without infinities (float8e4m3fn), for GPUs that multiply it. per_channel: weights have a scale an output
    channel, not one alone, which libraries multiply by for nothing, and which products of one tensor share."""

    smooth: tuple[float, ...] = ()
    shared: str = "none"
    per_channel: bool = False


@precision_format("int8", Int8())
def int8(config: Int8, model: ir.Model, targets: Sequence[Target], ranges: Ranges) -> None:
    """x => DQ(Q(x)), weight => DQ(int8 weight) for every target."""
    _both_narrow(config, model, targets, ranges)


@precision_format("int8_smooth", Int8(smooth=_STRENGTHS))
def int8_smooth(config: Int8, model: ir.Model, targets: Sequence[Target], ranges: Ranges) -> None:
    """The same after magnitudes have moved from the tensors into the weights."""
    _both_narrow(config, model, targets, ranges)


@precision_format("fp8", Float8(), opset=_FLOAT8_OPSET)
def fp8(config: Float8, model: ir.Model, targets: Sequence[Target], ranges: Ranges) -> None:
    """The same in float8e4m3fn."""
    _both_narrow(config, model, targets, ranges)


def _both_narrow(config: Int8 | Float8, model: ir.Model, targets: Sequence[Target], ranges: Ranges) -> None:
    known = {t.name: ranges.of(str(t.x.name), t.name) for t in targets}
    if config.smooth:
        known = {**known, **smooth(targets, known, config.smooth)}
        named = {target.name for target in targets}
        targets = [target for target in nodes.targets(model) if target.name in named]
    writer = Writer(model)
    wide = {t.node for t in nodes.targets(model)} - {t.node for t in targets}
    for x, readers in _by_tensor(targets).items():
        narrow = _narrow(writer, config, x, known[readers[0].name], readers[0])
        for node, index in _users(config, x, readers, wide):
            if narrow not in node.outputs and node is not narrow.producer().inputs[0].producer():  # type: ignore[union-attr]
                node.replace_input_with(index, narrow)
    largest = _largest_of_siblings(targets)
    for target in targets:
        one = None if isinstance(config, Int8) or config.per_channel else largest[target.name]
        target.node.replace_input_with(1, writer.float8_weight(target, one) if isinstance(config, Float8)
                                       else writer.weight(target))  # fmt: skip


def _largest_of_siblings(targets: Sequence[Target]) -> dict[str, float]:
    """The largest magnitude of a target's weights, where it is no convolution of those of all that read its tensor:
    with one scale their products can be one."""
    own = {t.name: float(np.abs(t.array).max(initial=0.0)) for t in targets}
    for readers in _by_tensor(targets).values():
        names = [reader.name for reader in readers if not reader.is_convolution]
        own |= dict.fromkeys(names, max((own[name] for name in names), default=0.0))
    return own


def _by_tensor(targets: Sequence[Target]) -> dict[ir.Value, list[Target]]:
    grouped: dict[ir.Value, list[Target]] = {}
    for target in targets:
        grouped.setdefault(target.x, []).append(target)
    return grouped


def _users(
    config: Int8 | Float8, x: ir.Value, readers: Sequence[Target], wide: set[ir.Node]
) -> list[tuple[ir.Node, int]]:
    """Who reads the narrow form: the products, and where it is shared everybody but products that stay wide."""
    shared = config.shared == "all" or (config.shared == "convolutions" and any(r.is_convolution for r in readers))
    mine = {reader.node for reader in readers}
    return [(node, index) for node, index in list(x.uses()) if node in mine or (shared and node not in wide)]


def _narrow(writer: Writer, config: Int8 | Float8, x: ir.Value, known: TensorRange, reader: Target) -> ir.Value:
    if isinstance(config, Float8):
        import ml_dtypes

        scale = scales.symmetric(known.magnitude, int(_FLOAT8_LARGEST))
        return writer.pair(x, scale, np.zeros((), ml_dtypes.float8_e4m3fn), reader)
    if config.activations == "int8":
        return writer.pair(x, scales.symmetric(known.magnitude), np.zeros((), np.int8), reader)
    scale, zero = scales.affine(known.low, known.high)
    return writer.pair(x, scale, np.array(zero, np.uint8), reader)


@dataclass(eq=False)
class Writer:
    """Puts quantizers into a model."""

    model: ir.Model
    _domain: str = field(init=False)

    def __post_init__(self) -> None:
        old = self.model.opset_imports.get("", 1) < _PER_AXIS
        self._domain = "com.microsoft" if old else ""
        if old:
            self.model.opset_imports.setdefault(self._domain, 1)

    def pair(self, x: ir.Value, scale: float, zero: Array, reader: Target) -> ir.Value:
        """DQ(Q(x)), placed right behind what makes x."""
        graph, anchor, behind = nodes.place_after(x, reader.node)
        parameters = [add_constant(graph, np.array(scale, np.float32), f"{x.name}.scale"),
                      add_constant(graph, zero, f"{x.name}.zero")]  # fmt: skip
        quantize = self._node("QuantizeLinear", [x, *parameters], f"{x.name}.quantize")
        quantize.outputs[0].type, quantize.outputs[0].shape = ir.TensorType(parameters[1].dtype), x.shape  # type: ignore[arg-type]
        restore = self._node("DequantizeLinear", [quantize.outputs[0], *parameters], f"{x.name}.dequantize")
        restore.outputs[0].type, restore.outputs[0].shape = x.type, x.shape
        (graph.insert_after if behind else graph.insert_before)(anchor, [quantize, restore])
        return restore.outputs[0]

    def weight(self, target: Target) -> ir.Value:
        """DQ(int8 weight) with a scale an output channel."""
        array, axis = target.array, target.axis
        scale = scales.per_channel(array, axis)
        narrow = np.clip(np.rint(array / _column(scale, array, axis)), -127, 127).astype(np.int8)
        return self.restored(target, narrow, scale, np.zeros(scale.shape, narrow.dtype), {"axis": axis})

    def float8_weight(self, target: Target, magnitude: float | None) -> ir.Value:
        """DQ(float8 weight) with one scale for this magnitude, or with a scale an output channel where it is None."""
        import ml_dtypes

        array, axis, largest = target.array, target.axis, int(_FLOAT8_LARGEST)
        if magnitude is not None:
            one = np.array(scales.symmetric(magnitude, largest), np.float32)
            narrow: Array = (array / one).astype(ml_dtypes.float8_e4m3fn)
            return self.restored(target, narrow, one, np.zeros((), narrow.dtype), {})
        scale = scales.per_channel(array, axis, largest)
        narrow = (array / _column(scale, array, axis)).astype(ml_dtypes.float8_e4m3fn)
        return self.restored(target, narrow, scale, np.zeros(scale.shape, narrow.dtype), {"axis": axis})

    def restored(
        self, target: Target, narrow: Array, scale: Array, zero: Array | None, attributes: dict[str, int]
    ) -> ir.Value:
        """DequantizeLinear of constant weights, before the node that reads them."""
        graph, name = target.node.graph, target.weight.name
        assert isinstance(graph, ir.Graph)
        inputs = [add_constant(graph, narrow, f"{name}.narrow"), add_constant(graph, scale, f"{name}.scale")]
        if zero is not None:
            inputs.append(add_constant(graph, zero, f"{name}.zero"))
        node = self._node("DequantizeLinear", inputs, f"{target.name}.restored_weight", attributes)
        node.outputs[0].type, node.outputs[0].shape = target.weight.type, target.weight.shape
        graph.insert_before(target.node, [node])
        return node.outputs[0]

    def _node(
        self, op: str, inputs: Sequence[ir.Value], name: str, attributes: dict[str, int] | None = None
    ) -> ir.Node:
        node = ir.node(op, list(inputs), attributes or {}, domain=self._domain, name=name)
        node.outputs[0].name = name
        return node


def _column(scale: Array, array: Array, axis: int) -> Array:
    """Scales so that they broadcast along an axis."""
    return scale.reshape([-1 if i == axis else 1 for i in range(array.ndim)])

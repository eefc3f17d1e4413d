"""Q/DQ models run in integers: DQ → Conv ← DQ becomes an integer Conv; DQ and Q meet across what moves elements."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array
from ingot.ir.expression import Input, Instruction, Literal, Operand
from ingot.ir.graph import constant_of, dtype_of
from ingot.ir.shapes import shape_of
from ingot.passes.facts import (
    ACCUMULATOR,
    attribute,
    changed,
    channel_axis,
    channel_shaped,
    epilogue_of,
    extras_of,
    maker,
    only_reader,
    operands_of,
    rank_of,
    same_shape,
)
from ingot.passes.pattern import instruction_of
from ingot.passes.requantize import LIMITS
from ingot.passes.rewrite import Builder, Rejection, Result, Table, reject, rewrite_node

SHORT = ("int8", "uint8")


@dataclass(frozen=True)
class Quantized:
    """(q - zero) * scale; the scale is one number, or one per element of `axis`."""

    q: ir.Value
    scale: Array
    zero: int
    axis: int | None = None


def dequantized(value: ir.Value | None, types: Collection[str] = SHORT) -> Quantized | None:
    """What a value that is a Dequantize with constant parameters stands for, of 8-bit integers or of other `types`."""
    node = maker(value, "Pointwise")
    instruction = None if node is None else instruction_of(node)
    if node is None or instruction is None or instruction.op != "Dequantize":
        return None
    source, *settings = instruction.operands
    scale, zero = (_parameter(node, operand) for operand in settings)
    if not isinstance(source, Input) or scale is None or zero is None or instruction.dtype != "float32":
        return None
    q = operands_of(node)[source.index]
    axis = _axis_of(scale, rank_of(q) or 0)
    if dtype_of(q) not in types or not same_shape(q, node.outputs[0]) or np.any(zero != zero.reshape(-1)[0]):
        return None
    return Quantized(q, scale.reshape(() if axis is None else -1), int(zero.reshape(-1)[0]), axis)


def _parameter(node: ir.Node, operand: Operand) -> Array | None:
    """A scale or zero point as an array; None where it varies."""
    if isinstance(operand, Literal):
        return np.asarray(operand.value)
    return constant_of(node.inputs[operand.index]) if isinstance(operand, Input) else None


def _axis_of(parameter: Array, rank: int) -> int | None:
    """The axis of x along which a parameter runs; None for one number."""
    long = [axis for axis, size in enumerate(parameter.shape) if size != 1]
    return rank - parameter.ndim + long[0] if long else None


# products in integers


@rewrite_node("Conv", "Linear", "MatMul")
def integer_product(op: Builder, node: ir.Node) -> Result:
    """Conv(DQ(x), DQ(w)) => Conv(x, w) in int32, its epilogue begins with the product of the scales"""
    x, weight = (dequantized(value) for value in operands_of(node)[:2])
    if x is None or weight is None:
        return None if x is None and weight is None else reject("only one of its operands is quantized")
    if x.axis is not None:
        return reject("its input is quantized per channel", x.q)
    if attribute(node, "x_zero_point") or attribute(node, "weight_zero_point"):
        return reject("it computes in integers already")
    return narrow_product(op, node, x, weight, x_zero_point=x.zero, weight_zero_point=weight.zero)


def narrow_product(op: Builder, node: ir.Node, x: Quantized, weight: Quantized, **zeros: int) -> Result:
    """The product of the narrow numbers themselves; its epilogue begins with the product of the scales."""
    found = _placed(op, node, weight)
    if isinstance(found, Rejection):
        return found
    kind, weight_value, attributes = found
    scales = np.asarray(x.scale * weight.scale, np.float32)
    extras, text = scaled_epilogue(op, node, scales, weight.axis is not None)
    return op.make(kind, x.q, weight_value, *extras, **{**attributes, **zeros, "epilogue": text})


_Placed = tuple[str, ir.Value, dict[str, Any]]


def _placed(op: Builder, node: ir.Node, weight: Quantized) -> _Placed | Rejection:
    """(operator, its weight, its attributes): Linear where a MatMul's weight is a constant matrix."""
    if node.op_type == "Conv":
        fits = weight.axis in (None, 0)
        return ("Conv", weight.q, changed(node)) if fits else reject("its weight is not quantized per output", weight.q)
    rank = rank_of(weight.q) or 0
    flipped = node.op_type == "MatMul" and attribute(node, "transpose_b")
    if weight.axis not in (None, rank - 2 if flipped else rank - 1):
        return reject("its weight is not quantized per output", weight.q)
    array = constant_of(weight.q)
    if node.op_type == "Linear" or array is None or array.ndim != 2 or attribute(node, "transpose_a"):
        return node.op_type, weight.q, changed(node)
    return "Linear", op.constant(array.T, weight.q) if flipped else weight.q, {}


def scaled_epilogue(op: Builder, node: ir.Node, scales: Array, per_channel: bool) -> tuple[Sequence[ir.Value], str]:
    """The node's epilogue over `Cast(%0) * scales`, and its extras."""
    if per_channel:
        rank, axis = rank_of(node.outputs[0]), channel_axis(node)
        assert rank is not None and axis is not None
        vector = op.constant(channel_shaped(scales, rank, axis), node.inputs[1])
        inner_names: tuple[object, ...] = (ACCUMULATOR, vector)
        factor: Operand = Input(1)
    else:
        inner_names, factor = (ACCUMULATOR,), Literal(float(str(scales)))
    inner = expressions.parse("Cast %0 -> float32")
    inner = expressions.append(inner, "Mul", inner.result, factor, dtype="float32")
    names = (ACCUMULATOR, *extras_of(node))
    whole, merged = expressions.prune(*expressions.compose(epilogue_of(node), inner, 0, names, inner_names), keep=1)
    return [value for value in merged if isinstance(value, ir.Value)], expressions.format(whole)


@rewrite_node("Reduce")
def integer_mean(op: Builder, node: ir.Node) -> Result:
    """mean(DQ(x)) => sum(x) in int32, its epilogue scales"""
    x = dequantized(operands_of(node)[0])
    kind, shape = attribute(node, "kind"), shape_of(operands_of(node)[0])
    if x is None or x.axis is not None or kind not in ("mean", "sum") or shape is None:
        return None
    sizes = [shape[axis] for axis in attribute(node, "axes")]
    count = int(np.prod([size for size in sizes if isinstance(size, int)]))
    if not all(isinstance(size, int) for size in sizes) or count >= 1 << 23:
        return reject("how many elements it sums is not known to fit in int32", node)
    scale = float(x.scale) / (count if kind == "mean" else 1)
    factor = float(str(np.float32(scale)))
    inner = expressions.parse(f"Sub %0 {x.zero * count} -> int32; Cast $0 -> float32; Mul $1 {factor!r} -> float32")
    names = (ACCUMULATOR, *extras_of(node))
    whole, merged = expressions.compose(epilogue_of(node), inner, 0, names, (ACCUMULATOR,))
    extras = [value for value in merged if isinstance(value, ir.Value)]
    return op.Reduce(x.q, *extras, **changed(node, kind="sum", epilogue=expressions.format(whole)))


# Q and DQ across what only moves elements


MOVES = ("View", "Transpose", "Slice", "Expand", "Tile", "Gather", "GatherElements", "GatherND", "Split")


@rewrite_node(*MOVES, "Pad", "Pool", "Reduce", "Resize")
def move_in_integers(op: Builder, node: ir.Node) -> Result:
    """Move(DQ(x)) => DQ(Move(x)); the largest of a window or axis too, as DQ keeps the order"""
    x = dequantized(operands_of(node)[0])
    if x is None:
        return None
    if x.axis is not None:
        return reject("it is quantized per channel", x.q)
    attributes = _integer_attributes(node, x)
    if attributes is None:
        return None
    moved = op.make(node.op_type, x.q, *node.inputs[1:], _outputs=len(node.outputs), **attributes)
    results = moved if isinstance(moved, tuple) else (moved,)
    return {old: dequantize(op, x, new) for old, new in zip(node.outputs, results, strict=True)}


def _integer_attributes(node: ir.Node, x: Quantized) -> dict[str, Any] | None:
    """The node's attributes over integers; None where integers give another result."""
    if node.op_type == "Pad":
        value = _quantized_number(float(attribute(node, "value")), x)
        return None if value is None else changed(node, value=value)
    if node.op_type == "Pool":
        whole = attribute(node, "kind") == "max" and not attribute(node, "indices")
        return changed(node) if whole else None
    if node.op_type == "Reduce":
        return changed(node) if attribute(node, "kind") in ("max", "min") and not attribute(node, "epilogue") else None
    if node.op_type == "Resize":
        filled = attribute(node, "coordinate") == "tf_crop_and_resize"
        return changed(node) if attribute(node, "mode") == "nearest" and not filled else None
    return changed(node)


def _quantized_number(value: float, x: Quantized) -> int | None:
    """The integer that stands for a number exactly."""
    q = value / float(x.scale) + x.zero
    low, high = LIMITS[dtype_of(x.q)]
    return round(q) if np.isfinite(q) and abs(q - round(q)) < 1e-6 and low <= round(q) <= high else None


def dequantize(op: Builder, x: Quantized, value: ir.Value) -> ir.Value:
    text = f"Dequantize %0 {float(str(np.float32(x.scale)))!r} {x.zero} -> float32"
    result: ir.Value = op.Pointwise(value, expression=text)
    return result


@rewrite_node("Concat")
def concat_in_integers(op: Builder, node: ir.Node) -> Result:
    """Concat(DQ(a), DQ(b)) => DQ(Concat(a, b)) where all have one scale and zero point"""
    parts = [dequantized(value) for value in operands_of(node)]
    known = [part for part in parts if part is not None and part.axis is None]
    if not known:
        return None
    first = known[0]
    same = [p for p in known if p.scale == first.scale and p.zero == first.zero and dtype_of(p.q) == dtype_of(first.q)]
    if len(same) < len(parts):
        return reject("its parts have different scales", node)
    return dequantize(op, first, op.Concat(*(part.q for part in same), axis=attribute(node, "axis")))


@rewrite_node("Pointwise")
def quantize_before_move(op: Builder, node: ir.Node) -> Result:
    """Q(Move(x)) => Move(Q(x)): fewer bytes are moved, and Q can join what makes x"""
    instruction = instruction_of(node)
    if instruction is None or instruction.op != "Quantize" or instruction.dtype not in SHORT:
        return None
    if not isinstance(instruction.operands[0], Input) or any(isinstance(o, Input) for o in instruction.operands[1:]):
        return None
    x = operands_of(node)[instruction.operands[0].index]
    move = maker(x, "View", "Transpose", "Slice", "Expand", "Tile", "Concat", "Pool")
    if move is None or not same_shape(x, node.outputs[0]):
        return None
    if only_reader(x) is not node:
        return reject("the moved value is used elsewhere too", move)
    if move.op_type == "Pool" and (attribute(move, "kind") != "max" or attribute(move, "indices")):
        return None
    text = _text(instruction)
    sources = [op.Pointwise(value, expression=text) for value in operands_of(move)]
    return op.make(move.op_type, *sources, **changed(move))


def _text(instruction: Instruction) -> str:
    return expressions.format(expressions.Expression((instruction,)))


QUANT = Table(
    "integers",
    (integer_product, integer_mean, move_in_integers, concat_in_integers, quantize_before_move),
)

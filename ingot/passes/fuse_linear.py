"""Linear from MatMul; constant scales and biases around Linear, Conv and ConvTranspose go into their weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.elementwise import FLOATS, Array, wide
from ingot.ir.expression import Expression, Input
from ingot.ir.graph import constant_of, dtype_of
from ingot.ir.shapes import shape_of
from ingot.passes.affine import Affine, peel, vectors_of
from ingot.passes.facts import (
    ACCUMULATOR,
    are_ones,
    attribute,
    changed,
    channel_axis,
    channel_shaped,
    epilogue_of,
    extras_of,
    maker,
    only_reader,
    operand_kind,
    operands_of,
    rank_of,
    varying,
)
from ingot.passes.fuse_pointwise import distinct
from ingot.passes.rewrite import Builder, Result, Table, reject, rewrite_node


@rewrite_node("MatMul")
def linear(op: Builder, node: ir.Node) -> Result:
    """MatMul(x, w) => Linear(x, w) where w is a constant matrix"""
    x, weight = operands_of(node)[:2]
    array, rank = constant_of(weight), rank_of(x)
    if array is None or rank is None or array.ndim > rank or not are_ones(array.shape[:-2]):
        return None if array is None else reject("the constant is no single matrix", weight)
    if attribute(node, "transpose_a"):
        return reject("the input is transposed", x)
    matrix = array.reshape(array.shape[-2:])
    matrix_KN = matrix.T if attribute(node, "transpose_b") else matrix
    kept = matrix_KN is matrix and array.ndim == 2
    attributes = {name: attribute(node, name) for name in ("x_zero_point", "weight_zero_point", "epilogue")}
    return op.Linear(x, weight if kept else op.constant(matrix_KN, weight), *extras_of(node), **attributes)


# scales and biases after: BatchNormalization among them


@rewrite_node("Linear", "Conv", "ConvTranspose")
def scaled_weight(op: Builder, node: ir.Node) -> Result:
    """Conv(x, w) * scale + bias => Conv(x, w * scale) + bias"""
    epilogue, axis, output = epilogue_of(node), channel_axis(node), shape_of(node.outputs[0])
    weight = constant_of(node.inputs[1])
    if not epilogue or axis is None or output is None or weight is None:
        return None
    affine = peel(epilogue, vectors_of(extras_of(node), output, axis))
    if not affine.scales or dtype_of(operands_of(node)[1]) not in FLOATS:
        return None
    if node.op_type == "ConvTranspose" and attribute(node, "group") != 1:
        return reject("a grouped ConvTranspose keeps its scale")
    place = {"Linear": 1, "Conv": 0, "ConvTranspose": 1}[node.op_type]
    wider = wide(weight)
    scaled = (wider * _along(affine.scale.astype(wider.dtype), weight.ndim, place)).astype(weight.dtype, copy=False)
    return _with_bias(op, node, operands_of(node)[0], scaled, affine.shift, affine)


def _along(vector: Array, rank: int, axis: int) -> Array:
    return vector if vector.ndim == 0 else channel_shaped(vector, rank, axis)


def _with_bias(op: Builder, node: ir.Node, x: ir.Value, weight: Array, shift: Array, affine: Affine | None) -> ir.Value:
    """The node with another input and weight, `shift` added before what its epilogue does (or before `affine.rest`)."""
    rest: Expression = epilogue_of(node) if affine is None else affine.rest
    names: tuple[object, ...] = (ACCUMULATOR, *extras_of(node))
    bias = _bias(op, node, shift.astype(weight.dtype))
    if bias is not None:
        add = expressions.apply("Add", Input(0), Input(1), dtype=weight.dtype.name)
        rest, names = expressions.compose(rest, add, 0, names, (ACCUMULATOR, bias))
    rest, names = expressions.prune(rest, names, keep=1)
    extras = [name for name in names if isinstance(name, ir.Value)]
    new_weight = op.constant(weight, node.inputs[1])
    return op.make(node.op_type, x, new_weight, *extras, **changed(node, epilogue=expressions.format(rest)))


def _bias(op: Builder, node: ir.Node, shift: Array) -> ir.Value | None:
    rank, axis = rank_of(node.outputs[0]), channel_axis(node)
    assert rank is not None and axis is not None
    return None if not np.any(shift) else op.constant(_along(shift, rank, axis), node.inputs[1])


# scales and biases before


@dataclass(frozen=True)
class _Scaled:
    """scale * x + shift, per channel of the axis."""

    x: ir.Value
    scale: Array
    shift: Array


def _scaled_input(value: ir.Value, axis: int) -> _Scaled | None:
    """The value as an affine function of another of its shape."""
    node, shape = maker(value, "Pointwise"), shape_of(value)
    if node is None or shape is None:
        return None
    expression, operands = distinct(epilogue_of(node), operands_of(node))
    varies = varying(operands)
    if len(varies) != 1 or shape_of(varies[0]) != shape or dtype_of(varies[0]) != dtype_of(value):
        return None
    ordered = (varies[0], *(operand for operand in operands if operand is not varies[0]))
    expression = expressions.substitute(expression, {i: Input(ordered.index(v)) for i, v in enumerate(operands)})
    affine = peel(expression, vectors_of(ordered[1:], shape, axis))
    return None if affine.rest or not affine.steps else _Scaled(varies[0], affine.scale, affine.shift)


@rewrite_node("Linear", "Conv")
def scaled_input(op: Builder, node: ir.Node) -> Result:
    """Conv(x * scale, w) => Conv(x, w * scale); a bias too where no padding reads beside it"""
    x, weight = operands_of(node)[0], constant_of(node.inputs[1])
    rank = rank_of(x)
    if weight is None or dtype_of(operands_of(node)[1]) not in FLOATS or rank is None:
        return None
    scaled = _scaled_input(x, rank - 1 if node.op_type == "Linear" else 1)
    if scaled is None:
        return None
    if only_reader(x) is not node:
        return reject("the scaled input is used elsewhere too", x)
    if np.any(scaled.shift) and node.op_type == "Conv" and any(attribute(node, "pads")):
        return reject("the shifted input is padded with zeros", x)
    product, shift = _input_folded(weight.astype(np.float64), scaled, node)
    return _with_bias(op, node, scaled.x, product.astype(weight.dtype), shift, None)


def _input_folded(weight: Array, scaled: _Scaled, node: ir.Node) -> tuple[Array, Array]:
    """(the weight times the scale of its input channels, what the shift adds to every output channel)"""
    if node.op_type == "Linear":
        shift = np.broadcast_to(scaled.shift, weight.shape[:1]) @ weight
        return weight * _along(scaled.scale, 2, 0), shift
    group = attribute(node, "group")
    grouped = weight.reshape(group, -1, *weight.shape[1:])

    def spread(vector: Array) -> Array:
        channels = np.broadcast_to(vector, (group * weight.shape[1],))
        return channels.reshape(group, 1, weight.shape[1], *[1] * (weight.ndim - 2))

    shift = (grouped * spread(scaled.shift)).sum(axis=tuple(range(2, grouped.ndim))).reshape(-1)
    return (grouped * spread(scaled.scale)).reshape(weight.shape), shift


# views


@rewrite_node("View")
def view_above_linear(op: Builder, node: ir.Node) -> Result:
    """View(Linear(View(x))) => Linear(View(View(x))) where only batch axes are viewed: the views meet"""
    source = maker(node.inputs[0], "Linear")
    shape, old = shape_of(node.outputs[0]), None if source is None else shape_of(source.outputs[0])
    if source is None or not shape or not old or shape[-1] != old[-1] or maker(source.inputs[0], "View") is None:
        return None
    if only_reader(source.outputs[0]) is not node:
        return reject("the result is used elsewhere too", source)
    x, weight = operands_of(source)[:2]
    if any(operand_kind(shape_of(extra), old, len(old) - 1) == "full" for extra in extras_of(source)):
        return reject("a residual has the other shape", source)
    extras = [_at_most(op, extra, len(shape)) for extra in extras_of(source)]
    depth = shape_of(weight)
    assert depth is not None
    return op.Linear(op.View(x, shape=(*shape[:-1], depth[0])), weight, *extras, **changed(source))


def _at_most(op: Builder, vector: ir.Value, rank: int) -> ir.Value:
    """A scalar or channel vector without the leading ones that would raise the rank of the result."""
    sizes = shape_of(vector) or ()
    return vector if len(sizes) <= rank else op.View(vector, shape=sizes[-1:])


LINEAR = Table("linear", (linear,))
VIEWS = Table("views", (view_above_linear,))
WEIGHTS = Table("weights", (scaled_weight, scaled_input))

"""Query, key and value projections of one input become one Linear whose heads come out of one transposition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array
from ingot.ir.expression import Input
from ingot.ir.graph import constant_of, dtype_of
from ingot.ir.shapes import shape_of
from ingot.passes.affine import peel, vectors_of
from ingot.passes.facts import Shape, attribute, changed, epilogue_of, extras_of, maker, only_reader, operands_of
from ingot.passes.rewrite import Builder, Rejection, Result, Table, reject, rewrite_node

_HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True)
class Projection:
    """Transpose(View(Linear(x, weight) + bias)): heads [B, H, S, D] of one operand of Attention."""

    x: ir.Value
    weight_KN: Array
    bias_N: Array
    split: Shape

    def fits(self, other: Projection) -> bool:
        same = self.x is other.x and self.split == other.split and self.weight_KN.dtype == other.weight_KN.dtype
        return same and self.weight_KN.shape == other.weight_KN.shape


@rewrite_node("Attention")
def one_projection(op: Builder, node: ir.Node) -> Result:
    """Attention(heads(x wq), heads(x wk), heads(x wv)) => Attention(*Split(heads(x [wq wk wv])))"""
    found: list[Projection] = []
    for value in operands_of(node)[:3]:
        projection = _projection(value)
        if not isinstance(projection, Projection):
            return projection
        found.append(projection)
    first = found[0]
    if not all(first.fits(other) for other in found):
        return reject("query, key and value are not projected alike from one value", node)
    q, k, v = _joined(op, first, found)
    return op.Attention(q, k, v, *node.inputs[3:], **changed(node))


def _projection(value: ir.Value) -> Projection | Rejection | None:
    transpose = maker(value, "Transpose")
    view = None if transpose is None else maker(transpose.inputs[0], "View")
    linear = None if view is None else maker(view.inputs[0], "Linear")
    if transpose is None or view is None or linear is None or attribute(transpose, "perm") != _HEADS_FIRST:
        return None
    if any(only_reader(node.outputs[0]) is None for node in (transpose, view, linear)):
        return reject("a projection is used elsewhere too", linear)
    split, output = shape_of(view.outputs[0]), shape_of(linear.outputs[0])
    x, weight = operands_of(linear)[:2]
    array = constant_of(weight)
    if split is None or output is None or array is None or split[:-2] != output[:-1] or len(split) != 4:
        return reject("a projection is not split into heads along its last axis", view)
    affine = peel(epilogue_of(linear), vectors_of(extras_of(linear), output, len(output) - 1))
    if affine.rest or affine.scales or array.dtype.kind != "f" or dtype_of(linear.outputs[0]) != array.dtype.name:
        return reject("a projection does more than to add a bias", linear)
    bias = np.broadcast_to(affine.shift.astype(array.dtype), array.shape[1:])
    return Projection(x, array, bias, split)


def _joined(op: Builder, first: Projection, parts: list[Projection]) -> list[ir.Value]:
    """The operands [B, H, S, D] out of [3, B, H, S, D], where each lies in one piece."""
    dtype = first.weight_KN.dtype.name
    weight = op.constant(np.concatenate([part.weight_KN for part in parts], axis=1))
    bias = op.constant(np.concatenate([part.bias_N for part in parts]))
    add = expressions.format(expressions.apply("Add", Input(0), Input(1), dtype=dtype))
    joined = op.Linear(first.x, weight, bias, epilogue=add)
    batch, length, heads, depth = first.split
    viewed = op.View(joined, shape=(batch, length, len(parts), heads, depth))
    stacked = op.Transpose(viewed, perm=(2, 0, 3, 1, 4))
    pieces = op.make("Split", stacked, axis=0, sizes=[1] * len(parts), _outputs=len(parts))
    return [op.View(piece, shape=(batch, heads, length, depth)) for piece in pieces]


HEADS = Table("heads", (one_projection,))

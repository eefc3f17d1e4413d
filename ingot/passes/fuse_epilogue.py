"""Elementwise work after Linear, MatMul, Conv, ConvTranspose, Reduce, Norm becomes its epilogue, residual included."""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.shapes import shape_of
from ingot.passes.facts import (
    ACCUMULATOR,
    attribute,
    changed,
    channel_axis,
    epilogue_of,
    extras_of,
    main_inputs,
    only_reader,
    operand_kind,
    operands_of,
    same_shape,
    takes_epilogue,
)
from ingot.passes.fuse_pointwise import TOO_LARGE, distinct, fits
from ingot.passes.rewrite import Builder, Rejection, Result, Table, reject, rewrite_node


@rewrite_node("Pointwise")
def epilogue(op: Builder, node: ir.Node) -> Result:
    """g(Conv(x, w), …) => Conv(x, w, …; g); of two that could take it, the one with the longer sums does"""
    refused: Result = None
    for value in sorted(_candidates(node), key=_work, reverse=True):
        result = _absorbed(op, node, value)
        if not isinstance(result, Rejection):
            return result
        refused = result
    return refused


def _candidates(node: ir.Node) -> list[ir.Value]:
    """Operands made by an op that takes an epilogue, the later operand first: it is the later one as a rule."""
    values = [value for value in dict.fromkeys(node.inputs) if value is not None and value.index() == 0]
    return [value for value in reversed(values) if _can_take(value.producer(), node)]


def _can_take(source: ir.Node | None, node: ir.Node) -> bool:
    if source is None or source.graph is not node.graph or not takes_epilogue(source):
        return False
    return source.op_type != "Reduce" or attribute(source, "kind") not in ("argmax", "argmin")


def _work(value: ir.Value) -> int:
    """Length of the sums behind one element, as far as it is static."""
    node = value.producer()
    weight = shape_of(node.inputs[1]) if node is not None and len(node.inputs) > 1 and node.inputs[1] else None
    if node is None or not weight:
        return 0
    sizes = weight[1:] if node.op_type == "Conv" else weight[-2:-1]
    return prod(size for size in sizes if isinstance(size, int))


def _absorbed(op: Builder, node: ir.Node, value: ir.Value) -> Result:
    source = value.producer()
    assert source is not None
    if only_reader(value) is not node:
        return reject("the result is used elsewhere too", source)
    if not same_shape(value, node.outputs[0]):
        return reject("the result is broadcast", source)
    outer, operands = distinct(epilogue_of(node), operands_of(node))
    shape, axis = shape_of(value), channel_axis(source)
    assert shape is not None
    for operand in operands:
        if operand is not value and operand_kind(shape_of(operand), shape, axis) is None:
            return reject("an operand is neither a scalar, nor a channel vector, nor of the result's shape", operand)
    names: tuple[object, ...] = (ACCUMULATOR, *extras_of(source))
    expression, merged = expressions.compose(outer, epilogue_of(source), operands.index(value), operands, names)
    expression, merged = expressions.prune(expression, merged, keep=1)
    extras = tuple(operand for operand in merged[1:] if isinstance(operand, ir.Value))
    if not fits(expression, extras):
        return reject(TOO_LARGE, source)
    attributes = changed(source, epilogue=expressions.format(expression))
    return op.make(source.op_type, *main_inputs(source), *extras, **attributes)


EPILOGUES = Table("epilogues", (epilogue,))

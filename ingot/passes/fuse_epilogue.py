"""Elementwise work after Linear, MatMul, Conv, ConvTranspose, Reduce, Norm becomes its epilogue, residual included."""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.expression import Input
from ingot.ir.shapes import shape_of
from ingot.passes.facts import (
    ACCUMULATOR,
    attribute,
    changed,
    channel_axis,
    epilogue_of,
    extras_of,
    main_inputs,
    maker,
    only_reader,
    operand_kind,
    operands_of,
    same_shape,
    takes_epilogue,
)
from ingot.passes.fuse_pointwise import CHEAP, TOO_LARGE, distinct, fits, is_one_of
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


@rewrite_node("Conv", "ConvTranspose", "Linear", "QuantizedLinear", "MatMul")
def operand_chain(op: Builder, node: ir.Node) -> Result:
    """Linear(x, w, f(y); g) => Linear(x, w, y; g∘f) where f is one cheap instruction that nobody else reads"""
    for value in extras_of(node):
        source = maker(value, "Pointwise")
        if source is not None and source.graph is node.graph and _can_join(node, value, source):
            names: tuple[object, ...] = (ACCUMULATOR, *extras_of(node))
            inner, operands = distinct(epilogue_of(source), operands_of(source))
            moved = expressions.substitute(inner, {i: Input(i + 1) for i in range(len(operands))})
            inner_names = (ACCUMULATOR, *operands)
            whole, merged = expressions.compose(epilogue_of(node), moved, names.index(value), names, inner_names)
            whole, merged = expressions.prune(whole, merged, keep=1)
            extras = tuple(operand for operand in merged[1:] if isinstance(operand, ir.Value))
            if fits(whole, extras):
                attributes = changed(node, epilogue=expressions.format(whole))
                return op.make(node.op_type, *main_inputs(node), *extras, **attributes)
    return None


def _can_join(node: ir.Node, value: ir.Value, source: ir.Node) -> bool:
    """Whether a product can compute its operand itself: no more is read than was."""
    shape, axis = shape_of(node.outputs[0]), channel_axis(node)
    if only_reader(value) is not node or not is_one_of(source, CHEAP) or shape is None:
        return False
    return same_shape(value, node.outputs[0]) and all(
        operand_kind(shape_of(operand), shape, axis) is not None for operand in operands_of(source)
    )  # fmt: skip


EPILOGUES = Table("epilogues", (epilogue, operand_chain))

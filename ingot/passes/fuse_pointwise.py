"""Chains of elementwise work become one Pointwise, whose expression shares what its parts have in common."""

from __future__ import annotations

import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.expression import Expression, Input
from ingot.passes.facts import (
    MAX_INSTRUCTIONS,
    MAX_OPERANDS,
    epilogue_of,
    maker,
    only_reader,
    operands_of,
    same_shape,
    varying,
)
from ingot.passes.rewrite import Builder, Result, Table, reject, rewrite_node

Operands = tuple[ir.Value, ...]
TOO_LARGE = f"the fused expression would pass {MAX_INSTRUCTIONS} instructions or {MAX_OPERANDS} operands"
_WIDENING = frozenset({"Cast", "Dequantize"})  # recomputed by every reader, which then reads fewer bytes
CHEAP = _WIDENING | {"Neg", "Abs", "Relu", "Add", "Sub", "Mul", "Not", "Clip"}


def distinct(expression: Expression, operands: Operands) -> tuple[Expression, Operands]:
    """The same with every operand named once."""
    unique = tuple(dict.fromkeys(operands))
    place = {value: index for index, value in enumerate(unique)}
    renamed = expressions.substitute(expression, {i: Input(place[value]) for i, value in enumerate(operands)})
    return renamed, unique


def inlined(node: ir.Node, source: ir.Node) -> tuple[Expression, Operands]:
    """The node's expression with that of `source`, which makes one of its operands, put in its place."""
    outer, operands = distinct(epilogue_of(node), operands_of(node))
    inner, inner_operands = distinct(epilogue_of(source), operands_of(source))
    position = operands.index(source.outputs[0])
    return expressions.prune(*expressions.compose(outer, inner, position, operands, inner_operands))


def fits(expression: Expression, operands: Operands) -> bool:
    return len(expression.instructions) <= MAX_INSTRUCTIONS and len(operands) <= MAX_OPERANDS


def _sources(node: ir.Node) -> list[ir.Node]:
    """The Pointwise nodes that make the node's operands, over the same extents: none is computed more often fused."""
    makers = (maker(value, "Pointwise") for value in dict.fromkeys(node.inputs))
    return [source for source in makers if source is not None and source.graph is node.graph
            and same_shape(source.outputs[0], node.outputs[0])]  # fmt: skip


def is_one_of(node: ir.Node, ops: frozenset[str]) -> bool:
    """Whether a Pointwise is one instruction of these, over one operand that varies."""
    instructions = epilogue_of(node).instructions
    return len(instructions) == 1 and instructions[0].op in ops and len(varying(operands_of(node))) == 1


@rewrite_node("Pointwise")
def unary_chain(op: Builder, node: ir.Node) -> Result:
    """g(f(x)) => (g∘f)(x) where only one operand varies: the whole can become an epilogue"""
    for source in _sources(node):
        if only_reader(source.outputs[0]) is node and not _parts_at_bytes(source, node):
            expression, operands = inlined(node, source)
            if len(varying(operands)) <= 1 and fits(expression, operands):
                return op.Pointwise(*operands, expression=expressions.format(expression))
    return None


def _parts_at_bytes(source: ir.Node, node: ir.Node) -> bool:
    """Whether bytes between the two are what elementwise readers shall read: `widening` takes the node to them."""
    last = epilogue_of(source).instructions[-1:]
    quantized = bool(last) and last[0].op == "Quantize"
    return quantized and is_one_of(node, _WIDENING) and _repeatable(node) and bool(node.outputs[0].uses())


@rewrite_node("Pointwise")
def widening(op: Builder, node: ir.Node) -> Result:
    """g(Dequantize(q)) => (g∘Dequantize)(q) for every reader: it then reads the narrow type"""
    for source in _sources(node):
        if is_one_of(source, _WIDENING) and _widens(source):
            expression, operands = inlined(node, source)
            if fits(expression, operands):
                return op.Pointwise(*operands, expression=expressions.format(expression))
    return None


def _widens(node: ir.Node) -> bool:
    varies = varying(operands_of(node))[0]
    return varies.dtype is not None and node.outputs[0].dtype is not None and (
        varies.dtype.itemsize < node.outputs[0].dtype.itemsize
    )  # fmt: skip


@rewrite_node("Pointwise")
def pointwise_chain(op: Builder, node: ir.Node) -> Result:
    """g(f(x, …), …) => (g∘f)(x, …)"""
    refused: Result = None
    for source in _sources(node):
        if only_reader(source.outputs[0]) is not node and not _repeatable(source):
            refused = reject("its operand is used elsewhere too and is not trivial", source)
            continue
        expression, operands = inlined(node, source)
        if fits(expression, operands):
            return op.Pointwise(*operands, expression=expressions.format(expression))
        refused = reject(TOO_LARGE, source)
    return refused


def _repeatable(source: ir.Node) -> bool:
    """Whether all readers are elementwise and computing it in each costs less than keeping it."""
    value = source.outputs[0]
    return not value.is_graph_output() and is_one_of(source, CHEAP) and all(
        use.node.op_type == "Pointwise" and same_shape(use.node.outputs[0], value) for use in value.uses()
    )  # fmt: skip


UNARY = Table("unary chains", (widening, unary_chain))
CHAINS = Table("pointwise chains", (widening, pointwise_chain))

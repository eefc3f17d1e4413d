"""Experts of a decoder become Mixtures: what is made of their result is computed where it is, in float32."""

from __future__ import annotations

import onnx_ir as ir

from ingot.ir.graph import attributes, dtype_of, make_node, replace_node

_NORM = 8  # place of a Mixture's norm: behind the experts' own inputs


def mix(graph: ir.Graph) -> None:
    """Every Experts of the graph as a Mixture, in place; norms are taken in by `projections.project`."""
    for node in list(graph):
        if node.op_type == "Experts":
            _mixture(graph, node)


def _mixture(graph: ir.Graph, node: ir.Node) -> None:
    """Pointwise(Experts(x, …), operands) => Mixture(x, …, operands)"""
    after, stated = _pointwise(node), attributes(node)
    dtype = dtype_of(node.outputs[0])
    text = "" if dtype == "float32" else f"Cast %0 -> {dtype}"
    operands = list[ir.Value | None]()
    if after is not None:
        text, operands = attributes(after)["expression"], list(after.inputs[1:])
    inputs = [*node.inputs, *[None] * (_NORM + 1 - len(node.inputs)), *operands]
    made = make_node("Mixture", inputs, {**stated, "expression": text}, name=node.name)
    replace_node(after or node, [made], list(made.outputs))
    if after is not None:
        graph.remove(node, safe=True)


def _pointwise(node: ir.Node) -> ir.Node | None:
    """What is made of the result, where nobody else reads it."""
    (value,) = node.outputs
    users = list(value.uses())
    if value.is_graph_output() or len(users) != 1 or (users[0].node.op_type, users[0].idx) != ("Pointwise", 0):
        return None
    after = users[0].node
    return after if all(v is not None and v.shape == value.shape for v in after.inputs) else None

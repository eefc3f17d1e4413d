"""Linears of one input become one ParallelLinear: for targets where a launch costs more than its work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ingot.ir.elementwise import FLOATS, Array
from ingot.ir.graph import add_constant, constant_of, dtype_of, make_node
from ingot.ir.provenance import merged_origins, set_origins
from ingot.ir.shapes import shape_of
from ingot.passes.affine import vectors_of
from ingot.passes.facts import epilogue_of, extras_of, is_op, operands_of
from ingot.passes.rewrite import detach


def join_linears(model: ir.Model) -> int:
    """Every group of Linears that read one value and add a bias at most; the number that went."""
    groups: dict[tuple[ir.Value, str], list[ir.Node]] = {}
    for node in model.graph:
        if is_op(node, "Linear") and _bias_of(node) is not None:
            x = operands_of(node)[0]
            groups.setdefault((x, dtype_of(x)), []).append(node)
    found = [nodes for nodes in groups.values() if len(nodes) > 1]
    for nodes in found:
        _join(model.graph, nodes)
    return sum(len(nodes) - 1 for nodes in found)


def _bias_of(node: ir.Node) -> Array | None:
    """What a Linear adds to its columns; None where it does something else, or is a result of the graph."""
    x, weight = operands_of(node)[:2]
    array, output = constant_of(weight), shape_of(node.outputs[0])
    if array is None or output is None or array.dtype.name not in FLOATS or node.outputs[0].is_graph_output():
        return None
    if not dtype_of(x) == array.dtype.name == dtype_of(node.outputs[0]):
        return None
    extras = extras_of(node)
    vectors = vectors_of(extras, output, len(output) - 1)
    steps = [step.op for step in epilogue_of(node).instructions if step.op != "Cast"]
    if (steps, len(extras)) not in (([], 0), (["Add"], 1)) or len(vectors) < len(extras):
        return None
    bias = vectors[1] if vectors else np.zeros(1)
    return np.broadcast_to(bias.astype(array.dtype), array.shape[1:])


def _join(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    first = nodes[0]
    weights = [array for node in nodes if (array := constant_of(node.inputs[1])) is not None]
    biases = [array for node in nodes if (array := _bias_of(node)) is not None]
    weight = add_constant(graph, np.concatenate(weights, axis=1), first.name)
    bias = add_constant(graph, np.concatenate(biases), first.name)
    sizes = [array.shape[1] for array in weights]
    joined = make_node("ParallelLinear", (first.inputs[0], weight, bias), {"sizes": sizes}, outputs=len(nodes))
    joined.name = first.name
    set_origins(joined, merged_origins(nodes))
    graph.insert_before(first, joined)
    for node, value in zip(nodes, joined.outputs, strict=True):
        node.outputs[0].replace_all_uses_with(value)
        detach(node)

"""What a Norm or an Attention gives is quantized where it is computed: for targets whose kernels have room for it.

A Norm whose result has other readers too (a residual) gives both, so that it is read once less by the next product.
"""

from __future__ import annotations

import onnx_ir as ir

from ingot.ir.expression import Input
from ingot.ir.graph import make_node
from ingot.ir.provenance import merged_origins, set_origins
from ingot.passes.facts import attribute, changed, epilogue_of, is_op, maker, only_reader, operands_of, same_shape
from ingot.passes.rewrite import detach


def quantize_inside(model: ir.Model) -> int:
    """Q(Attention(…)) => NarrowAttention(…), Norm(…) and Q of it => NarrowNorm(…); the number of nodes that went."""
    found = 0
    for node in list(model.graph):
        source = _source(node)
        if source is not None:
            made = _narrow_norm(source, node) if source.op_type == "Norm" else _narrow_attention(source, node)
            _put(model.graph, made, source, node)
            found += 1
    return found


def _source(node: ir.Node) -> ir.Node | None:
    """What a Pointwise quantizes, where that can do it itself."""
    if not is_op(node, "Pointwise") or not _quantizes(node) or node.outputs[0].is_graph_output():
        return None
    (x,) = operands_of(node)
    source = maker(x, "Norm", "Attention")
    if source is None or source.graph is not node.graph or not same_shape(x, node.outputs[0]):
        return None
    if source.op_type == "Attention":
        return source if only_reader(x) is node else None
    plain = not attribute(source, "epilogue") and attribute(source, "kind") in ("layer", "rms")
    return source if plain and not x.is_graph_output() else None


def _quantizes(node: ir.Node) -> bool:
    """Whether it is one Quantize of its only operand, with numbers for scale and zero point."""
    steps = [step for step in epilogue_of(node).instructions if step.op != "Cast"]
    if len(steps) != 1 or steps[0].op != "Quantize" or len(operands_of(node)) != 1:
        return False
    return not any(isinstance(operand, Input) for operand in steps[0].operands[1:])


def _narrow_norm(source: ir.Node, node: ir.Node) -> ir.Node:
    kept = {name: attribute(source, name) for name in ("kind", "axis", "groups", "epsilon")}
    return make_node("NarrowNorm", source.inputs, {**kept, "narrow": attribute(node, "expression")}, outputs=2)


def _narrow_attention(source: ir.Node, node: ir.Node) -> ir.Node:
    attributes = changed(source, epilogue=attribute(node, "expression"))
    return make_node("NarrowAttention", source.inputs, attributes)


def _put(graph: ir.Graph, made: ir.Node, source: ir.Node, node: ir.Node) -> None:
    """In the place of both; the last output is what was quantized, the first one of two what was not."""
    made.name = source.name
    set_origins(made, merged_origins((source, node)))
    graph.insert_before(source, made)
    for old, new in zip((node, source), reversed(made.outputs), strict=False):
        new.name = old.outputs[0].name
        old.outputs[0].replace_all_uses_with(new)
    for old in (node, source):
        detach(old)

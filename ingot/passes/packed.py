"""Query, key and value of few positions stay in the one product that makes them: for targets whose attention reads them
there. The product writes one tensor, which is faster than three."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ingot.ir.graph import add_constant, constant_of, dtype_of, make_node
from ingot.ir.ops_parallel import with_bias
from ingot.ir.provenance import merged_origins, set_origins
from ingot.ir.shapes import shape_of
from ingot.passes.facts import attribute, is_op, maker, only_reader
from ingot.passes.rewrite import detach

_MOST = 128  # positions; of more, others' attention is faster than ours
_DEPTHS = (16, 32, 64, 128)
_TYPES = ("float16", "bfloat16")
_HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True, eq=False)
class Part:
    """Heads [B, H, S, D] of one output of a ParallelLinear, and the nodes between both."""

    product: ir.Node
    index: int
    heads: int
    depth: int
    between: tuple[ir.Node, ...]


def pack_heads(model: ir.Model) -> int:
    """Attention(*heads(ParallelLinear(x))) => PackedAttention(Linear(x)); the number of nodes that went."""
    before = len(model.graph)
    for node in list(model.graph):
        if is_op(node, "Attention", "NarrowAttention"):
            parts = [part for value in node.inputs[:3] if (part := _part(value)) is not None]
            if len(parts) == 3 and _alike(parts):
                _pack(model.graph, node, parts)
    return before - len(model.graph)


def _part(value: ir.Value | None) -> Part | None:
    transpose = maker(value, "Transpose")
    view = None if transpose is None else maker(transpose.inputs[0], "View")
    source = None if view is None else view.inputs[0]
    product = None if source is None else source.producer()
    if transpose is None or view is None or source is None or product is None or not is_op(product, "ParallelLinear"):
        return None
    split, whole = shape_of(view.outputs[0]), shape_of(source)
    if attribute(transpose, "perm") != _HEADS_FIRST or split is None or whole is None or len(split) != 4:
        return None
    alone = all(only_reader(v) is not None for v in (source, view.outputs[0], transpose.outputs[0]))
    _, length, heads, depth = split
    few = isinstance(length, int) and length <= _MOST and isinstance(heads, int) and depth in _DEPTHS
    if not alone or not few or split[:2] != whole[:-1] or dtype_of(source) not in _TYPES:
        return None
    return Part(product, int(source.index() or 0), int(heads), int(depth), (transpose, view))


def _alike(parts: list[Part]) -> bool:
    """Whether they are all that one product makes."""
    query, key, value = parts
    same = all(part.product is query.product and part.depth == query.depth for part in parts)
    return (same and len(query.product.outputs) == 3 and len({part.index for part in parts}) == 3
            and key.heads == value.heads and query.heads % key.heads == 0)  # fmt: skip


def _pack(graph: ir.Graph, node: ir.Node, parts: list[Part]) -> None:
    source = parts[0].product
    weight, bias = (constant_of(value) for value in source.inputs[1:3])
    assert weight is not None and bias is not None
    starts = np.cumsum([0, *attribute(source, "sizes")])
    columns = np.concatenate([np.arange(starts[part.index], starts[part.index + 1]) for part in parts])
    held = [add_constant(graph, array, source.name) for array in (weight[:, columns], bias[columns])]
    epilogue = with_bias(attribute(source, "scale"), dtype_of(source.outputs[0]))
    product = make_node("Linear", (source.inputs[0], *held), {"epilogue": epilogue})
    kept = {name: attribute(node, name) for name in ("scale", "causal", "softcap")}
    after = attribute(node, "epilogue") if node.op_type == "NarrowAttention" else ""
    sizes = {"heads": parts[0].heads, "groups": parts[1].heads, "epilogue": after}
    attention = make_node("PackedAttention", (product.outputs[0], *node.inputs[3:]), {**kept, **sizes})
    for made, old in ((product, source), (attention, node)):
        made.name = old.name
        set_origins(made, merged_origins((old,)))
        graph.insert_before(old, made)
    node.outputs[0].replace_all_uses_with(attention.outputs[0])
    attention.outputs[0].name = node.outputs[0].name
    for old in (node, *(between for part in parts for between in part.between), source):
        detach(old)

"""Feature maps in bfloat16 between the convolutions of a network, where the processor multiplies bfloat16 by tiles.

Maps are most of what large batches move: half the bytes. Networks some of whose nodes would have to convert back and
forth stay as they are; so do the model's inputs, and everything behind the last map.
"""

from __future__ import annotations

import onnx_ir as ir

from ingot.ir.graph import attributes, constant_of, dtype_name, is_canonical
from ingot.precision.half import Scope

_GROUP = 32  # channels that a row of a tile holds
_TAKEN = frozenset({"Pool", "Pointwise", "Concat"})


def scope_of(graph: ir.Graph) -> Scope | None:
    """What to narrow; None where nothing is gained."""
    opens, closes, between = set(), set(), set()
    for node in graph:
        if not any(_is_map(value) for value in (*node.inputs, *node.outputs)):
            continue
        if _is_first(node):
            opens.add(node)
        elif _reduces(node):
            closes.add(node)
        elif _between(node):
            between.add(node)
        else:
            return None
    if not any(node.op_type == "Conv" for node in between):
        return None
    taken = opens | closes | between
    return Scope(lambda node: node in taken, frozenset(opens), frozenset(closes))


def _is_map(value: ir.Value | None) -> bool:
    there = value is not None and value.shape is not None and value.const_value is None
    return there and len(value.shape) == 4 and dtype_name(value.dtype) == "float32"  # type: ignore[union-attr,arg-type]


def _is_first(node: ir.Node) -> bool:
    """A convolution of the model's input."""
    value = node.inputs[0]
    return node.op_type == "Conv" and value is not None and value.is_graph_input()


def _reduces(node: ir.Node) -> bool:
    """A reduction over all of a map."""
    return is_canonical(node) and node.op_type == "Reduce" and sorted(a % 4 for a in attributes(node)["axes"]) == [2, 3]


def _between(node: ir.Node) -> bool:
    """Nodes with code for maps of bfloat16 that is as good as for float32."""
    if not is_canonical(node) or any(value.is_graph_output() for value in node.outputs):
        return False
    if any(value is not None and value.is_graph_input() for value in node.inputs):
        return False
    return node.op_type in _TAKEN or (node.op_type == "Conv" and _fills_tiles(node))


def _fills_tiles(node: ir.Node) -> bool:
    weight = constant_of(node.inputs[1])
    if weight is None or weight.ndim != 4 or attributes(node)["group"] != 1:
        return False
    return weight.shape[1] % _GROUP == 0 and weight.shape[0] % _GROUP == 0

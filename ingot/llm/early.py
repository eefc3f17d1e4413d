"""Launches of one row that let those behind them begin at once, where all products stream float8 weights by blocks that
stay on their processor: what waits there asks for its weights meanwhile.

Blocks that come and go take processors from those they wait for: a step of bfloat16 took 4.18 ms so on an H200 in the
place of 3.73, where one of float8 came from 2.36 to 2.11.
"""

from __future__ import annotations

import onnx_ir as ir

from ingot.ir.graph import dtype_name

_PRODUCTS = frozenset({"Projection", "QuantizedProjection", "Mixture"})
_HINTED = frozenset({"Projection", "CacheUpdate", "PagedAttention", "Gather"})


def begin_early(model: ir.Model) -> bool:
    """Sets `early` of the step's products, of updates of the cache and attention between them, and of what picks rows,
    in place, if all weights are float8; whether they are."""
    products = [node for node in model.graph if node.op_type in _PRODUCTS]
    if not products or not all(_streams(node) for node in products):
        return False
    for node in model.graph:
        if node.op_type in _HINTED:
            node.attributes.add(ir.AttrInt64("early", 1))
    return True


def _streams(node: ir.Node) -> bool:
    weight = node.inputs[1]
    return node.op_type == "Projection" and weight is not None and dtype_name(weight.dtype) == "float8_e4m3fn"

"""The cache's update and attention become one operator, which has one launch for a token.

For GPUs where a launch may begin before the one ahead has ended: elsewhere the launch that it saves is all there is to
gain.
"""

from __future__ import annotations

import onnx_ir as ir

from ingot.ir.graph import attributes, dtype_name
from ingot.passes.facts import is_op
from ingot.passes.rewrite import Builder, Journal, Result, Table, reject, rewrite_node

_BYTES = frozenset({"float8_e4m3fn", "int8"})  # pools whose keys are loaded by twos, or have scales
_QUERY_SCALE = 6


def attend_at_once(model: ir.Model) -> int:
    """In place; how many layers."""
    return Table("cached attention", (_cached_attention,)).apply(model.graph, Journal())


@rewrite_node("PagedAttention")
def _cached_attention(op: Builder, node: ir.Node) -> Result:
    """(pool, query) = CacheUpdate(cache, …); PagedAttention(query, pool, …) => CachedAttention(cache, …)"""
    query, pool, positions, owners, tables = node.inputs
    update = query.producer() if query is not None else None
    if query is None or pool is None or update is None or not is_op(update, "CacheUpdate"):
        return reject("the query is not an update's", query)
    if pool.producer() is not update or update.inputs[2] is not positions:
        return reject("the pool is not as the query's update leaves it, or the positions are others", pool)
    if any(len(value.uses()) != 1 or value.is_graph_output() for value in (query, pool)):
        return reject("others read the query or the pool", update)
    if any(value is not None for value in update.inputs[_QUERY_SCALE:]):
        return reject("queries and keys are normalised", update)
    if dtype_name(pool.dtype) in _BYTES:
        return reject("the pool is of eight bits", pool)
    both = attributes(update) | attributes(node)
    _, seen = op.make("CachedAttention", *update.inputs[:4], owners, tables, *update.inputs[4:6], _outputs=2, **both)
    return seen

"""Bytes a node must move and operations it must do: the roofline of every kernel, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable

from ingot.ir.ops_projection import chained
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, add, product


def bytes_of(node: Node) -> Extent:
    """Each input read once, each output written once; of data that is picked from, what is picked."""
    read = [port for port in node.inputs if port is not None]
    if node.op in _PICKING:
        read[0] = node.output
    if node.op in _MIXED:
        return _bytes_of_experts(node)
    if node.op in _POOLED:
        return product((_POOLED[node.op], node.outputs[-1].bytes))
    total: Extent = 0
    for port in (*read, *node.outputs):
        total = add(total, port.bytes)
    return add(total, -_unused_bits(node))


def _bytes_of_experts(node: Node) -> Extent:
    """Weights of as many experts as are chosen, if they are all different ones, and the rest as it is."""
    experts = node.input(1).shape[1]
    assert isinstance(experts, int)
    weights = sum(int(port.bytes) for port in node.inputs[2:5] if port is not None)
    chosen = product((node.input(1).shape[0], int(node.attributes["chosen"])))
    some = min(chosen, experts) if isinstance(chosen, int) else f"min({chosen},{experts})"
    total = product((some, weights // experts))
    for port in (*node.inputs[:2], *node.inputs[5:], *node.outputs):
        total = add(total, port.bytes) if port is not None else total
    return total


def _unused_bits(node: Node) -> int:
    """Bytes that weights of fewer than eight bits are packed into less by."""
    if node.op not in ("QuantizedLinear", "QuantizedProjection"):
        return 0
    weights = node.input(1).bytes
    assert isinstance(weights, int)
    return weights * (8 - int(node.attributes["bits"])) // 8


# Of a pool what the tokens are, not the pool: in terms of the queries' bytes, for a few hundred tokens of context.
_POOLED = {"CacheUpdate": 4, "PagedAttention": 64, "CachedAttention": 68}
_MIXED = frozenset({"Experts", "Mixture"})
_PICKING = frozenset({"Gather", "GatherElements", "GatherND", "Slice"})


def flops_of(node: Node) -> Extent:
    """Multiplications and additions of the op itself; elementwise work counts one per instruction and element."""
    main = _TABLE[node.op](node) if node.op in _TABLE else 0
    extra = len(node.epilogue.instructions)
    return add(main, product((extra, node.output.elements))) if extra else main


def _linear(node: Node) -> Extent:
    return product((2, node.output.elements, node.input(0).shape[-1]))


def _matmul(node: Node) -> Extent:
    shape = node.input(0).shape
    inner = shape[-1] if not node.attributes.get("transpose_a") or len(shape) < 2 else shape[-2]
    return product((2, node.output.elements, inner))


def _conv(node: Node) -> Extent:
    weight = node.input(1).shape
    return product((2, node.output.elements, *weight[1:]))


def _parallel_conv(node: Node) -> Extent:
    y = node.output.shape
    return product((2, *node.input(1).shape, y[0], *y[2:]))


def _conv_transpose(node: Node) -> Extent:
    weight = node.input(1).shape
    return product((2, node.input(0).elements, *weight[1:]))


def _attention(node: Node) -> Extent:
    query, key, value = node.input(0).shape, node.input(1).shape, node.input(2).shape
    return product((2, *query[:3], key[2], add(query[3], value[3])))


def _packed_attention(node: Node) -> Extent:
    return product((4, node.output.elements, node.input(0).shape[1]))


def _recurrent(node: Node) -> Extent:
    x, weight, recurrent = node.input(0).shape, node.input(1).shape, node.input(2).shape
    return product((2, x[0], x[1], weight[0], weight[1], add(weight[2], recurrent[2])))


def _parallel_linear(node: Node) -> Extent:
    return product((2, *node.input(0).shape, node.input(1).shape[1]))


def _projection(node: Node) -> Extent:
    return product((2, node.input(0).elements, node.input(1).shape[1]))


def _projection_chain(node: Node) -> Extent:
    weights = sum(int(node.input(link.weight).elements) for link in chained(node.attributes))
    return product((2, *node.input(0).shape[:-1], weights))


def _experts(node: Node) -> Extent:
    chosen, inner = int(node.attributes["chosen"]), node.input(2).shape[2]
    return product((6, node.input(0).elements, chosen, inner))


_TABLE: dict[str, Callable[[Node], Extent]] = {
    "Projection": _projection,
    "QuantizedProjection": _projection,
    "ProjectionChain": _projection_chain,
    "Experts": _experts,
    "Mixture": _experts,
    "Linear": _linear,
    "ParallelLinear": _parallel_linear,
    "GatedLinear": _parallel_linear,
    "LinearNorm": _linear,
    "QuantizedLinear": _linear,
    "MatMul": _matmul,
    "Conv": _conv,
    "ParallelConv": _parallel_conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
    "NarrowAttention": _attention,
    "PackedAttention": _packed_attention,
    "RNN": _recurrent,
}

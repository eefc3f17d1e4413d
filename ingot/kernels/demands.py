"""Extents a node takes to be equal although the graph has two expressions for them.

Inferring shapes believes that they are; the runtime checks it before a kernel relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce

from ingot.ir.ops import definition
from ingot.ir.ops_table import normal_extent
from ingot.ir.symbolic import translated
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, add, product

Pair = tuple[Extent, Extent]
Shape = Sequence[Extent]


def demands_of(node: Node) -> tuple[Pair, ...]:
    """Pairs of extents that must be equal whenever the node runs; those that are equal for any sizes are left out."""
    ports = [port for port in (*node.inputs, *node.outputs) if port is not None]
    if all(port.static for port in ports):
        return ()
    pairs = dict.fromkeys((*_TABLE.get(node.op, _nothing)(node), *_extras(node)))
    return tuple((a, b) for a, b in pairs if a != b and _normal(a) != _normal(b))


def _normal(extent: Extent) -> Extent | None:
    return extent if isinstance(extent, int) else translated(extent)


def _nothing(node: Node) -> Iterator[Pair]:
    yield from ()


def _broadcast(shape: Shape, wanted: Shape) -> Iterator[Pair]:
    """An operand has the result's extents, but for those it states to be 1."""
    aligned = wanted[len(wanted) - len(shape) :]
    yield from ((size, extent) for size, extent in zip(shape, aligned, strict=False) if size != 1)


def _operands(node: Node) -> Iterator[Pair]:
    for port in node.inputs:
        if port is not None:
            yield from _broadcast(port.shape, node.output.shape)


def _extras(node: Node) -> Iterator[Pair]:
    """Operands of the epilogue beside the result."""
    entry = definition(node.op) if node.op != "Reorder" else None
    for port in node.inputs[len(entry.inputs) :] if entry and entry.epilogue else ():
        if port is not None:
            yield from _broadcast(port.shape, node.output.shape)


def _linear(node: Node) -> Iterator[Pair]:
    yield node.input(0).shape[-1], node.input(1).shape[0]


def _matmul(node: Node) -> Iterator[Pair]:
    a, b, result = node.input(0).shape, node.input(1).shape, node.output.shape
    yield a[-2 if node.attributes.get("transpose_a") else -1], b[-1 if node.attributes.get("transpose_b") else -2]
    for shape in (a, b):
        yield from _broadcast(shape[:-2], result[:-2])


def _conv(node: Node) -> Iterator[Pair]:
    yield node.input(0).shape[1], product((node.input(1).shape[1], int(node.attributes.get("group", 1))))


def _conv_transpose(node: Node) -> Iterator[Pair]:
    yield node.input(0).shape[1], node.input(1).shape[0]


def _attention(node: Node) -> Iterator[Pair]:
    query, key, value = (node.input(index).shape for index in range(3))
    yield from ((query[0], key[0]), (query[3], key[3]), (key[0], value[0]), (key[1], value[1]), (key[2], value[2]))
    if node.has_input(3):
        yield from _broadcast(node.input(3).shape, (*query[:3], key[2]))


def _concat(node: Node) -> Iterator[Pair]:
    axis = int(node.attributes["axis"]) % len(node.output.shape)
    for port in node.inputs:
        if port is not None:
            pairs = enumerate(zip(port.shape, node.output.shape, strict=True))
            yield from (pair for dim, pair in pairs if dim != axis)


def _split(node: Node) -> Iterator[Pair]:
    axis = int(node.attributes["axis"])
    yield node.input(0).shape[axis], reduce(add, map(normal_extent, node.attributes["sizes"]))


def _view(node: Node) -> Iterator[Pair]:
    yield product(node.input(0).shape), product(node.output.shape)


def _norm(node: Node) -> Iterator[Pair]:
    x, channels = node.input(0).shape, node.attributes["kind"] in ("instance", "group")
    for index in (1, 2):
        if node.has_input(index):
            yield from _broadcast(node.input(index).shape, x[1:2] if channels else x)


def _scatter_elements(node: Node) -> Iterator[Pair]:
    yield from zip(node.input(1).shape, node.input(2).shape, strict=True)


def _scatter_nd(node: Node) -> Iterator[Pair]:
    data, indices, updates = (node.input(index).shape for index in range(3))
    depth = indices[-1]
    if isinstance(depth, int):
        yield from zip((*indices[:-1], *data[depth:]), updates, strict=True)


def _recurrent(node: Node) -> Iterator[Pair]:
    batch = node.input(0).shape[1]
    batches: dict[int, Callable[[Port], Extent]] = {4: _first, 5: _second, 6: _second}
    yield from ((pick(node.input(index)), batch) for index, pick in batches.items() if node.has_input(index))


def _first(port: Port) -> Extent:
    return port.shape[0]


def _second(port: Port) -> Extent:
    return port.shape[1]


_TABLE: dict[str, Callable[[Node], Iterator[Pair]]] = {
    "Pointwise": _operands,
    "Expand": _operands,
    "Linear": _linear,
    "ParallelLinear": _linear,
    "GatedLinear": _linear,
    "LinearNorm": _linear,
    "QuantizedLinear": _linear,
    "MatMul": _matmul,
    "Conv": _conv,
    "ParallelConv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
    "NarrowAttention": _attention,
    "Concat": _concat,
    "Split": _split,
    "View": _view,
    "Norm": _norm,
    "NarrowNorm": _norm,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "RNN": _recurrent,
}

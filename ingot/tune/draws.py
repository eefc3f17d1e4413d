"""Numbers for a candidate on a GPU, whose results are compared as it is timed: each operand must show in them.

Drawn from one range, as `measure.draw` does, a convolution of 3,000 products hides its bias and its residual in what
roundings may be, and attention hides which key belongs to which value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.ir.ops_projection import chained
from ingot.kernels.node import Node, Port
from ingot.runtime.buffers import Array
from ingot.tune.measure import draw, with_drawn_weights

_WEIGHT = 3.0  # times the root of the depth's inverse: sums of products are of order one
_SCORED = 3.0  # of queries and keys: some scores stand out
_LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}  # quantized numbers have their whole range: scales expect it
_INTEGERS = (1, 4)  # inputs that are weights and zeros of fewer bits than their type
_DRAWN = 1 << 20  # numbers; more repeat themselves
Depth = Callable[[Node], int]


def _all_but(axis: int) -> Depth:
    """The product of a weight's other extents."""

    def depth(node: Node) -> int:
        return max(math.prod(int(n) for n in node.input(1).shape) // max(int(node.input(1).shape[axis]), 1), 1)

    return depth


# How far the numbers of an operator's inputs are from nothing, on both sides; other inputs are positive.
_PRODUCTS: Mapping[str, Depth] = {"Conv": _all_but(0), "ParallelConv": _all_but(0), "ConvTranspose": _all_but(1),
                                  "Linear": _all_but(-1), "ParallelLinear": _all_but(-1),
                                  "LinearNorm": _all_but(-1), "GatedLinear": _all_but(-1),
                                  "Projection": _all_but(-1),
                                  "MatMul": lambda node: int(node.input(0).shape[-1])}  # fmt: skip


def reaches(node: Node) -> Mapping[int, float]:
    """By input."""
    if node.op in ("Attention", "NarrowAttention"):
        return {0: _SCORED, 1: _SCORED, 2: 1.0}
    if node.op == "PackedAttention":
        return {0: _SCORED}
    if node.op == "ProjectionChain":
        depths = {k: int(node.input(k).shape[0]) for k in _scaling(node)}
        return {0: 1.0} | {k: _WEIGHT / math.sqrt(depth) for k, depth in depths.items()}
    if node.op in _PRODUCTS:
        return {0: 1.0, 1: _WEIGHT / math.sqrt(_PRODUCTS[node.op](node))}
    return {}


def _scaling(node: Node) -> Mapping[int, Sequence[int]]:
    """Of a projection's weights the inputs that the expression behind them reads: scales of columns are among those."""
    if node.op == "ProjectionChain":
        return {link.weight: [k for k in link.operands if k >= 0] for link in chained(node.attributes)}
    return {1: range(3, len(node.inputs))} if node.op == "Projection" else {}


def with_weights(node: Node) -> Node:
    """The node with weights in the places that `measure.without_weights` emptied."""
    return with_drawn_weights(node, number)


def feeds(node: Node) -> list[Array | None]:
    """What a run is given: nothing for what is absent or constant."""
    return [None if p is None or p.constant is not None else number(node, k) for k, p in enumerate(node.inputs)]


def number(node: Node, index: int) -> Array:
    """Numbers for an input."""
    port, known = node.input(index), reaches(node)
    dtype: np.dtype[Any] = numpy_dtype(port.dtype)
    if node.op == "QuantizedProjection" and index in _INTEGERS:
        return _of_bits(port, int(node.attributes["bits"]))
    if index not in known or (dtype.kind in "iub" and dtype.name not in _LARGEST):
        return draw(port)
    shape, reach = tuple(int(n) for n in port.shape), _LARGEST.get(dtype.name, known[index])
    if dtype.kind not in "iub" and any(_left_out(node, k) for k in _scaling(node).get(index, ())):
        reach = known[index]  # their scales are drawn too, and of order one
    some = np.random.default_rng(index + 1).uniform(-reach, reach, min(math.prod(shape), _DRAWN))
    return np.resize(some.astype(np.float32).astype(dtype), shape)


def _left_out(node: Node, index: int) -> bool:
    """Whether the input is a constant that `measure.without_weights` emptied."""
    port = node.inputs[index]
    return port is not None and port.constant is not None and port.constant.shape != port.shape


def _of_bits(port: Port, bits: int) -> Array:
    """All integers of so many bits, with a sign where the type has one."""
    shape, whole = tuple(int(n) for n in port.shape), 1 << bits
    some = np.random.default_rng(bits).integers(0, whole, min(math.prod(shape), _DRAWN))
    return np.resize((some - (whole // 2 if port.dtype == "int8" else 0)).astype(numpy_dtype(port.dtype)), shape)

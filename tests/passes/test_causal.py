"""Masks that are causal whatever the size, and those that only look like it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from examples.writer import Shape
from tests.passes.support import Net, Rewritten, rewritten_same
from tests.passes.test_fuse_attention import context, scores

H, D = 4, 8
LOWEST = float(np.finfo(np.float32).min)
Inputs = dict[str, tuple[str, Shape]]
Write = Callable[[Net], str]
QKV: Inputs = dict.fromkeys("qkv", ("float32", ("N", H, "S", D)))


def length(net: Net) -> str:
    return net.node("Gather", net.node("Shape", "q"), net.constant([2], "int64"))


def square(net: Net, fill: str) -> str:
    return net.node("Expand", fill, net.node("Concat", length(net), length(net), axis=0))


def lower(net: Net, fill: float | bool, dtype: str, upper: int = 0, diagonal: int = 0) -> str:
    ones = square(net, net.constant([[fill]], dtype))
    return net.node("Trilu", ones, net.constant(diagonal, "int64"), upper=upper)


def places(net: Net) -> tuple[str, str]:
    """Numbers of the queries as a column, of the keys as a row."""
    count = net.node("Squeeze", length(net), net.constant([0], "int64"))
    steps = net.node("Range", net.constant(0, "int64"), count, net.constant(1, "int64"))
    return tuple(net.node("Unsqueeze", steps, net.constant([axis], "int64")) for axis in (1, 0))  # type: ignore[return-value]


def compared(net: Net, op: str, swapped: bool = False) -> str:
    column, row = places(net)
    return net.node(op, row, column) if swapped else net.node(op, column, row)


def added(net: Net, mask: str) -> str:
    return net.node("Add", scores(net), mask)


def seen(net: Net, condition: str, fill: float = LOWEST) -> str:
    return net.node("Where", condition, scores(net), net.constant(fill))


def hidden(net: Net, condition: str, fill: float = LOWEST) -> str:
    return net.node("Where", condition, net.constant(fill), scores(net))


def table(net: Net, start: int = 0) -> str:
    """The buffer of GPT-2: a triangle for the longest text, cut to the length."""
    triangle = net.weight("triangle", np.tri(32, dtype=bool)[None, None])
    end = net.node("Add", length(net), net.constant([start], "int64"))
    ends = net.node("Concat", end, length(net), axis=0)
    return net.node("Slice", triangle, net.constant([start, 0], "int64"), ends, net.constant([2, 3], "int64"))


CAUSAL: dict[str, Write] = {
    "lower triangle of truths": lambda net: seen(net, lower(net, True, "bool")),
    "lower triangle, -inf": lambda net: seen(net, lower(net, True, "bool"), -np.inf),
    "upper triangle of truths": lambda net: hidden(net, lower(net, True, "bool", 1, 1)),
    "upper triangle added": lambda net: added(net, lower(net, LOWEST, "float32", 1, 1)),
    "query >= key": lambda net: seen(net, compared(net, "GreaterOrEqual")),
    "key <= query": lambda net: seen(net, compared(net, "LessOrEqual", swapped=True)),
    "key > query hidden": lambda net: hidden(net, compared(net, "Greater", swapped=True)),
    "query < key hidden": lambda net: hidden(net, compared(net, "Less")),
    "not query < key": lambda net: seen(net, net.node("Not", compared(net, "Less"))),
    "cut from a table": lambda net: seen(net, table(net)),
    "one axis more": lambda net: seen(
        net, net.node("Unsqueeze", lower(net, True, "bool"), net.constant([0, 1], "int64"))),
    "a product with the lowest number": lambda net: added(
        net, net.node("Mul", net.node("Cast", compared(net, "Less"), to=1), net.constant(LOWEST))),
}  # fmt: skip


def attended(write: Write) -> Rewritten:
    net = Net()
    return rewritten_same(net, QKV, context(net, write(net)), N=2, S=5)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str) -> None:
    result = attended(CAUSAL[name])
    assert result.operators == {"Attention": 1}
    assert result.only("Attention").attributes["causal"].value == 1


OTHERS: dict[str, Write] = {
    "the query's own key is hidden": lambda net: seen(net, compared(net, "Greater")),
    "the next key is seen too": lambda net: seen(net, lower(net, True, "bool", 0, 1)),
    "the other triangle": lambda net: seen(net, compared(net, "LessOrEqual")),
    "a window": lambda net: seen(
        net, net.node("And", compared(net, "GreaterOrEqual"), lower(net, True, "bool", 1, -2))),
    "not forbidden enough": lambda net: added(net, lower(net, -3.0, "float32", 1, 1)),
    "what is seen is raised": lambda net: added(
        net, net.node("Where", compared(net, "GreaterOrEqual"), net.constant(1.0), net.constant(LOWEST))),
    "cut from the middle of a table": lambda net: seen(net, table(net, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_not_causal(name: str) -> None:
    result = attended(OTHERS[name])
    node = result.only("Attention")
    assert node.attributes["causal"].value == 0 and len(node.inputs) == 4


def test_a_padding_mask_as_well_stays_a_mask() -> None:
    net = Net()
    both = net.node("And", lower(net, True, "bool"), "mask")
    inputs: Inputs = {**QKV, "mask": ("bool", ("N", 1, 1, "S"))}
    result = rewritten_same(net, inputs, context(net, seen(net, both)), N=2, S=5)
    assert result.only("Attention").attributes["causal"].value == 0


@pytest.mark.parametrize(("queries", "keys", "causal"), [(5, 5, 1), (3, 5, 1), (5, 3, 0), (1, 5, 0)])
def test_constant_triangles_stand_at_the_last_key(queries: int, keys: int, causal: int) -> None:
    """With fewer keys than queries the first see none: then the lowest number is not the same as nothing."""
    net = Net()
    mask = np.where(np.tri(queries, keys, keys - queries, dtype=bool), 0, LOWEST).astype(np.float32)
    inputs: Inputs = {"q": ("float32", (2, H, queries, D)), **dict.fromkeys("kv", ("float32", (2, H, keys, D)))}
    result = rewritten_same(net, inputs, context(net, added(net, net.weight("mask", mask))))
    assert result.only("Attention").attributes["causal"].value == causal

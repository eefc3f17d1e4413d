"""Pads taken into convolutions and pools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from examples.writer import Shape
from tests.passes.support import Net, Rewritten, rewritten_same

X: dict[str, tuple[str, Shape]] = {"x": ("float32", (2, 3, 7, 6))}
LOWEST = float("-inf")


def padded(net: Net, pads: list[int], value: float = 0.0, mode: str = "constant") -> str:
    return net.node("Pad", "x", net.constant(pads, "int64"), net.constant(value), mode=mode)


def conv(net: Net, x: str, **given: Any) -> str:
    return net.node("Conv", x, net.draw(4, 3, 3, 3), **given)


def pool(net: Net, op: str, x: str, **given: Any) -> str:
    return net.node(op, x, kernel_shape=[3, 3], **given)


SPATIAL = [0, 0, 1, 2, 0, 0, 1, 0]


@pytest.mark.parametrize("own", [[0, 0, 0, 0], [1, 0, 1, 1]])
def test_pads_go_into_conv(own: list[int]) -> None:
    net = Net()
    result = rewritten_same(net, X, conv(net, padded(net, SPATIAL), pads=own, strides=[2, 1]))
    assert result.operators == {"Conv": 1} and result.fired("padded conv") == 1
    assert result.only("Conv").attributes["pads"].value == tuple(np.add(own, [1, 2, 1, 0]))


@pytest.mark.parametrize(
    ("op", "value", "counted"), [("MaxPool", LOWEST, 0), ("AveragePool", 0.0, 1)],
)  # fmt: skip
def test_pads_go_into_pools(op: str, value: float, counted: int) -> None:
    net = Net()
    result = rewritten_same(net, X, pool(net, op, padded(net, SPATIAL, value)))
    assert result.operators == {"Pool": 1} and result.fired("padded pool") == 1
    assert result.only("Pool").attributes["count_include_pad"].value == counted


def refused(result: Rewritten, name: str, reason: str) -> bool:
    return not result.fired(name) and any(reason in said for said in result.reasons(name))


@pytest.mark.parametrize(
    ("pads", "value", "mode", "reason"),
    [(SPATIAL, 1.0, "constant", "another value"), (SPATIAL, 0.0, "reflect", "not constant over the spatial"),
     ([0, 0, 1, 1, 1, 0, 1, 1], 0.0, "constant", "not constant over the spatial")],
)  # fmt: skip
def test_pads_that_conv_cannot_take(pads: list[int], value: float, mode: str, reason: str) -> None:
    net = Net()
    result = rewritten_same(net, X, conv(net, padded(net, pads, value, mode)))
    assert refused(result, "padded conv", reason)


@pytest.mark.parametrize(
    ("op", "pads", "value", "given", "reason"),
    [("MaxPool", SPATIAL, 0.0, {}, "do not add up"),
     ("AveragePool", SPATIAL, 0.0, {"pads": [1, 1, 1, 1]}, "do not add up"),
     ("MaxPool", [0, 0, 3, 0, 0, 0, 0, 0], LOWEST, {}, "wholly in the border"),
     ("AveragePool", [0, 1, 0, 0, 0, 0, 0, 0], 0.0, {}, "not constant over the spatial")],
)  # fmt: skip
def test_pads_that_a_pool_cannot_take(
    op: str, pads: list[int], value: float, given: dict[str, Any], reason: str
) -> None:
    net = Net()
    result = rewritten_same(net, X, pool(net, op, padded(net, pads, value), **given))
    assert refused(result, "padded pool", reason)


def test_a_border_used_elsewhere_is_still_taken_in() -> None:
    """The pads cost the convolution nothing, and it need not wait for the copy."""
    net = Net()
    x = padded(net, SPATIAL)
    result = rewritten_same(net, X, conv(net, x), net.node("Relu", x))
    assert result.fired("padded conv") == 1 and result.operators == {"Pad": 1, "Conv": 1, "Pointwise": 1}
    assert result.only("Conv").inputs[0] is result.after.graph.inputs[0]


def test_a_depthwise_separable_block_is_two_convolutions() -> None:
    net = Net()
    deep = net.node("Conv", padded(net, SPATIAL), net.draw(3, 1, 3, 3), group=3)
    low, high = net.constant(0.0), net.constant(6.0)
    wide = net.node("Conv", net.node("Clip", deep, low, high), net.draw(8, 3, 1, 1), net.draw(8))
    result = rewritten_same(net, X, net.node("Clip", wide, low, high))
    assert result.operators == {"Conv": 2}

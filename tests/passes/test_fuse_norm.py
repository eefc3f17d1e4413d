"""Norms from primitives, with what may stand between and after."""

from __future__ import annotations

import numpy as np
import pytest

from examples.writer import Shape
from tests.passes.support import Net, rewritten_same

SEQUENCE: dict[str, tuple[str, Shape]] = {"x": ("float32", ("N", 5, 16))}
IMAGE: dict[str, tuple[str, Shape]] = {"x": ("float32", (2, 8, 4, 6))}


def mean(net: Net, x: str, axes: list[int], keepdims: int = 1) -> str:
    return net.node("ReduceMean", x, net.constant(axes, "int64"), keepdims=keepdims)


def deviation(net: Net, variance: str, epsilon: float = 1e-5) -> str:
    return net.node("Sqrt", net.node("Add", variance, net.constant(epsilon)))


def layer(net: Net, square: str = "pow", division: str = "div", axes: tuple[int, ...] = (-1,)) -> str:
    centred = net.node("Sub", "x", mean(net, "x", list(axes)))
    squares = net.node("Pow", centred, net.constant(2.0)) if square == "pow" else net.node("Mul", centred, centred)
    variance = mean(net, squares, list(axes))
    if division == "power":
        shifted = net.node("Add", variance, net.constant(1e-5))
        return net.node("Mul", centred, net.node("Pow", shifted, net.constant(-0.5)))
    if division == "reciprocal":
        return net.node("Mul", net.node("Reciprocal", deviation(net, variance)), centred)
    return net.node("Div", centred, deviation(net, variance))


def rms(net: Net, division: str = "div") -> str:
    root = deviation(net, mean(net, net.node("Pow", "x", net.constant(2.0)), [-1]), 1e-6)
    return net.node("Div", "x", root) if division == "div" else net.node("Mul", "x", net.node("Reciprocal", root))


def affine(net: Net, value: str, *shape: int, bias: bool = True) -> str:
    scaled = net.node("Mul", value, net.draw(*shape))
    return net.node("Add", net.draw(*shape), scaled) if bias else scaled


@pytest.mark.parametrize("square", ["pow", "mul"])
@pytest.mark.parametrize("division", ["div", "reciprocal", "power"])
def test_layer_norm(square: str, division: str) -> None:
    net = Net()
    result = rewritten_same(net, SEQUENCE, affine(net, layer(net, square, division), 16), N=3)
    assert result.operators == {"Norm": 1}
    node = result.only("Norm")
    assert (node.attributes["kind"].value, node.attributes["axis"].value) == ("layer", 2)
    assert len(node.inputs) == 3 and node.attributes["epilogue"].value == ""
    assert [result.fired(name) for name in ("layer norm", "norm scale", "norm bias")] == [1, 1, 1]


def test_layer_norm_over_two_axes() -> None:
    net = Net()
    result = rewritten_same(net, SEQUENCE, affine(net, layer(net, axes=(1, 2)), 5, 16), N=2)
    assert result.only("Norm").attributes["axis"].value == 1 and len(result.nodes) == 1


@pytest.mark.parametrize("division", ["div", "reciprocal"])
def test_rms_norm(division: str) -> None:
    net = Net()
    result = rewritten_same(net, SEQUENCE, affine(net, rms(net, division), 16, bias=False), N=3)
    assert result.operators == {"Norm": 1} and result.only("Norm").attributes["kind"].value == "rms"
    assert len(result.only("Norm").inputs) == 2


def test_a_residual_after_the_norm_is_its_epilogue() -> None:
    net = Net()
    result = rewritten_same(net, SEQUENCE, net.node("Add", affine(net, layer(net), 16), "x"), N=2)
    assert result.operators == {"Norm": 1}
    assert result.only("Norm").attributes["epilogue"].value == "Add %0 %1 -> float32"


def test_a_mean_over_a_middle_axis_is_no_norm() -> None:
    net = Net()
    result = rewritten_same(net, SEQUENCE, layer(net, axes=(1,)), N=2)
    assert not result.fired("layer norm")
    assert any("not the last ones" in reason for reason in result.reasons("layer norm"))


def test_a_centre_over_another_axis_leaves_an_rms_norm() -> None:
    net = Net()
    centred = net.node("Sub", "x", mean(net, "x", [-1]))
    variance = mean(net, net.node("Mul", centred, centred), [1, 2])
    result = rewritten_same(net, SEQUENCE, net.node("Div", centred, deviation(net, variance)), N=2)
    assert not result.fired("layer norm") and result.fired("rms norm") == 1


def test_a_variance_used_elsewhere_keeps_the_primitives() -> None:
    net = Net()
    centred = net.node("Sub", "x", mean(net, "x", [-1]))
    variance = mean(net, net.node("Mul", centred, centred), [-1])
    y = net.node("Div", centred, deviation(net, variance))
    result = rewritten_same(net, SEQUENCE, y, variance, N=2)
    assert not result.fired("layer norm") and any("used elsewhere" in r for r in result.reasons("layer norm"))


def test_a_scale_that_varies_is_an_epilogue() -> None:
    net = Net()
    inputs = {**SEQUENCE, "scale": ("float32", (16,))}
    result = rewritten_same(net, inputs, net.node("Mul", layer(net), "scale"), N=2)
    assert result.operators == {"Norm": 1} and result.only("Norm").attributes["epilogue"].value
    assert any("varies at run time" in reason for reason in result.reasons("norm scale"))


def test_instance_norm_from_primitives() -> None:
    net = Net()
    result = rewritten_same(net, IMAGE, affine(net, layer(net, axes=(2, 3)), 8, 1, 1))
    node = result.only("Norm")
    assert node.attributes["kind"].value == "instance" and len(node.inputs) == 3 and len(result.nodes) == 1


def grouped(net: Net, groups: int, ones: float = 1.0) -> str:
    """Group norm as exporters before opset 18 write it."""
    view = net.node("Reshape", "x", net.constant([0, groups, -1], "int64"))
    scale, bias = net.constant([ones] * groups), net.constant([0.0] * groups)
    normal = net.node("InstanceNormalization", view, scale, bias, epsilon=1e-5)
    return net.node("Reshape", normal, net.constant([2, 8, 4, 6], "int64"))


def test_group_norm() -> None:
    net = Net()
    result = rewritten_same(net, IMAGE, affine(net, grouped(net, 4), 8, 1, 1))
    node = result.only("Norm")
    assert (node.attributes["kind"].value, node.attributes["groups"].value) == ("group", 4)
    assert len(node.inputs) == 3 and len(result.nodes) == 1


def test_a_scale_inside_the_groups_is_no_group_norm() -> None:
    net = Net()
    result = rewritten_same(net, IMAGE, grouped(net, 4, ones=2.0))
    assert not result.fired("group norm") and result.operators["View"] == 2
    assert any("scale or bias of its own" in reason for reason in result.reasons("group norm"))


def test_groups_that_mix_samples_are_no_group_norm() -> None:
    net = Net()
    view = net.node("Reshape", "x", net.constant([4, 4, -1], "int64"))
    normal = net.node("InstanceNormalization", view, net.constant([1.0] * 4), net.constant([0.0] * 4))
    result = rewritten_same(net, IMAGE, net.node("Reshape", normal, net.constant([2, 8, 4, 6], "int64")))
    assert not result.fired("group norm")


def test_the_epsilon_is_kept() -> None:
    net = Net()
    result = rewritten_same(net, SEQUENCE, rms(net), N=2)
    assert np.isclose(result.only("Norm").attributes["epsilon"].value, 1e-6)

"""Linear from products, scales and biases in weights, views that meet."""

from __future__ import annotations

import re

import numpy as np
import pytest

from examples.writer import Shape
from tests.passes.support import Net, Rewritten, rewritten_same

Inputs = dict[str, tuple[str, Shape]]
X: Inputs = {"x": ("float32", ("N", 5, 8))}
IMAGE: Inputs = {"x": ("float32", (2, 6, 7, 7))}


def product(net: Net, x: str = "x", inner: int = 8, outer: int = 6) -> str:
    return net.node("MatMul", x, net.draw(inner, outer))


def epilogue(result: Rewritten, op: str) -> str:
    return str(result.only(op).attributes["epilogue"].value)


# Linear


@pytest.mark.parametrize("bias", [(6,), (1, 6), (1, 1, 6)])
def test_a_product_and_a_bias(bias: tuple[int, ...]) -> None:
    net = Net()
    result = rewritten_same(net, X, net.node("Add", net.draw(*bias), product(net)), N=3)
    assert result.operators == {"Linear": 1} and epilogue(result, "Linear") == "Add %1 %0 -> float32"


def test_a_product_and_one_number() -> None:
    net = Net()
    result = rewritten_same(net, X, net.node("Add", product(net), net.draw(1)), N=3)
    assert result.operators == {"Linear": 1} and re.fullmatch(r"Add %0 [\d.]+ -> float32", epilogue(result, "Linear"))


def test_a_transposed_constant() -> None:
    net = Net()
    weight = net.node("Transpose", net.draw(6, 8), perm=[1, 0])
    result = rewritten_same(net, X, net.node("MatMul", "x", weight), N=3)
    assert result.operators == {"Linear": 1}


def test_gemm() -> None:
    net = Net()
    y = net.node("Gemm", "x", net.draw(6, 8), net.draw(6), transB=1, alpha=0.5, beta=2.0)
    result = rewritten_same(net, {"x": ("float32", ("N", 8))}, y, N=3)
    assert result.operators == {"Linear": 1} and epilogue(result, "Linear") == "Add %0 %1 -> float32"


def test_a_constant_with_leading_ones() -> None:
    net = Net()
    result = rewritten_same(net, X, net.node("MatMul", "x", net.draw(1, 8, 6)), N=3)
    assert result.operators == {"Linear": 1} and result.fired("linear") == 1


def test_several_constant_matrices_stay_a_matmul() -> None:
    net = Net()
    result = rewritten_same(net, {"x": ("float32", (3, 5, 8))}, net.node("MatMul", "x", net.draw(3, 8, 6)))
    assert result.operators == {"MatMul": 1}
    assert result.reasons("linear")[0].startswith("the constant is no single matrix")


def test_two_inputs_stay_a_matmul() -> None:
    net = Net()
    inputs: Inputs = {**X, "y": ("float32", (8, 6))}
    assert rewritten_same(net, inputs, net.node("MatMul", "x", "y"), N=2).operators == {"MatMul": 1}


# scales after


def batch_norm(net: Net, x: str, channels: int) -> str:
    parameters = [net.draw(channels) for _ in range(3)]
    variance = net.weight("variance", net.random.uniform(0.5, 1.5, channels).astype(np.float32))
    return net.node("BatchNormalization", x, *parameters, variance)


def conv(net: Net, x: str = "x", group: int = 1, outputs: int = 12, bias: bool = False, **given: object) -> str:
    operands = [net.draw(outputs, 6 // group, 3, 3)] + ([net.draw(outputs)] if bias else [])
    return net.node("Conv", x, *operands, group=group, **given)


@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_goes_into_conv(group: int, bias: bool) -> None:
    net = Net()
    y = net.node("Relu", batch_norm(net, conv(net, group=group, bias=bias, pads=[1] * 4), 12))
    result = rewritten_same(net, IMAGE, y)
    assert result.operators == {"Conv": 1} and result.fired("scaled weight") == 1
    assert epilogue(result, "Conv") == "Add %0 %1 -> float32; Relu $0 -> float32"


def test_batch_norm_goes_into_conv_transpose() -> None:
    net = Net()
    y = batch_norm(net, net.node("ConvTranspose", "x", net.draw(6, 4, 3, 3), strides=[2, 2]), 4)
    result = rewritten_same(net, IMAGE, y)
    assert result.operators == {"ConvTranspose": 1} and result.fired("scaled weight") == 1


def test_a_grouped_conv_transpose_keeps_its_scale() -> None:
    net = Net()
    y = batch_norm(net, net.node("ConvTranspose", "x", net.draw(6, 4, 3, 3), group=2), 8)
    result = rewritten_same(net, IMAGE, y)
    assert not result.fired("scaled weight") and result.operators == {"ConvTranspose": 1}
    assert result.reasons("scaled weight") == ["a grouped ConvTranspose keeps its scale"]


def test_batch_norm_after_a_product() -> None:
    net = Net()
    inputs: Inputs = {"x": ("float32", ("N", 8))}
    result = rewritten_same(net, inputs, batch_norm(net, product(net), 6), N=3)
    assert result.operators == {"Linear": 1} and epilogue(result, "Linear") == "Add %0 %1 -> float32"


def test_numbers_and_vectors_in_a_row_become_one_bias() -> None:
    net = Net()
    y = net.node("Div", product(net), net.constant(4.0))
    y = net.node("Sub", net.draw(6), net.node("Neg", net.node("Add", y, net.draw(6))))
    result = rewritten_same(net, X, net.node("Relu", y), N=3)
    assert epilogue(result, "Linear") == "Add %0 %1 -> float32; Relu $0 -> float32"


def test_a_scale_after_an_activation_stays() -> None:
    net = Net()
    result = rewritten_same(net, X, net.node("Mul", net.node("Relu", product(net)), net.draw(6)), N=3)
    assert epilogue(result, "Linear") == "Relu %0 -> float32; Mul $0 %1 -> float32"
    assert not result.fired("scaled weight")


def test_a_scale_that_varies_stays() -> None:
    net = Net()
    inputs: Inputs = {**X, "scale": ("float32", (6,))}
    result = rewritten_same(net, inputs, net.node("Mul", product(net), "scale"), N=3)
    assert epilogue(result, "Linear") == "Mul %0 %1 -> float32" and not result.fired("scaled weight")


def test_a_weight_shared_by_two_products_is_scaled_once() -> None:
    net = Net()
    weight = net.draw(8, 6)
    plain, scaled = net.node("MatMul", "x", weight), net.node("Mul", net.node("MatMul", "z", weight), net.draw(6))
    result = rewritten_same(net, {**X, "z": ("float32", ("N", 8))}, plain, scaled, N=3)
    assert result.operators == {"Linear": 2} and result.fired("scaled weight") == 1


# scales before


@pytest.mark.parametrize("group", [1, 2])
def test_a_scaled_input(group: int) -> None:
    net = Net()
    x = net.node("Mul", "x", net.draw(6, 1, 1))
    result = rewritten_same(net, IMAGE, conv(net, x, group, pads=[1] * 4))
    assert result.operators == {"Conv": 1} and result.fired("scaled input") == 1


@pytest.mark.parametrize("group", [1, 2, 6])
def test_a_normalised_input_without_padding(group: int) -> None:
    net = Net()
    x = net.node("Div", net.node("Sub", "x", net.draw(1, 6, 1, 1)), net.draw(1, 6, 1, 1))
    result = rewritten_same(net, IMAGE, conv(net, x, group, bias=True), rtol=1e-3)
    assert result.operators == {"Conv": 1} and epilogue(result, "Conv") == "Add %0 %1 -> float32"


def test_a_shifted_input_with_padding_stays() -> None:
    net = Net()
    x = net.node("Sub", "x", net.draw(1, 6, 1, 1))
    result = rewritten_same(net, IMAGE, conv(net, x, pads=[1] * 4))
    assert result.operators == {"Pointwise": 1, "Conv": 1}
    assert any("padded with zeros" in reason for reason in result.reasons("scaled input"))


def test_a_normalised_input_of_a_product() -> None:
    net = Net()
    x = net.node("Add", net.node("Mul", "x", net.draw(8)), net.draw(8))
    result = rewritten_same(net, X, product(net, x), N=3)
    assert result.operators == {"Linear": 1} and result.fired("scaled input") == 1


def test_a_scaled_input_used_elsewhere_stays() -> None:
    net = Net()
    x = net.node("Mul", "x", net.draw(8))
    result = rewritten_same(net, X, product(net, x), x, N=3)
    assert result.operators == {"Pointwise": 1, "Linear": 1}
    assert any("used elsewhere" in reason for reason in result.reasons("scaled input"))


# views


def flattened(net: Net, residual: bool = False) -> str:
    """Reshape to [N*5, 8], product, bias, reshape back: what exporters make of a layer on three axes."""
    flat = net.node("Reshape", "x", net.constant([-1, 8], "int64"))
    y = net.node("Add", product(net, flat), net.draw(1, 6))
    y = net.node("Add", y, net.node("Reshape", "z", net.constant([-1, 6], "int64"))) if residual else y
    return net.node("Reshape", y, net.constant([-1, 5, 6], "int64"))


def test_views_of_the_batch_meet() -> None:
    net = Net()
    y = net.node("Relu", net.node("Add", flattened(net), "z"))
    result = rewritten_same(net, {**X, "z": ("float32", ("N", 5, 6))}, y, N=3)
    assert result.operators == {"Linear": 1} and result.fired("view above linear") == 1


def test_views_around_a_residual_stay() -> None:
    net = Net()
    result = rewritten_same(net, {**X, "z": ("float32", ("N", 5, 6))}, flattened(net, residual=True), N=3)
    assert result.operators["Linear"] == 1 and result.operators["View"] >= 1


def test_views_used_elsewhere_stay() -> None:
    net = Net()
    flat = net.node("Reshape", "x", net.constant([-1, 8], "int64"))
    y = product(net, flat)
    result = rewritten_same(net, X, net.node("Reshape", y, net.constant([-1, 5, 6], "int64")), y, N=3)
    assert result.operators == {"View": 2, "Linear": 1}
    assert any("used elsewhere" in reason for reason in result.reasons("view above linear"))

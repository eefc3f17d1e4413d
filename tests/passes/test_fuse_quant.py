"""Models with QuantizeLinear and DequantizeLinear run in integers, where that computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from examples.writer import Shape
from tests.passes.support import Net, Rewritten, rewritten_same

Inputs = dict[str, tuple[str, Shape]]
X: Inputs = {"x": ("uint8", (2, 4, 6, 6))}
ROWS: Inputs = {"x": ("uint8", (5, 8))}
SCALE, ZERO = 0.05, 120


def scalar(net: Net, number: float, dtype: str) -> str:
    return net.constant(number, dtype)


def dq(net: Net, q: str, scale: float = SCALE, zero: int = ZERO, dtype: str = "uint8") -> str:
    return net.node("DequantizeLinear", q, scalar(net, scale, "float32"), scalar(net, zero, dtype))


def q(net: Net, x: str, scale: float = SCALE, zero: int = ZERO, dtype: str = "uint8") -> str:
    return net.node("QuantizeLinear", x, scalar(net, scale, "float32"), scalar(net, zero, dtype))


def weight(net: Net, *shape: int, axis: int | None = None) -> str:
    """8-bit weights with one scale, or one for each element of an axis."""
    values = net.weight(f"q{len(net.weights)}", net.random.integers(-90, 90, shape).astype(np.int8))
    if axis is None:
        return dq(net, values, 0.01, 0, "int8")
    scales = net.constant(net.random.uniform(0.005, 0.02, shape[axis]).astype(np.float32))
    return net.node("DequantizeLinear", values, scales, net.constant([0] * shape[axis], "int8"), axis=axis)


def attributes(result: Rewritten, op: str, *names: str) -> list[Any]:
    return [result.only(op).attributes[name].value for name in names]


@pytest.mark.parametrize("axis", [None, 0])
def test_a_convolution_in_integers(axis: int | None) -> None:
    net = Net()
    y = net.node("Conv", dq(net, "x"), weight(net, 8, 4, 3, 3, axis=axis), net.draw(8), pads=[1] * 4)
    result = rewritten_same(net, X, q(net, net.node("Relu", y), 0.03, 10))
    assert result.operators == {"Conv": 1} and result.fired("integer product") == 1
    assert attributes(result, "Conv", "x_zero_point") == [ZERO]
    assert attributes(result, "Conv", "epilogue")[0].split("; ")[-1].startswith("Quantize")


def test_a_residual_of_integers() -> None:
    net = Net()
    x = dq(net, "x")
    y = net.node("Add", net.node("Conv", x, weight(net, 4, 4, 3, 3), pads=[1] * 4), x)
    result = rewritten_same(net, X, q(net, net.node("Relu", y), 0.1, 3))
    assert result.operators == {"Conv": 1}
    assert [value is not None and value.name for value in result.only("Conv").inputs].count("x") == 2


@pytest.mark.parametrize("axis", [None, 1])
def test_a_product_in_integers(axis: int | None) -> None:
    net = Net()
    y = net.node("Add", net.node("MatMul", dq(net, "x"), weight(net, 8, 6, axis=axis)), net.draw(6))
    result = rewritten_same(net, ROWS, y, rtol=1e-3)
    assert result.operators == {"Linear": 1} and result.only("Linear").inputs[0] is result.after.graph.inputs[0]


def test_two_varying_operands_in_integers() -> None:
    net = Net()
    inputs: Inputs = {**ROWS, "y": ("int8", (8, 3))}
    y = net.node("MatMul", dq(net, "x"), dq(net, "y", 0.02, 5, "int8"))
    result = rewritten_same(net, inputs, y, rtol=1e-3)
    assert result.operators == {"MatMul": 1}
    assert attributes(result, "MatMul", "x_zero_point", "weight_zero_point") == [ZERO, 5]


def test_a_mean_in_integers() -> None:
    net = Net()
    y = net.node("GlobalAveragePool", dq(net, "x"))
    result = rewritten_same(net, X, q(net, y))
    assert result.operators == {"Reduce": 1} and result.fired("integer mean") == 1


def spread(net: Net, x: str) -> str:
    return net.node("Expand", x, net.constant([3, 2, 4, 6, 6], "int64"))


MOVES: dict[str, Callable[[Net, str], str]] = {
    "Transpose": lambda n, x: n.node("Transpose", x, perm=[0, 2, 3, 1]),
    "View": lambda n, x: n.node("Reshape", x, n.constant([2, 144], "int64")),
    "Slice": lambda n, x: n.node("Slice", x, *(n.constant([i], "int64") for i in (1, 4, 2))),
    "Pad": lambda n, x: n.node("Pad", x, n.constant([0, 0, 1, 1, 0, 0, 0, 0], "int64")),
    "Pool": lambda n, x: n.node("MaxPool", x, kernel_shape=[2, 2]),
    "Expand": spread,
    "Reduce": lambda n, x: n.node("ReduceMax", x, n.constant([1], "int64")),
    "Resize": lambda n, x: n.node("Resize", x, "", n.constant([1, 1, 2, 2]), mode="nearest"),
}


@pytest.mark.parametrize("op", MOVES)
def test_moves_of_integers(op: str) -> None:
    net = Net()
    result = rewritten_same(net, X, q(net, MOVES[op](net, dq(net, "x"))))
    assert result.fired("move in integers") == 1 and result.operators == {op: 1}
    assert result.only(op).outputs[0].dtype is not None and result.only(op).outputs[0].dtype.itemsize == 1


def test_a_border_that_no_integer_stands_for_is_written_in_floats() -> None:
    net = Net()
    y = net.node("Pad", dq(net, "x"), net.constant([0, 0, 1, 1, 0, 0, 0, 0], "int64"), net.constant(0.021))
    assert not rewritten_same(net, X, y).fired("move in integers")


def test_an_average_is_not_a_move() -> None:
    net = Net()
    y = net.node("AveragePool", dq(net, "x"), kernel_shape=[2, 2])
    assert not rewritten_same(net, X, y, rtol=1e-3).fired("move in integers")


@pytest.mark.parametrize("alike", [True, False])
def test_parts_joined_in_integers(alike: bool) -> None:
    net = Net()
    parts = [dq(net, "x"), dq(net, "y", SCALE if alike else 0.07)]
    y = net.node("Concat", *parts, axis=1)
    result = rewritten_same(net, {**X, "y": X["x"]}, y)
    assert result.fired("concat in integers") == int(alike)
    assert alike or any("different scales" in said for said in result.reasons("concat in integers"))


def test_quantizing_goes_above_a_move() -> None:
    net = Net()
    y = net.node("Transpose", net.node("Exp", "x"), perm=[1, 0])
    result = rewritten_same(net, {"x": ("float32", (4, 5))}, q(net, y))
    assert result.fired("quantize before move") == 1
    assert [node.op_type for node in result.nodes] == ["Pointwise", "Transpose"]


def test_a_moved_value_used_elsewhere_stays_in_floats() -> None:
    net = Net()
    y = net.node("Transpose", net.node("Exp", "x"), perm=[1, 0])
    result = rewritten_same(net, {"x": ("float32", (4, 5))}, q(net, y), net.node("Tanh", y))
    assert not result.fired("quantize before move")
    assert any("used elsewhere" in said for said in result.reasons("quantize before move"))


def refusal(net: Net, y: str, inputs: Inputs = X) -> list[str]:
    result = rewritten_same(net, inputs, y, rtol=1e-3)
    assert not result.fired("integer product")
    return result.reasons("integer product")


def test_weights_in_floats_keep_the_product_in_floats() -> None:
    net = Net()
    assert any("only one of" in r for r in refusal(net, net.node("Conv", dq(net, "x"), net.draw(8, 4, 3, 3))))


def test_scales_along_the_inputs_keep_the_product_in_floats() -> None:
    net = Net()
    said = refusal(net, net.node("Conv", dq(net, "x"), weight(net, 8, 4, 3, 3, axis=1)))
    assert any("per output" in reason for reason in said)
    net = Net()
    said = refusal(net, net.node("MatMul", dq(net, "x"), weight(net, 8, 6, axis=0)), ROWS)
    assert any("per output" in reason for reason in said)


def test_an_input_with_many_scales_keeps_the_product_in_floats() -> None:
    net = Net()
    scales, zeros = net.constant([0.05, 0.06, 0.07, 0.08]), net.constant([ZERO] * 4, "uint8")
    x = net.node("DequantizeLinear", "x", scales, zeros, axis=1)
    said = refusal(net, net.node("Conv", x, weight(net, 8, 4, 3, 3)))
    assert any("per channel" in reason for reason in said)


def test_an_input_used_elsewhere_is_read_as_integers_by_both() -> None:
    net = Net()
    x = dq(net, "x")
    result = rewritten_same(net, X, net.node("Conv", x, weight(net, 8, 4, 3, 3)), net.node("Tanh", x), rtol=1e-3)
    assert result.operators == {"Conv": 1, "Pointwise": 1}
    assert all(node.inputs[0] is result.after.graph.inputs[0] for node in result.nodes)


def test_quantizing_what_was_just_dequantized_does_nothing() -> None:
    net = Net()
    y = net.node("Conv", dq(net, q(net, dq(net, "x"))), weight(net, 8, 4, 3, 3))
    result = rewritten_same(net, X, y, rtol=1e-3)
    assert result.operators == {"Conv": 1}


def test_scales_disappear_into_the_constants() -> None:
    net = Net()
    y = net.node("Conv", dq(net, "x"), weight(net, 8, 4, 3, 3, axis=0), net.draw(8), pads=[1] * 4)
    result = rewritten_same(net, X, q(net, net.node("Relu", y), 0.03, 0))
    assert result.fired("requantize") == 1
    steps = attributes(result, "Conv", "epilogue")[0].split("; ")
    assert [step.split()[0] for step in steps] == ["Cast", "Mul", "Add", "Quantize"]
    assert steps[-1] == "Quantize $2 1.0 0 -> uint8"


def test_bounds_within_the_integers_stay() -> None:
    net = Net()
    y = net.node("Conv", dq(net, "x"), weight(net, 8, 4, 3, 3))
    result = rewritten_same(net, X, q(net, net.node("Clip", y, net.constant(0.0), net.constant(1.0)), 0.03, 0))
    assert "Min" in attributes(result, "Conv", "epilogue")[0]


def test_a_residual_quantized_on_both_sides_travels_in_bytes() -> None:
    net = Net()
    x = dq(net, "x")
    a = dq(net, q(net, net.node("Conv", x, weight(net, 4, 4, 3, 3), pads=[1] * 4), 0.11, 90), 0.11, 90)
    b = dq(net, q(net, net.node("Conv", x, weight(net, 4, 4, 1, 1)), 0.07, 130), 0.07, 130)
    result = rewritten_same(net, X, q(net, net.node("Add", a, b), 0.1, 100))
    assert result.operators == {"Conv": 2}
    assert all(node.outputs[0].dtype.name == "UINT8" for node in result.after.graph if node.op_type == "Conv")

"""Models whose tensors are quantized to float8 multiply float8, on targets that can."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ingot.ir import ops
from ingot.ir.graph import dtype_of
from tests.passes.support import Net, assert_same, model_of, rewritten

E4M3 = "float8_e4m3fn"


def zero(net: Net, *shape: int) -> str:
    name = f"zero{len(net.weights)}"
    net.weights.append(helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, shape, bytes(int(np.prod(shape))), raw=True))
    return name


def qdq(net: Net, x: str, scale: float = 0.01) -> str:
    parameters = (net.constant(scale, "float32"), zero(net))
    return net.node("DequantizeLinear", net.node("QuantizeLinear", x, *parameters), *parameters)


def weight(net: Net, *shape: int, axis: int) -> str:
    """float8 weights with one scale for each element of an axis."""
    values = net.random.uniform(-400, 400, shape).astype(ml_dtypes.float8_e4m3fn)
    name = f"q{len(net.weights)}"
    net.weights.append(numpy_helper.from_array(values, name))
    scales = net.constant(net.random.uniform(1e-4, 2e-4, shape[axis]).astype(np.float32))
    return net.node("DequantizeLinear", name, scales, zero(net, shape[axis]), axis=axis)


def convolution(net: Net) -> str:
    y = net.node("Conv", qdq(net, "x"), weight(net, 8, 4, 3, 3, axis=0), net.draw(8), pads=[1] * 4)
    return net.node("Relu", y)


def product(net: Net) -> str:
    return net.node("Add", net.node("MatMul", qdq(net, "x"), weight(net, 6, 5, axis=1)), net.draw(5))


def flipped(net: Net) -> str:
    row = net.node("Reshape", net.node("Transpose", qdq(net, "x"), perm=[0, 3, 1, 2]), net.constant([2, -1], "int64"))
    return net.node("Gemm", row, weight(net, 7, 144, axis=0), transB=1)


@pytest.mark.parametrize(("network", "op"), [(convolution, "Conv"), (product, "Linear"), (flipped, "Linear")])
def test_products_of_float8(network: Any, op: str) -> None:
    net = Net()
    model = model_of(net, {"x": ("float32", (2, 4, 6, 6))}, network(net))
    result = rewritten(model, float8=True)
    made = result.only(op)
    assert result.fired("float8 product") == 1
    assert [dtype_of(value) for value in made.inputs[:2] if value is not None] == [E4M3, E4M3]
    assert_same(result)


def test_only_where_the_target_multiplies_them() -> None:
    net = Net()
    result = rewritten(model_of(net, {"x": ("float32", (2, 4, 6, 6))}, product(net)))
    assert dtype_of(result.only("Linear").inputs[1]) == "float32"
    assert_same(result)


def test_one_narrow_operand_is_not_enough() -> None:
    net = Net()
    y = net.node("MatMul", qdq(net, "x"), net.draw(6, 5))
    result = rewritten(model_of(net, {"x": ("float32", (2, 4, 6, 6))}, y), float8=True)
    assert result.reasons("float8 product") == ["only one of its operands is float8"]


def test_sums_are_not_rounded_to_float8() -> None:
    """What an epilogue reads is the sum in float32."""
    x, w = (np.full(shape, 3, ml_dtypes.float8_e4m3fn) for shape in ((1, 64), (64, 1)))
    (y,) = ops.meaning("Linear")(x, w, epilogue="Cast %0 -> float32; Mul $0 1.0 -> float32")
    assert y.dtype == np.float32 and y[0, 0] == 576

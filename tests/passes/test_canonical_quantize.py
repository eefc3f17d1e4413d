"""Quantised operators against the oracle: per tensor, per axis, per block, constant and run-time parameters."""

import numpy as np
import pytest

from ingot.dtypes import numpy_dtype
from tests.passes.canonical_harness import Array, check, check_symbolic, values

TYPES = ("uint8", "int8", "uint16", "int16")


def scale(*numbers: float) -> Array:
    return np.array(numbers if len(numbers) > 1 else numbers[0], np.float32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("constants", [[], [1, 2]])
def test_per_tensor(dtype: str, constants: list[int]) -> None:
    x, zero = values((3, 4)), np.array(3, dtype)
    check("QuantizeLinear", [x, scale(0.03), zero], constants=constants, only={"Pointwise"})
    check("DequantizeLinear", [values((3, 4), dtype), scale(0.03), zero], constants=constants, only={"Pointwise"})
    check("QuantizeLinear", [x, scale(0.03)], version=13)
    check_symbolic("QuantizeLinear", [x, scale(0.03), zero], {0: ["N", 4]}, constants=[1, 2])


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("version", [13, 19, 21, 28])
@pytest.mark.parametrize("constants", [[], [1, 2]])
def test_per_axis(axis: int, version: int, constants: list[int]) -> None:
    x = values((2, 3, 4))
    count = x.shape[axis]
    scales, zeros = values((count,), low=0.01, high=0.1), np.arange(count).astype(np.int8)
    check("QuantizeLinear", [x, scales, zeros], version=version, constants=constants, axis=axis)
    check("DequantizeLinear", [values(x.shape, "int8"), scales, zeros], version=version, constants=constants, axis=axis)


@pytest.mark.parametrize("constants", [[], [1, 2]])
def test_per_block(constants: list[int]) -> None:
    x, scales, zeros = values((2, 6)), values((2, 3), low=0.01, high=0.1), np.arange(6).reshape(2, 3).astype(np.int8)
    check("QuantizeLinear", [x, scales, zeros], constants=constants, axis=1, block_size=2)
    check("DequantizeLinear", [values((2, 6), "int8"), scales, zeros], constants=constants, axis=1, block_size=2)
    check("DequantizeLinear", [values((2, 5), "int8"), scales, zeros], constants=[1, 2], axis=1, block_size=2)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int4", "uint4"])
def test_narrow_types(dtype: str) -> None:
    zero = np.zeros((), numpy_dtype(dtype))
    check("QuantizeLinear", [values((3, 4)), scale(0.3), zero], constants=[1, 2])
    check("DequantizeLinear", [values((3, 4)).astype(zero.dtype), scale(0.3), zero], constants=[1, 2])


def test_half_precision() -> None:
    x, half = values((3, 4), "float16"), np.array(0.03, np.float16)
    check("QuantizeLinear", [x, half, np.array(3, np.uint8)], constants=[1, 2])
    check("DequantizeLinear", [values((3, 4), "uint8"), half, np.array(3, np.uint8)], constants=[1, 2], rtol=2e-3)


def test_dynamic_quantize() -> None:
    for low, high in ((-2.0, 3.0), (0.5, 1.0), (-3.0, -1.0), (0.0, 1e-9)):
        check("DynamicQuantizeLinear", [values((3, 4), low=low, high=high)], outputs=3)


@pytest.mark.parametrize(("a", "b"), [("uint8", "int8"), ("int8", "int8"), ("uint8", "uint8")])
@pytest.mark.parametrize("constants", [[], [1, 2, 3], [2, 3]])
def test_matmul_integer(a: str, b: str, constants: list[int]) -> None:
    zeros = [np.array(3, a), np.array(2, b)]
    inputs = [values((3, 6), a), values((6, 4), b, seed=1), *zeros]
    model = check("MatMulInteger", inputs, constants=constants)
    kinds = {node.op_type for node in model.graph}
    assert kinds == ({"Linear"} if 1 in constants else {"MatMul"} if constants else {"MatMul", "Pointwise"})
    check("MatMulInteger", inputs[:2], constants=[1])
    rows, columns = np.arange(3).astype(a), np.arange(4).astype(b)
    check("MatMulInteger", [*inputs[:2], rows, columns], constants=constants)
    check("MatMulInteger", [values((2, 3, 6), a), inputs[1], *zeros], constants=constants)


@pytest.mark.parametrize("constants", [[], [1, 2, 3, 4, 5, 6, 7], [3, 4, 5]])
@pytest.mark.parametrize("per_column", [False, True])
def test_qlinear_matmul(constants: list[int], per_column: bool) -> None:
    b_scale = scale(0.02, 0.03, 0.01, 0.05) if per_column else scale(0.02)
    b_zero = np.array([1, 2, 3, 4] if per_column else 2, np.int8)
    a = [values((3, 6), "uint8"), scale(0.05), np.array(3, np.uint8)]
    inputs = [*a, values((6, 4), "int8", seed=1), b_scale, b_zero, scale(0.02), np.array(100, np.uint8)]
    check("QLinearMatMul", inputs, version=10, constants=constants)


@pytest.mark.parametrize("constants", [[], [1, 2, 3]])
def test_conv_integer(constants: list[int]) -> None:
    inputs = [
        values((1, 2, 5, 5), "uint8"),
        values((3, 2, 3, 3), "int8", seed=1),
        np.array(3, np.uint8),
        np.array(1, np.int8),
    ]
    check("ConvInteger", inputs, constants=constants, pads=[1, 1, 1, 1])
    check("ConvInteger", inputs[:2], constants=constants, strides=[2, 2])


@pytest.mark.parametrize("constants", [[], [1, 2, 3, 4, 5, 6, 7, 8]])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_qlinear_conv(constants: list[int], per_channel: bool, bias: bool) -> None:
    weight_scale = scale(0.02, 0.03, 0.01) if per_channel else scale(0.02)
    weight_zero = np.zeros(3 if per_channel else (), np.int8)
    inputs = [values((1, 2, 5, 5), "uint8"), scale(0.05), np.array(3, np.uint8), values((3, 2, 3, 3), "int8", seed=1),
              weight_scale, weight_zero, scale(0.02), np.array(100, np.uint8)]  # fmt: skip
    inputs += [values((3,), "int32", seed=2)] if bias else []
    check("QLinearConv", inputs, version=10, constants=constants, pads=[1, 0, 0, 1], ties=0.05)

"""Quantised operators: QuantizeLinear and DequantizeLinear of every opset, QLinearConv, the integer products."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from onnx.helper import tensor_dtype_to_np_dtype
from onnx.numpy_helper import saturate_cast

from ingot.ir.oracle_ops.convolution import convolve, window
from ingot.ir.oracle_ops.table import MICROSOFT, meaning

_SATURATED = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
_INTEGERS = ("int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32")


def spread(values: np.ndarray, shape: tuple[int, ...], axis: int, block_size: int = 0) -> np.ndarray:
    """Scales or zero points (one, one per slice of `axis`, or one per block along it) broadcastable to `shape`."""
    if values.size == 1:
        return values.reshape(())
    if block_size:
        return np.repeat(values, block_size, axis=axis).take(np.arange(shape[axis]), axis=axis)
    if values.ndim != 1 or shape[axis] != values.size:
        raise ValueError(f"{values.shape} scales do not fit axis {axis} of {shape}")
    sizes = [1] * len(shape)
    sizes[axis] = values.size
    return values.reshape(sizes)


def to_integer(real: np.ndarray, zero: np.ndarray | int, dtype: np.dtype) -> np.ndarray:
    """Round half to even, shift by the zero point, saturate."""
    limits = ml_dtypes.iinfo(dtype) if dtype.name.endswith(("t2", "t4")) else np.iinfo(dtype)
    shifted = np.rint(real).astype(np.float64) + np.asarray(zero).astype(np.float64)
    return np.clip(shifted, int(limits.min), int(limits.max)).astype(np.int64).astype(dtype)


@meaning("QuantizeLinear", since=10)
@meaning("QuantizeLinear", domain=MICROSOFT)
def quantize_linear(x: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None, *, axis: int = 1,
                    saturate: int = 1, block_size: int = 0, output_dtype: int = 0,
                    precision: int = 0) -> np.ndarray:  # fmt: skip
    """y = saturate(round(x / scale) + zero)"""
    dtype = zero.dtype if zero is not None else np.dtype(tensor_dtype_to_np_dtype(output_dtype or 2))
    work = np.dtype(tensor_dtype_to_np_dtype(precision)) if precision else np.result_type(x.dtype, scale.dtype)
    ratio = x.astype(work) / spread(scale, x.shape, axis, block_size).astype(work)
    if dtype.name in _INTEGERS:
        return to_integer(ratio, 0 if zero is None else spread(zero, x.shape, axis, block_size), dtype)
    if saturate and dtype.name in _SATURATED:
        return np.asarray(saturate_cast(ratio, dtype=dtype))
    return ratio.astype(dtype)


@meaning("DequantizeLinear", since=10)
@meaning("DequantizeLinear", domain=MICROSOFT)
def dequantize_linear(x: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None, *, axis: int = 1,
                      block_size: int = 0, output_dtype: int = 0) -> np.ndarray:  # fmt: skip
    """y = (x - zero) * scale, in the scale's type unless `output_dtype` says otherwise"""
    wide = x.astype(np.float32)
    if zero is not None and zero.dtype.name in _INTEGERS:
        wide = wide - spread(zero, x.shape, axis, block_size).astype(np.float32)
    y = wide * spread(scale, x.shape, axis, block_size).astype(np.float32)
    return y.astype(tensor_dtype_to_np_dtype(output_dtype) if output_dtype else scale.dtype)


def _centred(x: np.ndarray, zero: np.ndarray | None, axis: int | None) -> np.ndarray:
    """x - zero, exactly; a vector of zero points runs along `axis`."""
    if zero is None:
        return x.astype(np.float64)
    shift = zero.astype(np.float64)
    if axis is not None and shift.size > 1 and shift.ndim == 1:
        shift = spread(shift, x.shape, axis)
    return x.astype(np.float64) - shift


@meaning("MatMulInteger", since=10)
def matmul_integer(a: np.ndarray, b: np.ndarray, a_zero: np.ndarray | None = None,
                   b_zero: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """int32 product; a's zero points run along its rows, b's along its columns."""
    rows = None if a.ndim == 1 else a.ndim - 2
    return np.matmul(_centred(a, a_zero, rows), _centred(b, b_zero, b.ndim - 1)).astype(np.int32)


@meaning("QLinearMatMul", since=10)
def qlinear_matmul(a: np.ndarray, a_scale: np.ndarray, a_zero: np.ndarray, b: np.ndarray, b_scale: np.ndarray,
                   b_zero: np.ndarray, y_scale: np.ndarray, y_zero: np.ndarray) -> np.ndarray:  # fmt: skip
    rows = a.ndim - 2
    product = np.matmul(_centred(a, a_zero, rows), _centred(b, b_zero, b.ndim - 1))
    left = spread(a_scale, product.shape, rows) if a_scale.ndim < 2 else a_scale
    right = spread(b_scale, product.shape, product.ndim - 1) if b_scale.ndim < 2 else b_scale
    factor = left.astype(np.float64) * right.astype(np.float64) / y_scale.astype(np.float64)
    return to_integer(product * factor, y_zero, y_zero.dtype)


@meaning("QLinearConv", since=10)
def qlinear_conv(x: np.ndarray, x_scale: np.ndarray, x_zero: np.ndarray, weight: np.ndarray, weight_scale: np.ndarray,
                 weight_zero: np.ndarray, y_scale: np.ndarray, y_zero: np.ndarray, bias: np.ndarray | None = None, *,
                 auto_pad: str = "NOTSET", dilations: list[int] | None = None, group: int = 1,
                 kernel_shape: list[int] | None = None, pads: list[int] | None = None,
                 strides: list[int] | None = None) -> np.ndarray:  # fmt: skip
    """Integer convolution with int32 bias, rescaled per output channel."""
    geometry = window(x.shape[2:], weight.shape[2:], strides, dilations, pads, auto_pad)
    product = convolve(_centred(x, x_zero, None), _centred(weight, weight_zero, 0), geometry, group)
    if bias is not None:
        product += bias.astype(np.float64).reshape(-1, *[1] * (x.ndim - 2))
    factor = x_scale.astype(np.float64) * weight_scale.astype(np.float64) / y_scale.astype(np.float64)
    return to_integer(product * spread(factor, product.shape, 1), y_zero, y_zero.dtype)

"""Projection, QuantizedProjection: a product with the norm before it and whatever is made of its columns behind it, as
one operator.

Few rows wait for memory at every launch: norm, product, gate and residual in one go is what a decoded token is fast by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ingot.errors import GraphError
from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_table import Attribute, TensorType, op


def _type(x: TensorType, weight: TensorType, norm: TensorType | None, *operands: TensorType, parts: int, epsilon: float,
          expression: str, early: int = 0) -> TensorType:  # fmt: skip
    depth, width = weight.shape
    if x.shape[-1] != depth or not isinstance(width, int) or width % parts:
        raise GraphError(f"Projection: x {x.shape} and {parts} parts do not fit weight {weight.shape}")
    dtypes = ["float32"] * parts + [operand.dtype for operand in operands]
    dtype = expressions.result_dtype(expressions.parse(expression), dtypes)
    return TensorType(dtype, (*x.shape[:-1], width // parts))


@op("Projection", "x weight norm? *operands", _type, parts=Attribute("int", 1), epsilon=Attribute("float", 1e-6),
    expression=Attribute("expression", ""), early=Attribute("int", 0))  # fmt: skip
def projection(x: Array, weight_KN: Array, norm_K: Array | None = None, *operands: Array, parts: int, epsilon: float,
               expression: str, early: int = 0) -> Array:  # fmt: skip
    """expression(y[..., :N/parts], y[..., N/parts:2N/parts], …, operands) with y = x' @ weight in float32, where x' is
    x / rms(x) * norm if there is a norm, else x. Where weights have eight bits, x' may be rounded to them too, row by
    row with a scale. early: the launches of a step let those behind begin at once, for which blocks that stay pay"""
    rows = normalised(x, norm_K, epsilon)
    return finished(np.matmul(rows, weight_KN.astype(rows.dtype)), operands, parts, expression)


def normalised(x: Array, norm_K: Array | None, epsilon: float) -> Array:
    """x / rms(x) * norm if there is a norm, else x, in the type that it is computed in"""
    rows = wide(x)
    if norm_K is None:
        return rows
    square = np.mean(rows * rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.sqrt(square + rows.dtype.type(epsilon)) * wide(norm_K))


def finished(product: Array, operands: Sequence[Array], parts: int, expression: str) -> Array:
    """expression(the product's columns in `parts`, operands)"""
    columns, text = np.split(product, parts, axis=-1), expressions.parse(expression)
    return np.asarray(expressions.evaluate(text, [*columns, *operands]) if text else columns[0])


def _quantized_type(x: TensorType, weight: TensorType, norm: TensorType | None, scale: TensorType,
                    zero: TensorType | None, *operands: TensorType, parts: int, epsilon: float, expression: str,
                    bits: int, group: int) -> TensorType:  # fmt: skip
    depth, width = weight.shape
    groups = (-(-int(depth) // group), width)
    if scale.shape != groups or (zero is not None and zero.shape != groups):
        raise GraphError(f"QuantizedProjection: scales {scale.shape} are not {groups}, a row per {group} of {depth}")
    return _type(x, weight, norm, *operands, parts=parts, epsilon=epsilon, expression=expression)


@op("QuantizedProjection", "x weight norm? scale zero? *operands", _quantized_type, parts=Attribute("int", 1),
    epsilon=Attribute("float", 1e-6), expression=Attribute("expression", ""), bits=Attribute("int"),
    group=Attribute("int"))  # fmt: skip
def quantized_projection(x: Array, weight_KN: Array, norm_K: Array | None, scale_GN: Array,
                         zero_GN: Array | None = None, *operands: Array, parts: int, epsilon: float, expression: str,
                         bits: int, group: int) -> Array:  # fmt: skip
    """A Projection with the weights (weight[K, N] - zero[K / group, N]) * scale[K / group, N], integers of `bits` bits
    kept as int8 or uint8"""
    of_depth = np.arange(len(weight_KN)) // group
    zeros = np.float32(0) if zero_GN is None else zero_GN.astype(np.float32)[of_depth]
    floats = (weight_KN.astype(np.float32) - zeros) * scale_GN.astype(np.float32)[of_depth]
    rows = normalised(x, norm_K, epsilon)
    return finished(np.matmul(rows, floats.astype(rows.dtype)), operands, parts, expression)

"""Pointwise, Linear, LinearNorm, QuantizedLinear and MatMul."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.errors import GraphError
from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_table import EPILOGUE, Attribute, TensorType, broadcast, infer, meaning, op

ZERO_POINT = Attribute("int", 0)
SHORT_INTEGERS = ("int8", "uint8")


def accumulator(dtype: str) -> str:
    """Nominal type of a sum of products: int32 for 8-bit integers; floats are summed in float32 at least."""
    return "int32" if dtype in SHORT_INTEGERS else dtype


def centred(x: Array, zero_point: int) -> Array:
    """x - zero_point in a type whose products are exact: float64 for 8-bit integers, else as `wide`."""
    if x.dtype.name in SHORT_INTEGERS:
        return x.astype(np.float64) - zero_point
    return wide(x) - wide(x).dtype.type(zero_point) if zero_point else wide(x)


def summed(product: Array, dtype: str) -> Array:
    """A product of centred operands in the accumulator's type."""
    return product.astype(np.int64).astype(np.int32) if dtype in SHORT_INTEGERS else product


def _pointwise_type(*operands: TensorType, expression: str) -> TensorType:
    parsed = expressions.parse(expression)
    dtype = expressions.result_dtype(parsed, [operand.dtype for operand in operands])
    return TensorType(dtype, broadcast(*(operand.shape for operand in operands)))


@op("Pointwise", "*operands", _pointwise_type, expression=Attribute("expression"))
def pointwise(*operands: Array, expression: str) -> Array:
    """expression(operands), broadcast to their common shape"""
    result = expressions.evaluate(expressions.parse(expression), operands)
    return np.asarray(np.broadcast_to(result, np.broadcast_shapes(*(x.shape for x in operands))), order="C")


def _linear_type(x: TensorType, weight: TensorType, **_: Any) -> TensorType:
    depth, width = weight.shape
    if isinstance(x.shape[-1], int) and x.shape[-1] != depth:
        raise GraphError(f"Linear: x {x.shape} does not fit weight {weight.shape}")
    return TensorType(accumulator(x.dtype), (*x.shape[:-1], width))


@op("Linear", "x weight *extras", _linear_type, x_zero_point=ZERO_POINT, weight_zero_point=ZERO_POINT,
    epilogue=EPILOGUE)  # fmt: skip
def linear(x: Array, weight_KN: Array, *, x_zero_point: int, weight_zero_point: int) -> Array:
    """(x[..., K] - x_zero_point) @ (weight[K, N] - weight_zero_point)"""
    product = np.matmul(centred(x, x_zero_point), centred(weight_KN, weight_zero_point))
    return summed(product, x.dtype.name)


def _linear_norm_type(x: TensorType, weight: TensorType, scale: TensorType | None, bias: TensorType | None,
                      *extras: TensorType, inside: str, whole: int, **_: Any) -> tuple[TensorType, ...]:  # fmt: skip
    (made,) = infer("Linear", (x, weight, *extras), {"epilogue": inside})
    return (made, made) if whole else (made,)


@op("LinearNorm", "x weight scale? bias? *extras", _linear_norm_type, inside=Attribute("expression"),
    kind=Attribute("text"), epsilon=Attribute("float", 1e-5), whole=Attribute("int", 0))  # fmt: skip
def linear_norm(x: Array, weight_KN: Array, scale: Array | None, bias: Array | None, *extras: Array, inside: str,
                kind: str, epsilon: float, whole: int) -> tuple[Array, ...]:  # fmt: skip
    """A Norm (layer or rms) of the last axis of a Linear with the epilogue `inside`; with `whole`, also the Linear"""
    settings = {"x_zero_point": 0, "weight_zero_point": 0, "epilogue": inside}
    (made,) = meaning("Linear")(x, weight_KN, *extras, **settings)
    settings = {"kind": kind, "axis": made.ndim - 1, "groups": 1, "epsilon": epsilon, "epilogue": ""}
    (normed,) = meaning("Norm")(made, scale, bias, **settings)
    return (normed, made) if whole else (normed,)


def _quantized_type(x: TensorType, weight: TensorType, scale: TensorType, zero: TensorType | None, *, group: int,
                    **_: Any) -> TensorType:  # fmt: skip
    depth, width = weight.shape
    if isinstance(x.shape[-1], int) and x.shape[-1] != depth:
        raise GraphError(f"QuantizedLinear: x {x.shape} does not fit weight {weight.shape}")
    groups = (-(-int(depth) // group), width)
    if scale.shape != groups or (zero is not None and zero.shape != groups):
        raise GraphError(f"QuantizedLinear: scales {scale.shape} are not {groups}, a row per {group} of {depth}")
    return TensorType(x.dtype, (*x.shape[:-1], width))


@op("QuantizedLinear", "x weight scale zero? *extras", _quantized_type, bits=Attribute("int"), group=Attribute("int"),
    epilogue=EPILOGUE)  # fmt: skip
def quantized_linear(x: Array, weight_KN: Array, scale_GN: Array, zero_GN: Array | None = None, *, bits: int,
                     group: int) -> Array:  # fmt: skip
    """x[..., K] @ ((weight[K, N] - zero[K / group, N]) * scale[K / group, N]), the weights `bits`-bit integers kept as
    int8 or uint8"""
    of_depth = np.arange(len(weight_KN)) // group
    centred_KN = wide(weight_KN.astype(np.float32))
    if zero_GN is not None:
        centred_KN = centred_KN - zero_GN.astype(np.float32)[of_depth]
    return np.matmul(wide(x), centred_KN * scale_GN.astype(np.float32)[of_depth])


def _matmul_type(a: TensorType, b: TensorType, *, transpose_a: int, transpose_b: int, **_: Any) -> TensorType:
    rows, depth = a.shape[-2:][::-1] if transpose_a else a.shape[-2:]
    inner, columns = b.shape[-2:][::-1] if transpose_b else b.shape[-2:]
    if isinstance(depth, int) and isinstance(inner, int) and depth != inner:
        raise GraphError(f"MatMul: a {a.shape} does not fit b {b.shape}")
    return TensorType(accumulator(a.dtype), (*broadcast(a.shape[:-2], b.shape[:-2]), rows, columns))


@op("MatMul", "a b *extras", _matmul_type, transpose_a=Attribute("int", 0), transpose_b=Attribute("int", 0),
    x_zero_point=ZERO_POINT, weight_zero_point=ZERO_POINT, epilogue=EPILOGUE)  # fmt: skip
def matmul(a: Array, b: Array, *, transpose_a: int, transpose_b: int, x_zero_point: int,
           weight_zero_point: int) -> Array:  # fmt: skip
    """(a - x_zero_point) @ (b - weight_zero_point) over the last two axes; transpose_a: a is [..., K, M]"""
    left, right = centred(a, x_zero_point), centred(b, weight_zero_point)
    left = np.swapaxes(left, -1, -2) if transpose_a else left
    right = np.swapaxes(right, -1, -2) if transpose_b else right
    return summed(np.matmul(left, right), a.dtype.name)

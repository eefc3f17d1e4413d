"""Quantise, dequantise and the integer products: accumulators in int32, then one Pointwise or epilogue."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ingot.dtypes import numpy_dtype
from ingot.ir.elementwise import INTEGERS, NARROW_FLOATS, SATURATING
from ingot.ir.graph import constant_of, dtype_of, scalar_value, shape
from ingot.passes.canonical_conv import UNKNOWN_KERNEL, channel_vector, sliding
from ingot.passes.canonical_linear import multiplied
from ingot.passes.canonical_table import MICROSOFT, Builder, Reject, Result, canonical, known, over, reject

EXACT_DEPTH = 258  # sums of this many products of 8-bit integers are exact in float32


@canonical("QuantizeLinear")
@canonical("QuantizeLinear", domain=MICROSOFT)
def quantize(op: Builder) -> Result:
    """Quantize(x, scale, zero point), each of them one number, one a channel or one a block"""
    x, t = op.x(), op.dtype
    axis, block = _placement(op)
    scale = spread(op, op.x(1), axis, block)
    zero = spread(op, op.x(2), axis, block) if op.given(2) else 0
    if isinstance(scale, Reject) or isinstance(zero, Reject):
        return scale if isinstance(scale, Reject) else zero  # type: ignore[return-value]
    saturate = ":saturate=0" if t in SATURATING and not op.attribute("saturate", 1) else ""
    work = _precision(op, dtype_of(x), dtype_of(op.x(1)))
    if work in NARROW_FLOATS:
        return op.pointwise(f"Div %0 %1 -> {work}; Quantize{saturate} $0 1.0 %2 -> {t}", x, scale, zero)
    return op.pointwise(f"Quantize{saturate} %0 %1 %2 -> {t}", op.cast(x, work), op.cast(scale, work), zero)


def _precision(op: Builder, x: str, scale: str) -> str:
    """The type x / scale is computed in."""
    stated = op.attribute("precision", 0)
    if stated:
        return str(ir.DataType(stated).numpy().name)
    return str(np.result_type(numpy_dtype(x), numpy_dtype(scale)).name)


def _placement(op: Builder) -> tuple[int, int]:
    """(axis, block size) of the scales."""
    rank = len(shape(op.x()))
    return int(op.attribute("axis", 1)) % max(rank, 1), int(op.attribute("block_size", 0))


def spread(op: Builder, values: ir.Value, axis: int, block: int) -> ir.Value | Reject:
    """Scales or zero points so that they broadcast against x."""
    own, sizes = shape(values), shape(op.x())
    if all(size == 1 for size in own):
        return op.view(values, [])
    if not block:
        return op.view(values, [own[0], *([1] * (len(sizes) - 1 - axis))])
    array, whole = constant_of(values), sizes[axis]
    if array is not None and isinstance(whole, int):
        return op.constant(np.repeat(array, block, axis).take(np.arange(whole), axis), values)
    if over(whole, block) != own[axis] or not isinstance(whole, int) or whole % block:
        return reject("its last block is partial or its size symbolic", "make the scales constants")
    column = op.view(values, [*own[: axis + 1], 1, *own[axis + 1 :]])
    return op.view(op.expand(column, [*own[: axis + 1], block, *own[axis + 1 :]]), sizes)


@canonical("DequantizeLinear")
@canonical("DequantizeLinear", domain=MICROSOFT)
def dequantize(op: Builder) -> Result:
    """Dequantize(x, scale, zero point)"""
    axis, block = _placement(op)
    scale = spread(op, op.x(1), axis, block)
    zero = spread(op, op.x(2), axis, block) if op.given(2) else 0
    if isinstance(scale, Reject) or isinstance(zero, Reject):
        return scale if isinstance(scale, Reject) else zero  # type: ignore[return-value]
    return op.pointwise(f"Dequantize %0 %1 %2 -> {op.dtype}", op.x(), scale, zero)


@canonical("DynamicQuantizeLinear")
def dynamic_quantize(op: Builder) -> Result:
    """Scale and zero point from the largest and smallest element, 0 included"""
    axes = list(range(len(shape(op.x()))))
    high, low = (op.Reduce(op.x(), kind=kind, axes=axes, keepdims=0) for kind in ("max", "min"))
    f = "float32"
    scale = op.pointwise(
        f"Max %0 0.0 -> {f}; Min %1 0.0 -> {f}; Sub $0 $1 -> {f}; Equal $2 0.0 -> bool; Where $3 1.0 $2 -> {f}; "
        f"Div $4 255.0 -> {f}",
        high, low,
    )  # fmt: skip
    text = f"Min %0 0.0 -> {f}; Neg $0 -> {f}; Div $1 %1 -> {f}; Quantize $2 1.0 0 -> uint8"
    zero = op.pointwise(text, low, scale)
    return op.pointwise("Quantize %0 %1 %2 -> uint8", op.x(), scale, zero), scale, zero


# products


def zero_point(value: ir.Value | None) -> int | None:
    """One zero point for all elements; None where it varies or differs along an axis."""
    if value is None:
        return 0
    array = constant_of(value)
    if array is None or not array.size or (array != array.reshape(-1)[0]).any():
        return None
    return int(array.reshape(-1)[0])


def integer_product(op: Builder, a: ir.Value, b: ir.Value, a_zero: ir.Value | None,
                    b_zero: ir.Value | None) -> ir.Value | Reject:  # fmt: skip
    """(a - a_zero) @ (b - b_zero), int32, or float32 holding exact integers where the zero points are not constant."""
    zeros = zero_point(a_zero), zero_point(b_zero)
    if zeros[0] is not None and zeros[1] is not None and min(len(shape(a)), len(shape(b))) >= 2:
        weight = constant_of(b)
        settings = {"x_zero_point": zeros[0], "weight_zero_point": zeros[1]}
        result: ir.Value
        if weight is not None and weight.ndim == 2:
            result = op.Linear(a, b, **settings)
        else:
            result = op.MatMul(a, b, **settings)
        return result
    depth = shape(a)[-1]
    if not isinstance(depth, int) or depth > EXACT_DEPTH:
        return reject("its zero points are not constant", "make the zero points constants")
    rows = None if a_zero is None else _column(op, a_zero, rank=len(shape(a)))
    return multiplied(op, _centred(op, a, rows), _centred(op, b, b_zero))


def _column(op: Builder, vector: ir.Value, rank: int) -> ir.Value:
    """Zero points of a's rows as a column."""
    if len(shape(vector)) != 1 or rank == 1 or shape(vector) == (1,):
        return vector
    return op.view(vector, [*shape(vector), 1])


def _centred(op: Builder, x: ir.Value, zero: ir.Value | None) -> ir.Value:
    """x - zero as float32."""
    if zero is None:
        return op.cast(x, "float32")
    return op.pointwise("Cast %0 -> float32; Cast %1 -> float32; Sub $0 $1 -> float32", x, zero)


@canonical("MatMulInteger")
def matmul_integer(op: Builder) -> Result:
    """Linear or MatMul with zero points"""
    product = integer_product(op, op.x(0), op.x(1), op.optional(2), op.optional(3))
    return product if isinstance(product, Reject) else op.cast(product, "int32")


@canonical("QLinearMatMul")
def qlinear_matmul(op: Builder) -> Result:
    """Quantize(product * a_scale * b_scale, y_scale, y_zero)"""
    a, b, a_scale, b_scale = op.x(0), op.x(3), op.x(1), op.x(4)
    if dtype_of(a) not in INTEGERS:
        return reject(f"its operands are {dtype_of(a)}", "use QuantizeLinear, DequantizeLinear and MatMul")
    product = integer_product(op, a, b, op.x(2), op.x(5))
    if isinstance(product, Reject):
        return product
    f = "float32"
    text = (
        f"Cast %0 -> {f}; Cast %1 -> {f}; Cast %2 -> {f}; Mul $1 $2 -> {f}; Mul $0 $3 -> {f}; Cast %3 -> {f}; "
        f"Quantize $4 $5 %4 -> {op.dtype}"
    )
    return op.pointwise(text, product, _column(op, a_scale, len(shape(a))), b_scale, op.x(6), op.x(7))


def integer_conv(op: Builder, x: ir.Value, weight: ir.Value, x_zero: ir.Value | None,
                 weight_zero: ir.Value | None) -> ir.Value | Reject:  # fmt: skip
    """Conv with zero points; padding counts as the zero point."""
    sizes = known(shape(weight)[1:])
    window = UNKNOWN_KERNEL if sizes is None else sliding(op, shape(x)[2:], sizes[1:])
    if isinstance(window, Reject) or sizes is None:
        return UNKNOWN_KERNEL if sizes is None else window  # type: ignore[return-value]
    settings = {"strides": window.strides, "pads": window.pads, "dilations": window.dilations,
                "group": op.attribute("group", 1)}  # fmt: skip
    zeros = zero_point(x_zero), zero_point(weight_zero)
    result: ir.Value
    if zeros[0] is not None and zeros[1] is not None:
        result = op.Conv(x, weight, x_zero_point=zeros[0], weight_zero_point=zeros[1], **settings)
        return result
    if np.prod(sizes) > EXACT_DEPTH:
        return reject("its zero points are not constant", "make the zero points constants")
    if weight_zero is not None and len(shape(weight_zero)) == 1 and shape(weight_zero) != (1,):
        weight_zero = op.view(weight_zero, [shape(weight_zero)[0], *([1] * (len(shape(weight)) - 1))])
    result = op.Conv(_centred(op, x, x_zero), _centred(op, weight, weight_zero), **settings)
    return result


@canonical("ConvInteger")
def conv_integer(op: Builder) -> Result:
    """Conv with zero points, int32"""
    product = integer_conv(op, op.x(0), op.x(1), op.optional(2), op.optional(3))
    return product if isinstance(product, Reject) else op.cast(product, "int32")


@canonical("QLinearConv")
def qlinear_conv(op: Builder) -> Result:
    """Quantize((conv + bias) * x_scale * weight_scale, y_scale, y_zero)"""
    product = integer_conv(op, op.x(0), op.x(3), op.x(2), op.x(5))
    if isinstance(product, Reject):
        return product
    scale, f = op.x(4), "float32"
    scale = channel_vector(op, scale, op.x(0)) if scalar_value(scale) is None and len(shape(scale)) == 1 else scale
    acc = dtype_of(product)
    operands = [product, op.x(1), scale, op.x(6), op.x(7)]
    start = "%0"
    prefix = ""
    if op.given(8):
        operands.append(op.cast(channel_vector(op, op.x(8), op.x(0)), acc))
        prefix, start = f"Add %0 %5 -> {acc}; ", "$0"
    shift = 1 if prefix else 0
    text = (
        f"{prefix}Cast {start} -> {f}; Mul %1 %2 -> {f}; Mul ${shift} ${shift + 1} -> {f}; "
        f"Quantize ${shift + 2} %3 %4 -> {op.dtype}"
    )
    return op.pointwise(text, *operands)

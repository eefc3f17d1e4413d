"""Normalisations become Norm, or Reduce and Pointwise where Norm does not say it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ingot.dtypes import numpy_dtype
from ingot.ir.elementwise import NARROW_FLOATS
from ingot.ir.graph import constant_of, dtype_of, shape
from ingot.passes.canonical_table import (
    MICROSOFT,
    Builder,
    Result,
    axis_of,
    canonical,
    known,
    normal_axes,
    over,
    reject,
)
from ingot.plan.extent import product


@canonical("BatchNormalization")
def batch_norm(op: Builder) -> Result:
    """x * (scale / deviation) + (bias - mean * scale / deviation), along the channels"""
    if op.attribute("training_mode", 0) or any(op.used(index) for index in range(1, len(op.node.outputs))):
        return reject("it is in training mode", "export the model for inference (training_mode=0)")
    if op.attribute("spatial", 1) != 1:
        return reject("it normalises every element by itself (spatial=0)", "use spatial=1")
    epsilon, t, rank = float(op.attribute("epsilon", 1e-5)), op.dtype, len(shape(op.x()))
    arrays = [op.constant_input(index) for index in range(1, 5)]
    column = [-1, *([1] * (rank - 2))]
    if all(array is not None for array in arrays):
        scale, bias, mean, variance = (np.asarray(array, np.float64) for array in arrays)
        factor = scale / np.sqrt(variance + epsilon)
        kind = numpy_dtype(dtype_of(op.x()))
        constants = [op.constant(v.reshape(column).astype(kind), op.x(1)) for v in (factor, bias - mean * factor)]
        return op.pointwise(f"Mul %0 %1 -> {t}; Add $0 %2 -> {t}", op.x(), *constants)
    parts = [op.cast(op.view(op.x(index), [shape(op.x(index))[0], *column[1:]]), t) for index in range(1, 5)]
    return op.pointwise(
        f"Sub %0 %3 -> {t}; Add %4 {epsilon} -> {t}; Sqrt $1 -> {t}; Div $0 $2 -> {t}; Mul $3 %1 -> {t}; "
        f"Add $4 %2 -> {t}",
        op.x(), *parts,
    )  # fmt: skip


@canonical("InstanceNormalization")
def instance_norm(op: Builder) -> Result:
    """Norm of kind instance"""
    return op.Norm(op.x(), op.x(1), op.x(2), kind="instance", epsilon=op.attribute("epsilon", 1e-5))


@canonical("GroupNormalization")
def group_norm(op: Builder) -> Result:
    """Norm of kind group; before opset 21 scale and bias are per group"""
    groups, channels = int(op.attribute("num_groups")), shape(op.x())[1]
    scale, bias = (per_channel(op, op.x(index), channels) for index in (1, 2))
    return op.Norm(op.x(), scale, bias, kind="group", groups=groups, epsilon=op.attribute("epsilon", 1e-5))


def per_channel(op: Builder, vector: ir.Value, channels: int | str) -> ir.Value:
    """A value per group repeated for the group's channels."""
    if shape(vector)[0] == channels:
        return vector
    repeats = over(channels, shape(vector)[0])
    array = constant_of(vector)
    if array is not None and isinstance(repeats, int):
        return op.constant(np.repeat(array, repeats), vector)
    column = op.view(vector, [shape(vector)[0], 1])
    return op.view(op.expand(column, [shape(vector)[0], repeats]), [channels])


@canonical("LayerNormalization")
def layer_norm(op: Builder) -> Result:
    """Norm of kind layer; mean and deviation as reductions where they are read"""
    x, rank, epsilon = op.x(), len(shape(op.x())), op.attribute("epsilon", 1e-5)
    axis = axis_of(op, -1, rank)
    scale, bias = affine(op, x, op.optional(1), axis), affine(op, x, op.optional(2), axis)
    y = op.Norm(x, scale, bias, kind="layer", axis=axis, epsilon=epsilon)
    return (y, *moments(op, x, axis, float(epsilon)))


def moments(op: Builder, x: ir.Value, axis: int, epsilon: float) -> tuple[ir.Value | None, ir.Value | None]:
    """Mean and 1 / deviation over the axes from `axis` on, as far as outputs 1 and 2 are read."""
    if not op.used(1) and not op.used(2):
        return None, None
    t = dtype_of(op.node.outputs[1] if op.used(1) else op.node.outputs[2])
    axes, wide = list(range(axis, len(shape(x)))), op.cast(x, t)
    mean = op.Reduce(wide, kind="mean", axes=axes)
    if not op.used(2):
        return mean, None
    squares = op.pointwise(f"Sub %0 %1 -> {t}; Mul $0 $0 -> {t}", wide, mean)
    variance = op.Reduce(squares, kind="mean", axes=axes)
    return mean, op.pointwise(f"Add %0 {epsilon} -> {t}; Sqrt $0 -> {t}; Reciprocal $1 -> {t}", variance)


def affine(op: Builder, x: ir.Value, vector: ir.Value | None, axis: int) -> ir.Value | None:
    """Scale or bias in the shape of the normalised axes and the type of x."""
    if vector is None:
        return None
    wanted = shape(x)[axis:]
    array = constant_of(vector)
    sizes = known(wanted)
    if array is not None and sizes is not None and (array.shape != tuple(sizes) or dtype_of(vector) != dtype_of(x)):
        return op.constant(np.broadcast_to(array, sizes).astype(numpy_dtype(dtype_of(x))), vector)
    vector = op.cast(vector, dtype_of(x))
    own = shape(vector)
    if len(own) > len(wanted):
        vector = op.view(vector, own[len(own) - len(wanted) :])
    return vector if shape(vector) == wanted else op.Expand(vector, shape=list(wanted))


@canonical("SimplifiedLayerNormalization")
@canonical("SimplifiedLayerNormalization", domain=MICROSOFT)
@canonical("RMSNormalization")
def rms_norm(op: Builder) -> Result:
    """Norm of kind rms"""
    x = op.x()
    axis = axis_of(op, -1, len(shape(x)))
    return op.Norm(x, affine(op, x, op.optional(1), axis), None, kind="rms", axis=axis,
                   epsilon=op.attribute("epsilon", 1e-5))  # fmt: skip


@canonical("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_norm(op: Builder) -> Result:
    """Norm(x + skip + bias), and the sum where it is read"""
    plain = op.node.op_type == "SkipLayerNormalization"
    x, scale, t = op.x(0), op.x(2), op.dtype
    beta, bias = (op.optional(3), op.optional(4)) if plain else (None, op.optional(3))
    operands = [x, op.x(1), *([bias] if bias is not None else [])]
    text = f"Add %0 %1 -> {t}" + (f"; Add $0 %2 -> {t}" if bias is not None else "")
    total = op.pointwise(text, *operands)
    axis = len(shape(x)) - 1
    y = op.Norm(total, affine(op, total, scale, axis), affine(op, total, beta, axis), kind="layer" if plain else "rms",
                axis=axis, epsilon=op.attribute("epsilon", 1e-12 if plain else 1e-5))  # fmt: skip
    if op.used(1) or op.used(2):
        return reject("its mean or deviation is read", "drop these outputs")
    return y, None, None, total


@canonical("LpNormalization")
def lp_norm(op: Builder) -> Result:
    """x / norm, 0 where the norm is 0"""
    axis, power, t = axis_of(op, -1, len(shape(op.x()))), op.attribute("p", 2), op.dtype
    length = op.Reduce(op.x(), kind=f"l{power}", axes=[axis])
    return op.pointwise(f"Div %0 %1 -> {t}; Equal %1 0 -> bool; Where $1 0 $0 -> {t}", op.x(), length)


@canonical("MeanVarianceNormalization")
def mean_variance_norm(op: Builder) -> Result:
    """(x - mean) / (deviation + 1e-9)"""
    x, t = op.x(), op.dtype
    axes = normal_axes(op.attribute("axes") or [0, 2, 3], len(shape(x)))
    centred = op.pointwise(f"Sub %0 %1 -> {t}", x, op.Reduce(x, kind="mean", axes=axes))
    squares = op.Reduce(op.pointwise(f"Mul %0 %0 -> {t}", centred), kind="mean", axes=axes)
    return op.pointwise(f"Sqrt %1 -> {t}; Add $0 1e-09 -> {t}; Div %0 $1 -> {t}", centred, squares)


@canonical("LRN")
def local_response_norm(op: Builder) -> Result:
    """x / (bias + alpha * mean of x² over neighbouring channels) ** beta, the mean as a Pool"""
    x, size, t = op.x(), int(op.attribute("size")), op.dtype
    if t in NARROW_FLOATS:
        return reject("its squares would be rounded to 16 bits", "run this layer in float32")
    batch, channels, *spatial = shape(x)
    squares = op.view(op.pointwise(f"Mul %0 %0 -> {t}", x), [batch, 1, channels, product(spatial)])
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    mean = op.Pool(squares, kind="average", kernel=[size, 1], strides=[1, 1], pads=[before, 0, after, 0],
                   dilations=[1, 1], count_include_pad=1)  # fmt: skip
    alpha, beta, bias = (float(op.attribute(name, default)) for name, default in _LRN_DEFAULTS.items())
    text = f"Mul %1 {alpha} -> {t}; Add $0 {bias} -> {t}; Pow $1 {beta} -> {t}; Div %0 $2 -> {t}"
    return op.pointwise(text, x, op.view(mean, shape(x)))


_LRN_DEFAULTS = {"alpha": 1e-4, "beta": 0.75, "bias": 1.0}

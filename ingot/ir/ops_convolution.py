"""Conv, ConvTranspose and Pool: every pad is resolved, nothing is automatic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ingot.errors import GraphError
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_linear import ZERO_POINT, accumulator, centred, summed
from ingot.ir.ops_table import EPILOGUE, Attribute, Shape, TensorType, narrowed, op, shifted, windowed
from ingot.ir.oracle_ops.convolution import Window, convolve, padded, patches
from ingot.ir.oracle_ops.convolution import conv_transpose as transposed
from ingot.ir.oracle_ops.pool import max_pool
from ingot.plan.extent import product


def _geometry(kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int]) -> Window:
    rank = len(kernel)
    return Window(tuple(kernel), tuple(strides), tuple(dilations), tuple(pads[:rank]), tuple(pads[rank:]))


def _slid(shape: Shape, geometry: Window) -> Shape:
    axes = zip(shape[2:], geometry.begins, geometry.ends, geometry.extents(), geometry.strides, strict=True)
    return tuple(windowed(*axis) for axis in axes)


def _conv_type(x: TensorType, weight: TensorType, *, strides: Sequence[int], pads: Sequence[int],
               dilations: Sequence[int], group: int, **_: Any) -> TensorType:  # fmt: skip
    outputs, inputs, *kernel = (int(size) for size in weight.shape)
    if isinstance(x.shape[1], int) and x.shape[1] != inputs * group:
        raise GraphError(f"Conv: x {x.shape} does not fit weight {weight.shape} with group={group}")
    spatial = _slid(x.shape, _geometry(kernel, strides, dilations, pads))
    return TensorType(accumulator(x.dtype), (x.shape[0], outputs, *spatial))


@op("Conv", "x weight *extras", _conv_type, strides=Attribute("ints"), pads=Attribute("ints"),
    dilations=Attribute("ints"), group=Attribute("int", 1), x_zero_point=ZERO_POINT,
    weight_zero_point=ZERO_POINT, epilogue=EPILOGUE)  # fmt: skip
def conv(x: Array, weight: Array, *, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int], group: int,
         x_zero_point: int, weight_zero_point: int) -> Array:  # fmt: skip
    """x[N,C,*S] with weight[O,C/group,*K]; pads are begins then ends; padding counts as x_zero_point"""
    geometry = _geometry(weight.shape[2:], strides, dilations, pads)
    result = convolve(centred(x, x_zero_point), centred(weight, weight_zero_point), geometry, group)
    return summed(result, x.dtype.name)


def _transposed_type(x: TensorType, weight: TensorType, *, strides: Sequence[int], pads: Sequence[int],
                     dilations: Sequence[int], group: int, output_padding: Sequence[int]) -> TensorType:  # fmt: skip
    rank = len(strides)
    axes = zip(x.shape[2:], weight.shape[2:], strides, dilations, pads[:rank], pads[rank:], output_padding, strict=True)
    spatial = [shifted(product((shifted(n, -1), s)), (int(k) - 1) * d + 1 + extra - begin - end)
               for n, k, s, d, begin, end, extra in axes]  # fmt: skip
    return TensorType(x.dtype, (x.shape[0], int(weight.shape[1]) * group, *spatial))


@op("ConvTranspose", "x weight *extras", _transposed_type, strides=Attribute("ints"), pads=Attribute("ints"),
    dilations=Attribute("ints"), group=Attribute("int", 1), output_padding=Attribute("ints"),
    epilogue=EPILOGUE)  # fmt: skip
def conv_transpose(x: Array, weight: Array, *, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int],
                   group: int, output_padding: Sequence[int]) -> Array:  # fmt: skip
    """x[N,C,*S] scattered through weight[C,O/group,*K], cropped by the pads, grown by output_padding"""
    return transposed(wide(x), wide(weight), strides=list(strides), pads=list(pads), dilations=list(dilations),
                      group=group, output_padding=list(output_padding))  # fmt: skip


def _pool_type(x: TensorType, *, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int],
               dilations: Sequence[int], indices: int, **_: Any) -> tuple[TensorType, ...]:  # fmt: skip
    shape = (*x.shape[:2], *_slid(x.shape, _geometry(kernel, strides, dilations, pads)))
    values = TensorType(x.dtype, shape)
    return (values, TensorType("int64", shape)) if indices else (values,)


@op("Pool", "x", _pool_type, kind=Attribute("text"), kernel=Attribute("ints"), strides=Attribute("ints"),
    pads=Attribute("ints"), dilations=Attribute("ints"), count_include_pad=Attribute("int", 0), p=Attribute("int", 2),
    indices=Attribute("int", 0))  # fmt: skip
def pool(x: Array, *, kind: str, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int],
         dilations: Sequence[int], count_include_pad: int, p: int, indices: int) -> Any:  # fmt: skip
    """The "max" (with `indices` also its place in the flattened x), "average" or "lp" norm of windows of x[N,C,*S]"""
    geometry = _geometry(kernel, strides, dilations, pads)
    if kind == "max":
        return max_pool(x, kernel_shape=list(kernel), strides=list(strides), pads=list(pads),
                        dilations=list(dilations), outputs=(True, bool(indices)))  # fmt: skip
    if kind == "lp":
        return narrowed(_window_sums(np.abs(wide(x)) ** p, geometry) ** (1 / p), x.dtype.name)
    counts = np.prod(kernel) if count_include_pad else _window_sums(np.ones((1, 1, *x.shape[2:])), geometry)
    sums = _window_sums(wide(x), geometry)
    return narrowed((sums / counts).astype(sums.dtype), x.dtype.name)


def _window_sums(x: Array, geometry: Window) -> Array:
    bordered = padded(x, geometry.begins, geometry.ends)
    output = geometry.output(x.shape[2:])
    taps = tuple(range(-len(geometry.kernel), 0))
    return patches(np.ascontiguousarray(bordered), geometry, output).sum(axis=taps)

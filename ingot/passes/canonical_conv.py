"""Convolutions and pools with every pad resolved; global pools become Reduce."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ingot.dtypes import numpy_dtype
from ingot.ir.graph import dtype_of, shape
from ingot.passes.canonical_table import Builder, Reject, Result, canonical, known, reject
from ingot.plan.extent import Extent


@dataclass(frozen=True)
class Sliding:
    """A window with everything resolved; `overhang` is what ceil_mode adds after the pads."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    overhang: tuple[int, ...]

    @property
    def pads(self) -> list[int]:
        """Begins, then ends with the overhang."""
        return [*self.begins, *(end + more for end, more in zip(self.ends, self.overhang, strict=True))]


UNKNOWN_KERNEL = reject("the shape of its weight is symbolic", "give the weight a static shape")


def sliding(op: Builder, sizes: Sequence[Extent], kernel: Sequence[int]) -> Sliding | Reject:
    """Strides, dilations, auto_pad and ceil_mode of a node over an input of these spatial sizes."""
    rank = len(kernel)
    strides = tuple(op.attribute("strides") or [1] * rank)
    dilations = tuple(op.attribute("dilations") or [1] * rank)
    pads = _pads(op, sizes, kernel, strides, dilations)
    if isinstance(pads, Reject):
        return pads
    window = Sliding(tuple(kernel), strides, dilations, tuple(pads[:rank]), tuple(pads[rank:]), (0,) * rank)
    if not op.attribute("ceil_mode", 0) or op.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return window
    return _ceiled(window, sizes)


def _pads(op: Builder, sizes: Sequence[Extent], kernel: Sequence[int], strides: Sequence[int],
          dilations: Sequence[int]) -> Sequence[int] | Reject:  # fmt: skip
    rank, auto_pad = len(kernel), op.attribute("auto_pad", "NOTSET")
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        return op.attribute("pads") or [0] * 2 * rank if auto_pad == "NOTSET" else [0] * 2 * rank
    totals = []
    for size, length, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        span = (length - 1) * dilation + 1
        if isinstance(size, int):
            totals.append(max(0, (-(-size // stride) - 1) * stride + span - size))
        elif stride == 1:
            totals.append(span - 1)
        else:
            return reject(f"auto_pad={auto_pad} depends on the symbolic size {size}", "export explicit pads")
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return [*small, *large] if auto_pad == "SAME_UPPER" else [*large, *small]


def _ceiled(window: Sliding, sizes: Sequence[Extent]) -> Sliding | Reject:
    """ceil_mode as overhang: one more window where it still starts within the input or the padding before it."""
    overhang = []
    axes = zip(sizes, window.kernel, window.strides, window.dilations, window.begins, window.ends, strict=True)
    for size, length, stride, dilation, begin, end in axes:
        if stride == 1:
            overhang.append(0)
            continue
        if not isinstance(size, int):
            return reject(f"its ceil_mode depends on the symbolic size {size}", "build for static shapes")
        span = size + begin + end - (length - 1) * dilation - 1
        last = -(-span // stride) * stride
        overhang.append(last - span if last < size + begin else 0)
    return Sliding(window.kernel, window.strides, window.dilations, window.begins, window.ends, tuple(overhang))


@canonical("Conv")
def conv(op: Builder) -> Result:
    """Conv with its bias as an epilogue"""
    kernel = known(shape(op.x(1))[1:])
    window = UNKNOWN_KERNEL if kernel is None else sliding(op, shape(op.x())[2:], kernel[1:])
    if isinstance(window, Reject):
        return window
    settings = {"strides": window.strides, "pads": window.pads, "dilations": window.dilations,
                "group": op.attribute("group", 1)}  # fmt: skip
    if not op.given(2):
        return op.Conv(op.x(), op.x(1), **settings)
    bias = channel_vector(op, op.x(2), op.x())
    return op.Conv(op.x(), op.x(1), bias, epilogue=f"Add %0 %1 -> {op.dtype}", **settings)


def channel_vector(op: Builder, vector: ir.Value, x: ir.Value) -> ir.Value:
    """[C] as [C, 1, …], to broadcast against x[N,C,*S]."""
    return op.view(vector, [shape(vector)[0], *([1] * (len(shape(x)) - 2))])


@canonical("ConvTranspose")
def conv_transpose(op: Builder) -> Result:
    """ConvTranspose with its output shape turned into pads"""
    kernel = known(shape(op.x(1))[2:])
    if kernel is None:
        return UNKNOWN_KERNEL
    rank = len(kernel)
    strides, dilations = op.attribute("strides") or [1] * rank, op.attribute("dilations") or [1] * rank
    grown = op.attribute("output_padding") or [0] * rank
    pads = _transposed_pads(op, kernel, strides, dilations, grown)
    if isinstance(pads, Reject):
        return pads
    grown = [extra - min(end, 0) for extra, end in zip(grown, pads[rank:], strict=True)]
    if min(pads[:rank]) < 0:
        return reject("its output is larger than what the kernel reaches", "use a smaller output_shape")
    settings = {"strides": strides, "dilations": dilations, "group": op.attribute("group", 1),
                "output_padding": grown, "pads": [max(pad, 0) for pad in pads]}  # fmt: skip
    if not op.given(2):
        return op.ConvTranspose(op.x(), op.x(1), **settings)
    bias = channel_vector(op, op.x(2), op.x())
    return op.ConvTranspose(op.x(), op.x(1), bias, epilogue=f"Add %0 %1 -> {op.dtype}", **settings)


def _transposed_pads(op: Builder, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int],
                     grown: Sequence[int]) -> list[int] | Reject:  # fmt: skip
    rank, auto_pad, wanted = len(kernel), op.attribute("auto_pad", "NOTSET"), op.attribute("output_shape")
    if wanted is None and auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        return list(op.attribute("pads") or [0] * 2 * rank) if auto_pad == "NOTSET" else [0] * 2 * rank
    totals = []
    for axis, size in enumerate(shape(op.x())[2:]):
        span = (kernel[axis] - 1) * dilations[axis] + 1
        if wanted is None:
            totals.append(span - strides[axis] + grown[axis])
        elif isinstance(size, int):
            totals.append((size - 1) * strides[axis] + span + grown[axis] - wanted[len(wanted) - rank + axis])
        else:
            return reject(f"its output_shape depends on the symbolic size {size}", "export explicit pads")
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return [*small, *large] if auto_pad == "SAME_UPPER" else [*large, *small]


@canonical("MaxPool")
def max_pool(op: Builder) -> Result:
    """Pool of kind max, with indices where they are read"""
    window = sliding(op, shape(op.x())[2:], op.attribute("kernel_shape"))
    if isinstance(window, Reject):
        return window
    settings = _settings(window)
    if not op.used(1):
        return op.Pool(op.x(), kind="max", **settings)
    values, places = op.make("Pool", op.x(), kind="max", indices=1, **settings, _outputs=2)
    if op.attribute("storage_order", 0):
        places = _column_major(op, places)
        if isinstance(places, Reject):
            return places
    return values, places


def _settings(window: Sliding) -> dict[str, Sequence[int]]:
    return {"kernel": window.kernel, "strides": window.strides, "pads": window.pads, "dilations": window.dilations}


def _column_major(op: Builder, places: ir.Value) -> ir.Value | Reject:
    """Row-major places in [N, C, H, W] as places with the spatial axes reversed."""
    sizes = shape(op.x())[2:]
    if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        return reject("its indices are column-major", "use storage_order=0")
    height, width = sizes
    plane, t = int(height) * int(width), "int64"
    return op.pointwise(
        f"Mod %0 {plane} -> {t}; Sub %0 $0 -> {t}; Mod $0 {width} -> {t}; Div $0 {width} -> {t}; "
        f"Mul $2 {height} -> {t}; Add $4 $3 -> {t}; Add $1 $5 -> {t}",
        places,
    )


@canonical("AveragePool")
def average_pool(op: Builder) -> Result:
    """Pool of kind average; padding that counts goes before an overhang that does not"""
    window = sliding(op, shape(op.x())[2:], op.attribute("kernel_shape"))
    if isinstance(window, Reject):
        return window
    counted = op.attribute("count_include_pad", 0)
    if not counted or not any(window.overhang):
        return op.Pool(op.x(), kind="average", count_include_pad=counted, **_settings(window))
    bordered = op.Pad(op.x(), pads=[0, 0, *window.begins, 0, 0, *window.ends])
    pads = [*([0] * len(window.kernel)), *window.overhang]
    return op.Pool(bordered, kind="average", **{**_settings(window), "pads": pads})


@canonical("LpPool")
def lp_pool(op: Builder) -> Result:
    """Pool of kind lp"""
    window = sliding(op, shape(op.x())[2:], op.attribute("kernel_shape"))
    if isinstance(window, Reject):
        return window
    return op.Pool(op.x(), kind="lp", p=int(op.attribute("p", 2)), **_settings(window))


@canonical("GlobalAveragePool", "GlobalMaxPool")
def global_pool(op: Builder) -> Result:
    """Reduce over the spatial axes"""
    kind = "mean" if op.node.op_type == "GlobalAveragePool" else "max"
    return op.Reduce(op.x(), kind=kind, axes=list(range(2, len(shape(op.x())))))


@canonical("GlobalLpPool")
def global_lp_pool(op: Builder) -> Result:
    """The norm over the spatial axes"""
    axes, power, t = list(range(2, len(shape(op.x())))), int(op.attribute("p", 2)), dtype_of(op.x())
    if power in (1, 2):
        return op.Reduce(op.x(), kind=f"l{power}", axes=axes)
    sums = op.Reduce(op.pointwise(f"Abs %0 -> {t}; Pow $0 {power} -> {t}", op.x()), kind="sum", axes=axes)
    return op.pointwise(f"Pow %0 {1 / power} -> {t}", sums)


@canonical("MaxUnpool")
def max_unpool(op: Builder) -> Result:
    """Values scattered into zeros at flat places"""
    source = known(shape(op.x()))
    if source is None:
        return reject("its input shape is symbolic", "build for static shapes")
    pooled = _unpooled_shape(op, source)
    target = known(shape(op.y)) if op.given(2) else pooled
    if target is None:
        return reject("its output shape varies at run time", "make the input 'output_shape' a constant")
    zeros = op.Expand(op.constant(np.zeros(1, numpy_dtype(op.dtype))), shape=[math.prod(pooled)])
    places, values = (op.view(value, [math.prod(source)]) for value in (op.x(1), op.x()))
    result = op.view(op.ScatterElements(zeros, places, values, axis=0), pooled)
    growth = [goal - size for goal, size in zip(target, pooled, strict=True)]
    return op.Pad(result, pads=[*([0] * len(growth)), *growth]) if any(growth) else result


def _unpooled_shape(op: Builder, source: Sequence[int]) -> list[int]:
    """The shape the indices refer to."""
    kernel = op.attribute("kernel_shape")
    rank = len(kernel)
    strides, pads = op.attribute("strides") or [1] * rank, op.attribute("pads") or [0] * 2 * rank
    axes = zip(source[2:], kernel, strides, pads[:rank], pads[rank:], strict=True)
    return [*source[:2], *((n - 1) * s - begin - end + k for n, k, s, begin, end in axes)]

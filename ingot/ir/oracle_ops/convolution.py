"""Conv and ConvTranspose as matrix products over strided views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ingot.ir.oracle_ops.table import meaning


@dataclass(frozen=True)
class Window:
    """Geometry of a sliding window, resolved for one input size."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    def extents(self) -> tuple[int, ...]:
        """Input elements the dilated kernel spans, per axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    def output(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Output sizes, rounded down."""
        spans = zip(sizes, self.begins, self.ends, self.extents(), self.strides, strict=True)
        return tuple((size + begin + end - extent) // stride + 1 for size, begin, end, extent, stride in spans)


def window(sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int] | None,
           dilations: Sequence[int] | None, pads: Sequence[int] | None, auto_pad: str) -> Window:  # fmt: skip
    """Resolve defaults and auto_pad; SAME_* makes the output ceil(size / stride)."""
    rank = len(kernel)
    strides = tuple(strides or [1] * rank)
    dilations = tuple(dilations or [1] * rank)
    begins, ends = tuple((pads or [0] * 2 * rank)[:rank]), tuple((pads or [0] * 2 * rank)[rank:])
    if auto_pad == "VALID":
        begins = ends = (0,) * rank
    elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        totals = [max(0, (-(-n // s) - 1) * s + e - n) for n, s, e in zip(sizes, strides, extents, strict=True)]
        halves, rests = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        begins, ends = (halves, rests) if auto_pad == "SAME_UPPER" else (rests, halves)
    return Window(tuple(kernel), strides, dilations, begins, ends)


def padded(x: np.ndarray, begins: Sequence[int], ends: Sequence[int], value: float = 0) -> np.ndarray:
    """x[N,C,*S] with constant borders; negative pads crop, after the positive ones have been added."""
    if not any(begins) and not any(ends):
        return x
    sides = list(zip(begins, ends, strict=True))
    wide = np.pad(x, [(0, 0), (0, 0), *((max(0, b), max(0, e)) for b, e in sides)], constant_values=value)
    axes = zip(wide.shape[2:], sides, strict=True)
    keep: tuple[Any, ...] = tuple(slice(max(0, -b), n - max(0, -e)) for n, (b, e) in axes)
    return wide[(..., *keep)]


def patches(x: np.ndarray, geometry: Window, output: Sequence[int]) -> np.ndarray:
    """View [N, C, *output, *kernel] of an already padded x."""
    spatial = x.strides[2:]
    steps = [s * n for s, n in zip(spatial, geometry.strides, strict=True)]
    taps = [s * n for s, n in zip(spatial, geometry.dilations, strict=True)]
    shape = (*x.shape[:2], *output, *geometry.kernel)
    return as_strided(x, shape, (*x.strides[:2], *steps, *taps), writeable=False)


def working_dtype(dtype: np.dtype) -> np.dtype:
    """The type products are accumulated in: exact for 8-bit integers, float32 for shorter floats."""
    if dtype.kind in "iub":
        return np.dtype(np.float64)
    return dtype if dtype in (np.float32, np.float64) else np.dtype(np.float32)


def convolve(x: np.ndarray, weight: np.ndarray, geometry: Window, group: int) -> np.ndarray:
    """y[N,O,*S] = sum over channels and taps of x[N,C,*S] * weight[O,C/group,*K], in x's dtype."""
    output = geometry.output(x.shape[2:])
    batch, outputs = x.shape[0], weight.shape[0]
    taps = len(geometry.kernel)
    view = patches(np.ascontiguousarray(padded(x, geometry.begins, geometry.ends)), geometry, output)
    axes = (0, 1, *range(2 + taps, 2 + 2 * taps), *range(2, 2 + taps))
    rows = weight.reshape(1, group, outputs // group, int(np.prod(weight.shape[1:])))
    columns = view.transpose(axes).reshape(batch, group, rows.shape[-1], int(np.prod(output)))
    if rows.shape[2] == 1:  # depthwise: one multiply-add per tap beats a batch of one-row products
        product = np.einsum("ngkp,gk->ngp", columns, rows[0, :, 0])
    else:
        product = np.matmul(rows, columns)
    return product.reshape(batch, outputs, *output)


@meaning("Conv")
def conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, auto_pad: str = "NOTSET",
         dilations: list[int] | None = None, group: int = 1, kernel_shape: list[int] | None = None,
         pads: list[int] | None = None, strides: list[int] | None = None) -> np.ndarray:  # fmt: skip
    if x.ndim < 3 or x.shape[1] != weight.shape[1] * group or weight.shape[0] % group:
        raise ValueError(f"Conv: x {x.shape} and weight {weight.shape} do not fit with group={group}")
    geometry = window(x.shape[2:], weight.shape[2:], strides, dilations, pads, auto_pad)
    work = working_dtype(x.dtype)
    y = convolve(x.astype(work, copy=False), weight.astype(work, copy=False), geometry, group)
    if bias is not None:
        y += bias.astype(work).reshape(-1, *[1] * (x.ndim - 2))
    return y.astype(x.dtype, copy=False)


@meaning("ConvInteger", since=10)
def conv_integer(x: np.ndarray, weight: np.ndarray, x_zero: np.ndarray | None = None,
                 weight_zero: np.ndarray | None = None, *, auto_pad: str = "NOTSET",
                 dilations: list[int] | None = None, group: int = 1, kernel_shape: list[int] | None = None,
                 pads: list[int] | None = None, strides: list[int] | None = None) -> np.ndarray:  # fmt: skip
    """int32 accumulation of (x - x_zero) * (weight - weight_zero); padding counts as x_zero."""
    wide_x = x.astype(np.float64) - (0 if x_zero is None else x_zero.astype(np.float64))
    zero = np.zeros(1) if weight_zero is None else weight_zero.astype(np.float64)
    wide_weight = weight.astype(np.float64) - zero.reshape(-1, *[1] * (weight.ndim - 1))
    geometry = window(x.shape[2:], weight.shape[2:], strides, dilations, pads, auto_pad)
    return convolve(wide_x, wide_weight, geometry, group).astype(np.int32)


@meaning("ConvTranspose")
def conv_transpose(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, auto_pad: str = "NOTSET",
                   dilations: list[int] | None = None, group: int = 1, kernel_shape: list[int] | None = None,
                   output_padding: list[int] | None = None, output_shape: list[int] | None = None,
                   pads: list[int] | None = None, strides: list[int] | None = None) -> np.ndarray:  # fmt: skip
    """Scatter of x[N,C,*S] through weight[C,O/group,*K]; the result is cropped by the pads."""
    rank = x.ndim - 2
    steps, spread = strides or [1] * rank, dilations or [1] * rank
    extra = output_padding or [0] * rank
    axes = zip(x.shape[2:], steps, weight.shape[2:], spread, strict=True)
    full = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in axes]
    begins, ends = _transposed_pads(x.shape[2:], full, steps, extra, pads, output_shape, auto_pad)
    work = working_dtype(x.dtype)
    scattered = _scatter_taps(x.astype(work, copy=False), weight.astype(work, copy=False), full, steps, spread, group)
    y = padded(padded(scattered, [0] * rank, extra), [-b for b in begins], [-e for e in ends])
    if bias is not None:
        y = y + bias.astype(work).reshape(-1, *[1] * rank)
    return y.astype(x.dtype, copy=False)


def _transposed_pads(sizes: Sequence[int], full: Sequence[int], strides: Sequence[int], extra: Sequence[int],
                     pads: Sequence[int] | None, output_shape: Sequence[int] | None,
                     auto_pad: str) -> tuple[list[int], list[int]]:  # fmt: skip
    rank = len(sizes)
    if output_shape is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        output_shape = [n * s for n, s in zip(sizes, strides, strict=True)]
    if output_shape is None:
        pads = [0] * 2 * rank if pads is None or auto_pad == "VALID" else pads
        return list(pads[:rank]), list(pads[rank:])
    totals = [f + e - o for f, e, o in zip(full, extra, output_shape[-rank:], strict=True)]
    halves, rests = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return (halves, rests) if auto_pad == "SAME_UPPER" else (rests, halves)


def _scatter_taps(x: np.ndarray, weight: np.ndarray, full: Sequence[int], strides: Sequence[int],
                  dilations: Sequence[int], group: int) -> np.ndarray:  # fmt: skip
    batch, channels, *sizes = x.shape
    outputs, kernel = weight.shape[1], weight.shape[2:]
    columns = x.reshape(batch, group, channels // group, -1)
    rows = weight.reshape(group, channels // group, -1).transpose(0, 2, 1)
    products = np.matmul(rows, columns).reshape(batch, group * outputs, *kernel, *sizes)
    result = np.zeros((batch, group * outputs, *full), x.dtype)
    for tap in np.ndindex(*kernel):
        places: tuple[Any, ...] = tuple(slice(t * d, t * d + (n - 1) * s + 1, s)
                       for t, d, n, s in zip(tap, dilations, sizes, strides, strict=True))  # fmt: skip
        result[(..., *places)] += products[(slice(None), slice(None), *tap)]
    return result

"""Sliding-window reductions, one vectorised step per kernel tap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ingot.ir.oracle_ops.convolution import Window, padded, window, working_dtype
from ingot.ir.oracle_ops.table import meaning


def _pool_window(sizes: Sequence[int], kernel: list[int], strides: list[int] | None, dilations: list[int] | None,
                 pads: list[int] | None, auto_pad: str, ceil_mode: int) -> tuple[Window, tuple[int, ...]]:  # fmt: skip
    """Geometry and output sizes; with ceil_mode a window may end beyond the padding but must start before it."""
    geometry = window(sizes, kernel, strides, dilations, pads, auto_pad)
    output = list(geometry.output(sizes))
    if ceil_mode and auto_pad in ("NOTSET", "VALID"):
        for i, size in enumerate(sizes):
            span = size + geometry.begins[i] + geometry.ends[i] - geometry.extents()[i]
            output[i] = -(-span // geometry.strides[i]) + 1
            if (output[i] - 1) * geometry.strides[i] >= size + geometry.begins[i]:
                output[i] -= 1
    return geometry, tuple(output)


def _reach(geometry: Window, sizes: Sequence[int], output: Sequence[int]) -> list[int]:
    """Padding after each axis that the last window needs."""
    axes = zip(output, geometry.strides, geometry.extents(), sizes, geometry.begins, strict=True)
    return [max(0, (n - 1) * stride + extent - size - begin) for n, stride, extent, size, begin in axes]


def _taps(x: np.ndarray, geometry: Window, output: Sequence[int]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """For each kernel position, the view of x[N,C,*S] that every window sees there."""
    for tap in np.ndindex(*geometry.kernel):
        axes = zip(tap, geometry.dilations, geometry.strides, output, strict=True)
        places: tuple[Any, ...] = tuple(slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, s, n in axes)
        yield tap, x[(..., *places)]


def _sums(x: np.ndarray, geometry: Window, output: tuple[int, ...]) -> np.ndarray:
    work = padded(x, geometry.begins, _reach(geometry, x.shape[2:], output))
    total = np.zeros((*x.shape[:2], *output), x.dtype)
    for _, view in _taps(work, geometry, output):
        total += view
    return total


def _counts(sizes: Sequence[int], geometry: Window, output: tuple[int, ...], include_pad: int) -> np.ndarray:
    """How many elements each window averages over; elements beyond the declared padding never count."""
    counted = np.ones((1, 1, *sizes), np.float64)
    if not include_pad:
        return _sums(counted, geometry, output)
    counted = padded(counted, geometry.begins, geometry.ends, 1)
    bare = replace(geometry, begins=(0,) * len(sizes), ends=(0,) * len(sizes))
    return _sums(counted, bare, output)


@meaning("AveragePool")
def average_pool(x: np.ndarray, *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0,
                 count_include_pad: int = 0, dilations: list[int] | None = None, pads: list[int] | None = None,
                 strides: list[int] | None = None) -> np.ndarray:  # fmt: skip
    geometry, output = _pool_window(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    work = x.astype(working_dtype(x.dtype), copy=False)
    counts = _counts(x.shape[2:], geometry, output, count_include_pad)
    return (_sums(work, geometry, output) / counts.astype(work.dtype)).astype(x.dtype)


@meaning("LpPool")
def lp_pool(x: np.ndarray, *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0, p: int = 2,
            dilations: list[int] | None = None, pads: list[int] | None = None,
            strides: list[int] | None = None) -> np.ndarray:  # fmt: skip
    geometry, output = _pool_window(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    powers = np.abs(x.astype(working_dtype(x.dtype), copy=False)) ** p
    return (_sums(powers, geometry, output) ** (1.0 / p)).astype(x.dtype)


@meaning("MaxPool")
def max_pool(x: np.ndarray, *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0,
             storage_order: int = 0, dilations: list[int] | None = None, pads: list[int] | None = None,
             strides: list[int] | None = None, outputs: tuple[bool, ...] = (True,)) -> object:  # fmt: skip
    """Largest element of each window and, if asked for, its index in the flattened tensor."""
    geometry, output = _pool_window(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    work = x if x.dtype.kind in "iuf" else x.astype(np.float32)
    lowest = _lowest(work.dtype)
    bordered = padded(work, geometry.begins, _reach(geometry, x.shape[2:], output), lowest)
    best = np.full((*x.shape[:2], *output), lowest, work.dtype)
    if len(outputs) < 2 or not outputs[1]:
        for _, view in _taps(bordered, geometry, output):
            np.maximum(best, view, out=best)
        return best.astype(x.dtype, copy=False)
    chosen = np.zeros(best.shape, np.int64)
    for tap, view in _taps(bordered, geometry, output):
        index = _flat_index(tap, geometry, x.shape, output, storage_order)
        better = (view > best) | ((best == lowest) & (index >= 0) & (chosen == 0))
        best = np.where(better, view, best)
        chosen = np.where(better, np.broadcast_to(index, chosen.shape), chosen)
    return best.astype(x.dtype, copy=False), chosen


def _lowest(dtype: np.dtype[Any]) -> float:
    return int(np.iinfo(dtype).min) if dtype.kind in "iu" else -np.inf


def _flat_index(tap: tuple[int, ...], geometry: Window, shape: tuple[int, ...], output: Sequence[int],
                storage_order: int) -> np.ndarray:  # fmt: skip
    """Index of every window's element at `tap` in the flattened x; -1 where it lies in the padding."""
    sizes = shape[2:]
    rank = len(sizes)
    planes = np.arange(shape[0] * shape[1]).reshape(*shape[:2], *[1] * rank) * int(np.prod(sizes))
    index, inside = planes, np.ones((1,) * (rank + 2), bool)
    for axis in range(rank):
        place = np.arange(output[axis]) * geometry.strides[axis] + tap[axis] * geometry.dilations[axis]
        place = (place - geometry.begins[axis]).reshape(-1, *[1] * (rank - 1 - axis))
        step = int(np.prod(sizes[:axis] if storage_order else sizes[axis + 1 :]))
        index = index + place * step
        inside = inside & (place >= 0) & (place < sizes[axis])
    return np.where(inside, index, -1)


@meaning("GlobalLpPool")
def global_lp_pool(x: np.ndarray, *, p: int = 2) -> np.ndarray:
    axes = tuple(range(2, x.ndim))
    powers = np.abs(x.astype(working_dtype(x.dtype), copy=False)) ** p
    return (powers.sum(axis=axes, keepdims=True) ** (1.0 / p)).astype(x.dtype)

"""Operators that only move elements: views, slices, gathers, scatters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import GraphError
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_table import Attribute, Shape, TensorType, narrowed, op, shifted
from ingot.plan.extent import Extent, add, product


def _transposed(x: TensorType, *, perm: Sequence[int]) -> TensorType:
    return TensorType(x.dtype, tuple(x.shape[axis] for axis in perm))


@op("Transpose", "x", _transposed, perm=Attribute("ints"))
def transpose(x: Array, *, perm: Sequence[int]) -> Array:
    """y's axis i is x's axis perm[i]"""
    return np.asarray(np.transpose(x, perm), order="C")


def _to_shape(x: TensorType, *, shape: Shape) -> TensorType:
    return TensorType(x.dtype, tuple(shape))


@op("View", "x", _to_shape, shape=Attribute("extents"))
def view(x: Array, *, shape: Shape) -> Array:
    """The same elements in row-major order in another shape; one unbound symbol is what the rest leaves"""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return x.reshape(sizes)


def _sliced(x: TensorType, *, starts: Shape, steps: Sequence[int], sizes: Shape) -> TensorType:
    return TensorType(x.dtype, tuple(sizes))


@op("Slice", "x", _sliced, starts=Attribute("extents"), steps=Attribute("ints"), sizes=Attribute("extents"))
def slice_(x: Array, *, starts: Sequence[int], steps: Sequence[int], sizes: Sequence[int]) -> Array:
    """On every axis the elements start, start + step, …, `size` of them; 0 <= start, step may be negative"""
    stops = [start + step * size for start, step, size in zip(starts, steps, sizes, strict=True)]
    parts = zip(starts, stops, steps, strict=True)
    return np.asarray(x[tuple(slice(a, b if b >= 0 else None, s) for a, b, s in parts)], order="C")


def _concatenated(*xs: TensorType, axis: int) -> TensorType:
    first = xs[0]
    total: Extent = reduce(add, [x.shape[axis] for x in xs])
    return TensorType(first.dtype, (*first.shape[:axis], total, *first.shape[axis + 1 :]))


@op("Concat", "*xs", _concatenated, axis=Attribute("int"))
def concat(*xs: Array, axis: int) -> Array:
    """One after the other along the axis (>= 0)"""
    return np.concatenate(xs, axis)


def _parts(x: TensorType, *, axis: int, sizes: Shape) -> tuple[TensorType, ...]:
    return tuple(TensorType(x.dtype, (*x.shape[:axis], size, *x.shape[axis + 1 :])) for size in sizes)


@op("Split", "x", _parts, axis=Attribute("int"), sizes=Attribute("extents"))
def split(x: Array, *, axis: int, sizes: Sequence[int]) -> tuple[Array, ...]:
    """Consecutive parts along the axis"""
    return tuple(map(np.ascontiguousarray, np.split(x, np.cumsum(sizes)[:-1], axis)))


def _padded(x: TensorType, *, pads: Sequence[int], **_: Any) -> TensorType:
    rank = len(x.shape)
    axes = zip(x.shape, pads[:rank], pads[rank:], strict=True)
    return TensorType(x.dtype, tuple(shifted(size, begin + end) for size, begin, end in axes))


@op("Pad", "x", _padded, pads=Attribute("ints"), mode=Attribute("text", "constant"), value=Attribute("number", 0))
def pad(x: Array, *, pads: Sequence[int], mode: str, value: float) -> Array:
    """Borders on every axis, begins then ends, none negative; modes constant, reflect, edge, wrap"""
    widths = list(zip(pads[: x.ndim], pads[x.ndim :], strict=True))
    if mode == "constant":
        return np.pad(x, widths, constant_values=np.asarray(value).astype(x.dtype))
    if mode not in ("reflect", "edge", "wrap"):
        raise GraphError(f"Pad has no mode {mode!r}")
    return np.pad(x, widths, mode=mode)  # type: ignore[call-overload]


@op("Expand", "x", _to_shape, shape=Attribute("extents"))
def expand(x: Array, *, shape: Sequence[int]) -> Array:
    """x broadcast to the shape, which is the result's"""
    return np.asarray(np.broadcast_to(x, shape), order="C")


def _ranged(*, start: Extent, step: Extent, size: Extent, dtype: str) -> TensorType:
    return TensorType(dtype, (size,))


@op("Range", "", _ranged, start=Attribute("extent", 0), step=Attribute("extent", 1), size=Attribute("extent"),
    dtype=Attribute("text", "int64"))  # fmt: skip
def range_(*, start: int, step: int, size: int, dtype: str) -> Array:
    """start, start + step, …, `size` of them: where sizes become elements"""
    return (start + step * np.arange(size)).astype(numpy_dtype(dtype))


def _tiled(x: TensorType, *, repeats: Shape) -> TensorType:
    return TensorType(x.dtype, tuple(product(pair) for pair in zip(x.shape, repeats, strict=True)))


@op("Tile", "x", _tiled, repeats=Attribute("extents"))
def tile(x: Array, *, repeats: Sequence[int]) -> Array:
    """x repeated along every axis"""
    return np.tile(x, repeats)


def _gathered(data: TensorType, indices: TensorType, *, axis: int, early: int = 0) -> TensorType:
    return TensorType(data.dtype, (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))


@op("Gather", "data indices", _gathered, axis=Attribute("int", 0), early=Attribute("int", 0))
def gather(data: Array, indices: Array, *, axis: int, early: int = 0) -> Array:
    """Slices of the axis (>= 0) at the indices; a negative index counts from the end. early: as CacheUpdate's"""
    return np.take(data, indices, axis=axis)


def _like_indices(data: TensorType, indices: TensorType, *, axis: int) -> TensorType:
    return TensorType(data.dtype, indices.shape)


@op("GatherElements", "data indices", _like_indices, axis=Attribute("int", 0))
def gather_elements(data: Array, indices: Array, *, axis: int) -> Array:
    """y[i][j][k] = data[indices[i][j][k]][j][k] for axis 0, and so on; negative indices count from the end"""
    return data[_places(data, indices, axis)]


def _places(data: Array, indices: Array, axis: int) -> tuple[Array, ...]:
    grid = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    grid[axis] = indices
    return tuple(np.broadcast_to(index, indices.shape) for index in grid)


def _gathered_nd(data: TensorType, indices: TensorType, *, batch_dims: int) -> TensorType:
    depth = indices.shape[-1]
    if not isinstance(depth, int):
        raise GraphError("GatherND: the last extent of the indices must be known")
    return TensorType(data.dtype, (*indices.shape[:-1], *data.shape[batch_dims + depth :]))


@op("GatherND", "data indices", _gathered_nd, batch_dims=Attribute("int", 0))
def gather_nd(data: Array, indices: Array, *, batch_dims: int) -> Array:
    """data[b…, indices[b…, i, :]]"""
    batch = np.ogrid[tuple(slice(size) for size in indices.shape[:batch_dims])] if batch_dims else ()
    spread = [index.reshape(*index.shape, *[1] * (indices.ndim - 1 - batch_dims)) for index in batch]
    return np.asarray(data[(*spread, *np.moveaxis(indices, -1, 0))], order="C")


def _like_data(data: TensorType, indices: TensorType, updates: TensorType, **_: Any) -> TensorType:
    return data


_REDUCTIONS = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
_REDUCTION = Attribute("text", "none")


def _scattered(data: Array, places: Any, updates: Array, reduction: str) -> Array:
    if reduction == "none":
        result = data.copy()
        result[places] = updates
        return result
    result = wide(data).copy()
    _REDUCTIONS[reduction].at(result, places, wide(updates))
    return narrowed(result, data.dtype.name)


@op("ScatterElements", "data indices updates", _like_data, axis=Attribute("int", 0), reduction=_REDUCTION)
def scatter_elements(data: Array, indices: Array, updates: Array, *, axis: int, reduction: str) -> Array:
    """A copy of data with data[indices[i][j]][j] = updates[i][j] for axis 0; reductions none, add, mul, max, min"""
    return _scattered(data, _places(data, indices, axis), updates, reduction)


@op("ScatterND", "data indices updates", _like_data, reduction=_REDUCTION)
def scatter_nd(data: Array, indices: Array, updates: Array, *, reduction: str) -> Array:
    """A copy of data with data[indices[i, :]] = updates[i]"""
    return _scattered(data, tuple(np.moveaxis(indices, -1, 0)), updates, reduction)

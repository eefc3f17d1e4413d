"""Resize: separable interpolation; `taps` gives the table of one axis, which kernels may bake in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.errors import GraphError
from ingot.ir.elementwise import Array
from ingot.ir.ops_table import Attribute, Shape, TensorType, op


@dataclass(frozen=True)
class Sampling:
    """How one axis is sampled: the attributes of Resize, and the part of the input that tf_crop_and_resize cuts out."""

    mode: str
    coordinate: str
    nearest: str = "round_prefer_floor"
    cubic_a: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    roi: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Taps:
    """y[i] = sum over t of weights[i, t] * x[indices[i, t]], but the extrapolation value where `outside[i]`."""

    indices: Array
    weights: Array
    outside: Array


def taps(size: int, output: int, scale: float, sampling: Sampling) -> Taps:
    """The table of one axis that grows from `size` to `output` elements."""
    place = _source_places(size, output, scale, sampling)
    outside = np.zeros(output, bool)
    if sampling.coordinate == "tf_crop_and_resize":
        outside = (place < 0) | (place > size - 1)
    if sampling.mode == "nearest":
        chosen = _ROUNDINGS[sampling.nearest](place).astype(np.int64)
        return Taps(np.clip(chosen, 0, size - 1)[:, None], np.ones((output, 1)), outside)
    offsets, weights = _kernel(place - np.floor(place), scale, sampling)
    indices = np.floor(place).astype(np.int64)[:, None] + offsets
    if sampling.exclude_outside:
        weights = np.where((indices < 0) | (indices >= size), 0.0, weights)
        sums = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(sums == 0, 1.0, sums)
    return Taps(np.clip(indices, 0, size - 1), weights, outside)


_ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda place: np.ceil(place - 0.5),
    "round_prefer_ceil": lambda place: np.floor(place + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _source_places(size: int, output: int, scale: float, sampling: Sampling) -> Array:
    """Where on the input's axis every output element lies."""
    target = np.arange(output, dtype=np.float64)
    exact = scale * size  # not rounded, as the specification has it
    start, end = sampling.roi
    match sampling.coordinate:
        case "align_corners":
            return target * 0 if exact == 1 else target * (size - 1) / (exact - 1)
        case "asymmetric":
            return target / scale
        case "tf_crop_and_resize" if exact == 1:
            return target * 0 + (end - start) * (size - 1) / 2 + start * (size - 1)
        case "tf_crop_and_resize":
            return target * (end - start) * (size - 1) / (exact - 1) + start * (size - 1)
        case "pytorch_half_pixel" if exact == 1:
            return target * 0 - 0.5
        case "half_pixel" | "pytorch_half_pixel":
            return (target + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            return (target + 0.5) / scale - 0.5 + size / 2 * (1 - output / exact)
        case "tf_half_pixel_for_nn":
            return (target + 0.5) / scale
    raise GraphError(f"Resize has no coordinate mode {sampling.coordinate!r}")


def _kernel(fraction: Array, scale: float, sampling: Sampling) -> tuple[Array, Array]:
    """Offsets of the taps from the element on the left, and their weights for every fraction."""
    reach = {"linear": 1, "cubic": 2}[sampling.mode]
    shrink = min(scale, 1.0) if sampling.antialias else 1.0
    first = int(np.floor(-reach / shrink)) + 1
    offsets = np.arange(first, 2 - first)
    distance = np.abs(offsets - fraction[:, None]) * shrink
    weights = np.maximum(1 - distance, 0) if sampling.mode == "linear" else _cubic(distance, sampling.cubic_a)
    return offsets, weights / weights.sum(axis=1, keepdims=True) if sampling.antialias else weights


def _cubic(x: Array, a: float) -> Array:
    """Keys' kernel."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.asarray(np.where(x <= 1, near, np.where(x < 2, far, 0.0)))


def _resized(x: TensorType, *, sizes: Shape, **_: Any) -> TensorType:
    return TensorType(x.dtype, tuple(sizes))


@op("Resize", "x", _resized, sizes=Attribute("extents"), scales=Attribute("floats", ()), mode=Attribute("text"),
    coordinate=Attribute("text", "half_pixel"), nearest=Attribute("text", "round_prefer_floor"),
    cubic_a=Attribute("float", -0.75), exclude_outside=Attribute("int", 0), antialias=Attribute("int", 0),
    extrapolation=Attribute("float", 0.0), roi=Attribute("floats", ()))  # fmt: skip
def resize(x: Array, *, sizes: Sequence[int], scales: Sequence[float], mode: str, coordinate: str, nearest: str,
           cubic_a: float, exclude_outside: int, antialias: int, extrapolation: float,
           roi: Sequence[float]) -> Array:  # fmt: skip
    """x in the output shape `sizes`; `scales` are those over x's sizes unless given; `roi`: starts, then ends"""
    regions = list(zip(roi[: x.ndim], roi[x.ndim :], strict=True)) or [(0.0, 1.0)] * x.ndim
    result = x if mode == "nearest" else x.astype(np.float64)
    factors = scales or [size / extent for size, extent in zip(sizes, x.shape, strict=True)]
    for axis, (size, scale, region) in enumerate(zip(sizes, factors, regions, strict=True)):
        if size == x.shape[axis] and scale == 1 and region == (0.0, 1.0):
            continue
        sampling = Sampling(mode, coordinate, nearest, cubic_a, bool(exclude_outside), bool(antialias), region)
        table = taps(x.shape[axis], size, scale, sampling)
        result = _sampled(result, axis, table, extrapolation)
    return _rounded(result, x)


def _sampled(x: Array, axis: int, table: Taps, extrapolation: float) -> Array:
    column = (-1, *[1] * (x.ndim - axis - 1))
    if table.indices.shape[1] == 1:
        result = np.take(x, table.indices[:, 0], axis)
    else:
        columns = zip(table.indices.T, table.weights.T, strict=True)
        result = np.asarray(sum(np.take(x, index, axis) * weight.reshape(column) for index, weight in columns))
    if not table.outside.any():
        return result
    return np.asarray(np.where(table.outside.reshape(column), np.asarray(extrapolation).astype(x.dtype), result))


def _rounded(result: Array, x: Array) -> Array:
    if x.dtype.kind in "iu" and result.dtype != x.dtype:
        limits = np.iinfo(x.dtype)
        result = np.clip(np.rint(result), limits.min, limits.max)
    return np.ascontiguousarray(result.astype(x.dtype, copy=False))

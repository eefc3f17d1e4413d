"""TopK and CumSum (or CumProd)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ingot.errors import GraphError
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_table import Attribute, TensorType, narrowed, op


def _topk_type(x: TensorType, *, k: int, axis: int, **_: Any) -> tuple[TensorType, TensorType]:
    shape = (*x.shape[:axis], k, *x.shape[axis + 1 :])
    return TensorType(x.dtype, shape), TensorType("int64", shape)


@op("TopK", "x", _topk_type, k=Attribute("int"), axis=Attribute("int"), largest=Attribute("int", 1),
    sorted=Attribute("int", 1))  # fmt: skip
def topk(x: Array, *, k: int, axis: int, largest: int, sorted: int) -> tuple[Array, Array]:
    """The k largest (smallest) along the axis and their int64 places, in order; of equals the first"""
    if largest:
        order = x.shape[axis] - 1 - np.flip(np.argsort(np.flip(wide(x), axis), axis, kind="stable"), axis)
    else:
        order = np.argsort(wide(x), axis, kind="stable")
    places = np.take(order, np.arange(k), axis)
    return np.take_along_axis(x, places, axis), places.astype(np.int64)


def _cumsum_type(x: TensorType, *, kind: str, **_: Any) -> TensorType:
    if kind not in _RUNNING:
        raise GraphError(f"CumSum has the kinds {sorted(_RUNNING)}, not {kind!r}")
    return x


_RUNNING: dict[str, tuple[Callable[..., Array], int]] = {"sum": (np.cumsum, 0), "prod": (np.cumprod, 1)}


@op("CumSum", "x", _cumsum_type, axis=Attribute("int"), exclusive=Attribute("int", 0), reverse=Attribute("int", 0),
    kind=Attribute("text", "sum"))  # fmt: skip
def cumsum(x: Array, *, axis: int, exclusive: int, reverse: int, kind: str) -> Array:
    """Running sum or product along the axis; exclusive: without the element itself; reverse: from the end"""
    flipped = np.flip(wide(x), axis) if reverse else wide(x)
    combined, nothing = _RUNNING[kind]
    sums = combined(flipped, axis, dtype=flipped.dtype)
    sums = _shifted_by_one(sums, axis, nothing) if exclusive else sums
    return narrowed(np.ascontiguousarray(np.flip(sums, axis) if reverse else sums), x.dtype.name)


def _shifted_by_one(sums: Array, axis: int, first: int) -> Array:
    result = np.full_like(sums, first)
    count = sums.shape[axis]
    target: list[slice] = [slice(None)] * sums.ndim
    source = list(target)
    target[axis], source[axis] = slice(1, None), slice(0, max(count - 1, 0))
    result[tuple(target)] = sums[tuple(source)]
    return result

"""Reduce, Softmax and Norm; 16-bit floats are summed in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ingot.errors import GraphError
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_linear import accumulator
from ingot.ir.ops_table import EPILOGUE, Attribute, Shape, TensorType, narrowed, op, same

INDEX_KINDS = ("argmax", "argmin")


def reduced(shape: Shape, axes: Sequence[int], keepdims: int) -> Shape:
    """The shape with the axes gone, or 1."""
    if keepdims:
        return tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _reduce_type(x: TensorType, *, kind: str, axes: Sequence[int], keepdims: int, **_: Any) -> TensorType:
    if kind not in KINDS and kind not in INDEX_KINDS:
        raise GraphError(f"Reduce has the kinds {sorted([*KINDS, *INDEX_KINDS])}, not {kind!r}")
    dtype = "int64" if kind in INDEX_KINDS else accumulator(x.dtype) if kind == "sum" else x.dtype
    return TensorType(dtype, reduced(x.shape, axes, keepdims))


def _logsumexp(x: Array, axes: tuple[int, ...]) -> Array:
    peak = np.max(x, axis=axes, keepdims=True, initial=-np.inf)
    peak = np.where(np.isfinite(peak), peak, 0)
    return np.asarray(np.log(np.sum(np.exp(x - peak), axis=axes, keepdims=True)) + peak)


def _lowest(x: Array) -> Any:
    return -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min if x.dtype.kind in "iu" else False


def _highest(x: Array) -> Any:
    return np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).max if x.dtype.kind in "iu" else True


KINDS: dict[str, Callable[[Array, tuple[int, ...]], Any]] = {
    "sum": lambda x, axes: np.sum(x, axis=axes, keepdims=True),
    "mean": lambda x, axes: np.mean(x, axis=axes, keepdims=True),
    "max": lambda x, axes: np.max(x, axis=axes, keepdims=True, initial=_lowest(x)),
    "min": lambda x, axes: np.min(x, axis=axes, keepdims=True, initial=_highest(x)),
    "prod": lambda x, axes: np.prod(x, axis=axes, keepdims=True),
    "l1": lambda x, axes: np.sum(np.abs(x), axis=axes, keepdims=True),
    "l2": lambda x, axes: np.sqrt(np.sum(np.square(x), axis=axes, keepdims=True)),
    "logsum": lambda x, axes: np.log(np.sum(x, axis=axes, keepdims=True)),
    "logsumexp": _logsumexp,
    "sumsquare": lambda x, axes: np.sum(np.square(x), axis=axes, keepdims=True),
}


@op("Reduce", "x *extras", _reduce_type, kind=Attribute("text"), axes=Attribute("ints"), keepdims=Attribute("int", 1),
    select_last_index=Attribute("int", 0), epilogue=EPILOGUE)  # fmt: skip
def reduce(x: Array, *, kind: str, axes: Sequence[int], keepdims: int, select_last_index: int) -> Array:
    """kind over the axes (>= 0, ascending); argmax and argmin take one axis and give int64; 8-bit sums are int32"""
    with np.errstate(all="ignore"):
        if kind in INDEX_KINDS:
            return _extreme(x, kind, axes[0], keepdims, select_last_index)
        result = np.asarray(KINDS[kind](wide(x), tuple(axes)))
    result = result if keepdims else np.squeeze(result, tuple(axes))
    if x.dtype.kind == "V" or x.dtype == np.float16:
        return result
    return result.astype(accumulator(x.dtype.name) if kind == "sum" else x.dtype)


def _extreme(x: Array, kind: str, axis: int, keepdims: int, last: int) -> Array:
    search: Any = np.argmax if kind == "argmax" else np.argmin
    if not last:
        return np.asarray(search(wide(x), axis=axis, keepdims=bool(keepdims)))
    return np.asarray(x.shape[axis] - 1 - search(np.flip(wide(x), axis), axis=axis, keepdims=bool(keepdims)))


@op("Softmax", "x", same, axis=Attribute("int"), log=Attribute("int", 0))
def softmax(x: Array, *, axis: int, log: int) -> Array:
    """exp(x) / sum(exp(x)) along the axis, or its logarithm"""
    with np.errstate(all="ignore"):
        shifted = wide(x) - np.max(wide(x), axis=axis, keepdims=True, initial=-np.inf)
        powers = np.exp(shifted)
        sums = np.sum(powers, axis=axis, keepdims=True)
        return narrowed(shifted - np.log(sums) if log else powers / sums, x.dtype.name)


def _norm_type(x: TensorType, scale: TensorType | None, bias: TensorType | None, *, kind: str, **_: Any) -> TensorType:
    if kind not in ("layer", "rms", "instance", "group"):
        raise GraphError(f"Norm has the kinds layer, rms, instance and group, not {kind!r}")
    return x


@op("Norm", "x scale? bias? *extras", _norm_type, kind=Attribute("text"), axis=Attribute("int", 1),
    groups=Attribute("int", 1), epsilon=Attribute("float", 1e-5), epilogue=EPILOGUE)  # fmt: skip
def norm(x: Array, scale: Array | None, bias: Array | None, *, kind: str, axis: int, groups: int,
         epsilon: float) -> Array:  # fmt: skip
    """(x - mean) / sqrt(variance + epsilon) * scale + bias; "rms": x / sqrt(mean(x²) + epsilon) * scale + bias

    layer, rms: over the axes from `axis` on, scale and bias broadcast to those. instance, group: over the spatial axes
    of x[N,C,*S] (and the channels of one group), scale and bias are [C].
    """
    if kind in ("layer", "rms"):
        return _affine(_normalised(wide(x), tuple(range(axis, x.ndim)), kind == "layer", epsilon), scale, bias)
    count = x.shape[1] if kind == "instance" else groups
    grouped = wide(x).reshape(x.shape[0], count, -1)
    channels = (-1, *[1] * (x.ndim - 2))
    scale, bias = (None if v is None else v.reshape(channels) for v in (scale, bias))
    return _affine(_normalised(grouped, (2,), True, epsilon).reshape(x.shape), scale, bias)


def _normalised(x: Array, axes: tuple[int, ...], centre: bool, epsilon: float) -> Array:
    shifted = x - x.mean(axis=axes, keepdims=True) if centre else x
    return np.asarray(shifted / np.sqrt(np.square(shifted).mean(axis=axes, keepdims=True) + x.dtype.type(epsilon)))


def _affine(x: Array, scale: Array | None, bias: Array | None) -> Array:
    x = x if scale is None else x * wide(scale)
    return x if bias is None else x + wide(bias)

"""Element types by numpy name, with sizes; bfloat16 and smaller need ml_dtypes only to be seen as arrays."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

SIZES = {
    "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2,
    "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8, "uint64": 8,
    "bool": 1, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "int4": 1, "uint4": 1, "int2": 1, "uint2": 1, "float4_e2m1fn": 1,
}  # fmt: skip
LARGEST_HALF = 65504.0  # number of float16
HOST_ONLY = frozenset({"string", "object"})


def size_of(dtype: str) -> int:
    """Bytes an element takes in an arena (sub-byte types are kept one to a byte)."""
    return SIZES[dtype]


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy dtype of a name; imports ml_dtypes for those numpy itself lacks."""
    if name in HOST_ONLY:
        return np.dtype(object)
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def compact(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 numbers in two bytes where that loses nothing."""
    wide = array.astype(np.float32)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), wide) else wide

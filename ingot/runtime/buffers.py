"""Aligned memory and array addresses, with numpy alone."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
PAGE = 4096


def aligned_bytes(size: int, alignment: int = PAGE) -> Array:
    """A zeroed uint8 array of `size` bytes at a multiple of `alignment`, followed by 64 readable bytes."""
    raw = np.zeros(size + alignment + 64, np.uint8)
    start = -address_of(raw) % alignment
    return raw[start : start + size]


def address_of(array: Array) -> int:
    """Address of the first element."""
    flags = array.flags
    if flags.writeable and flags.c_contiguous and array.size and array.dtype.isbuiltin == 1:
        buffer: Any = array  # before Python 3.12 the types do not know that an array is one
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))  # a quarter of the time of what follows
    return int(array.__array_interface__["data"][0])

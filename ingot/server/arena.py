"""Tensors between two processes: a growing block of anonymous shared memory, and where in it each array lies."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.server.request import Array, bytes_elements

_ALIGNED = 64
_SMALLEST = 1 << 16
Entry = Sequence[Any]  # name, dtype ("bytes" for objects), shape, offset, bytes


class Arena:
    """One side writes arrays, the other maps the same memory. Not thread-safe: one exchange at a time."""

    def __init__(self, handle: int | None = None) -> None:
        self.handle = os.memfd_create("ingot-tensors", os.MFD_CLOEXEC) if handle is None else handle
        self._map: mmap.mmap | None = None
        self._view = np.zeros(0, np.uint8)

    def write(self, arrays: Mapping[str, Array]) -> list[Entry]:
        """Put arrays in, growing as needed; returns where they lie."""
        packed = {name: (_packed(array), array) for name, array in arrays.items()}
        entries: list[Entry] = []
        end = 0
        for name, (data, array) in packed.items():
            dtype = "bytes" if array.dtype == object else array.dtype.name
            entries.append((name, dtype, array.shape, end, data.nbytes))
            end += -(-data.nbytes // _ALIGNED) * _ALIGNED
        self._reserve(end)
        for (data, _), entry in zip(packed.values(), entries, strict=True):
            np.copyto(self._view[entry[3] : entry[3] + entry[4]], data)
        return entries

    def read(self, entries: Sequence[Entry], copy: bool) -> dict[str, Array]:
        """The arrays at the entries: views that hold until the next exchange, or copies."""
        self._reserve(max((entry[3] + entry[4] for entry in entries), default=0))
        return {entry[0]: self._array(entry, copy) for entry in entries}

    def _array(self, entry: Entry, copy: bool) -> Array:
        _, dtype, shape, offset, size = entry
        raw = self._view[offset : offset + size]
        if dtype == "bytes":
            return bytes_elements(entry[0], raw.data, int(np.prod(shape))).reshape(shape)
        array = raw.view(numpy_dtype(dtype)).reshape(shape)
        return array.copy() if copy else array

    def _reserve(self, size: int) -> None:
        """Map at least so many bytes; the file only grows, on whichever side needs it first."""
        if size <= self._view.size:
            return
        have = os.fstat(self.handle).st_size
        if have < size:
            have = max(_SMALLEST, 1 << (size - 1).bit_length())
            os.ftruncate(self.handle, have)
        self._map = mmap.mmap(self.handle, have)
        self._view = np.frombuffer(self._map, np.uint8)

    def close(self) -> None:
        """Give the memory back once no view of it is left."""
        self._view, self._map = np.zeros(0, np.uint8), None
        os.close(self.handle)


def _packed(array: Array) -> Array:
    """The bytes to copy, as a flat array."""
    if array.dtype == object:
        packed = b"".join(len(item).to_bytes(4, "little") + item for item in array.ravel())
        return np.frombuffer(packed, np.uint8)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)

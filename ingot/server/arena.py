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

    def write(self, groups: Sequence[Mapping[str, Array]]) -> list[list[Entry]]:
        """Put groups of arrays in, growing as needed; returns where they lie."""
        packed: list[tuple[int, Array]] = []
        entries: list[list[Entry]] = []
        end = 0
        for group in groups:
            entries.append([])
            for name, array in group.items():
                data, dtype = _packed(array), "bytes" if array.dtype == object else array.dtype.name
                entries[-1].append((name, dtype, array.shape, end, data.nbytes))
                packed.append((end, data))
                end += -(-data.nbytes // _ALIGNED) * _ALIGNED
        self._reserve(end)
        for at, data in packed:
            self._view[at : at + data.nbytes] = data
        return entries

    def read(self, groups: Sequence[Sequence[Entry]], copy: bool) -> list[dict[str, Array]]:
        """The groups at the entries: views that hold until the next exchange, or copies."""
        self._reserve(max((entry[3] + entry[4] for group in groups for entry in group), default=0))
        return [{entry[0]: self._array(entry, copy) for entry in group} for group in groups]

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

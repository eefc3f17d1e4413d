"""Native code in memory: an image is copied once, made executable and never writable again."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from functools import lru_cache

from ingot.errors import DeviceError
from ingot.runtime.machine import cpu_features

_PROT_READ, _PROT_EXEC = 1, 4


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


class Image:
    """Position-independent code mapped readable and executable; `address(symbol)` gives entry points."""

    def __init__(self, code: bytes | memoryview, symbols: Mapping[str, int]) -> None:
        cpu_features()  # tile registers are there only for those who asked
        size = max(len(code), 1)
        self._map = mmap.mmap(-1, size + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map[: len(code)] = bytes(code)
        anchor = ctypes.c_char.from_buffer(self._map)
        self._base = ctypes.addressof(anchor)
        self._anchor = anchor  # keeps the mapping from being closed under running code
        self._symbols = symbols
        if _libc().mprotect(self._base, len(self._map), _PROT_READ | _PROT_EXEC):
            raise DeviceError(
                f"the system refuses executable memory (errno {ctypes.get_errno()}); "
                "allow it, or run the engine as host steps with device='host'"
            )

    def address(self, symbol: str) -> int:
        """Address of a symbol of the image."""
        return self._base + self._symbols[symbol]

"""Where keys and values are: arrays of this process, or memory of a GPU that every run reads and writes in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ingot.dtypes import numpy_dtype, size_of
from ingot.runtime.buffers import aligned_bytes
from ingot.runtime.session import Session

_SHARE = 4  # of the free memory of a host, one part is for keys and values unless the user says how many blocks
_DEVICE_SHARE = 0.9  # of a GPU's, after activations: nobody else is there


class Pools(Protocol):
    """A pool per layer."""

    @property
    def nbytes(self) -> int: ...
    @property
    def feeds(self) -> Mapping[str, Any]:
        """Inputs that a run must be given."""
        ...

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Block a into block b, for every (a, b), in every layer."""
        ...


class HostPools:
    """Arrays that are inputs of every run."""

    def __init__(self, layers: int, shape: tuple[int, ...], dtype: str) -> None:
        kind = numpy_dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        self._pools = [aligned_bytes(size).view(kind).reshape(shape) for _ in range(layers)]
        self.feeds = {f"cache.{number}": pool for number, pool in enumerate(self._pools)}
        self.nbytes = size * layers

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Block a into block b, for every (a, b), in every layer."""
        for source, target in pairs:
            for pool in self._pools:
                pool[target] = pool[source]


class DevicePools:
    """Memory of the session's GPU."""

    def __init__(self, session: Session, layers: int, shape: tuple[int, ...], dtype: str) -> None:
        self._context = session.context
        size = int(np.prod(shape)) * size_of(dtype)
        self._block, self.nbytes = size // shape[0], size * layers
        self._pools = [self._context.allocate(size, "keys and values") for _ in range(layers)]
        for pool in self._pools:
            self._context.call("cuMemsetD8", pool.address, 0, size)
        session.keep({f"cache.{number}": (pool.address, shape) for number, pool in enumerate(self._pools)})
        self.feeds: Mapping[str, Any] = {}

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Block a into block b, for every (a, b), in every layer; runs before are waited for, those after wait."""
        self._context.activate()
        if pairs:
            self._context.call("cuCtxSynchronize")
        for source, target in pairs:
            for pool in self._pools:
                places = pool.address + target * self._block, pool.address + source * self._block
                self._context.call("cuMemcpyDtoD", *places, self._block)
        if pairs:
            self._context.call("cuCtxSynchronize")


def host_memory() -> int:
    """Bytes the system could give now."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def free_memory(session: Session) -> int:
    """Bytes that are free where the session computes."""
    return int(session.context.call("cuMemGetInfo")[0]) if session.on_device else host_memory()


def spare_memory(session: Session, activations: int) -> int:
    """Bytes that keys and values may take."""
    free = free_memory(session)
    return int((free - activations) * _DEVICE_SHARE) if session.on_device else free // _SHARE

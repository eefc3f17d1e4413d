"""Where keys and values are: arrays of this process, or memory of a GPU that every run reads and writes in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ingot.dtypes import numpy_dtype, size_of
from ingot.llm.batch import Array, Copy
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

    def copy(self, copies: Sequence[Copy]) -> None:
        """Block a into block b, for every (kind, a, b), in every layer of the kind."""
        ...


class HostPools:
    """Arrays that are inputs of every run. kinds: of each layer; shapes: of the pools of a kind."""

    def __init__(self, kinds: Sequence[int], shapes: Sequence[tuple[int, ...]], dtype: str) -> None:
        self._kinds = kinds
        self._pools = [_zeros(shapes[kind], numpy_dtype(dtype)) for kind in kinds]
        self.feeds = {f"cache.{number}": pool for number, pool in enumerate(self._pools)}
        self.nbytes = sum(pool.nbytes for pool in self._pools)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Block a into block b, for every (kind, a, b), in every layer of the kind."""
        for wanted, source, target in copies:
            for kind, pool in zip(self._kinds, self._pools, strict=True):
                if kind == wanted:
                    pool[target] = pool[source]


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return aligned_bytes(int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)


class DevicePools:
    """Memory of the session's GPU. kinds: of each layer; shapes: of the pools of a kind."""

    def __init__(self, session: Session, kinds: Sequence[int], shapes: Sequence[tuple[int, ...]], dtype: str) -> None:
        self._context, self._kinds = session.context, kinds
        sizes = [int(np.prod(shapes[kind])) * size_of(dtype) for kind in kinds]
        self._block, self.nbytes = sizes[0] // shapes[kinds[0]][0], sum(sizes)
        self._pools = [self._context.allocate(size, "keys and values") for size in sizes]
        for size, pool in zip(sizes, self._pools, strict=True):
            self._context.call("cuMemsetD8", pool.address, 0, size)
        session.keep({f"cache.{number}": (pool.address, shapes[kind])
                      for number, (kind, pool) in enumerate(zip(kinds, self._pools, strict=True))})  # fmt: skip
        self.feeds: Mapping[str, Any] = {}

    def copy(self, copies: Sequence[Copy]) -> None:
        """Block a into block b, for every (kind, a, b), in every layer of the kind; runs before are waited for, those
        after wait."""
        self._context.activate()
        if copies:
            self._context.call("cuCtxSynchronize")
        for wanted, source, target in copies:
            for pool in (pool for kind, pool in zip(self._kinds, self._pools, strict=True) if kind == wanted):
                places = pool.address + target * self._block, pool.address + source * self._block
                self._context.call("cuMemcpyDtoD", *places, self._block)
        if copies:
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

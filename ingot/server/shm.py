"""System shared memory: regions that clients register by name, read and written in place."""

from __future__ import annotations

import mmap
import os
import re
import threading
from dataclasses import dataclass
from typing import Any

from ingot.server.request import Code, Placement, ServerError, Tensor, from_bytes, invalid, to_bytes

_KEY = re.compile(r"/?[A-Za-z0-9_.\-]{1,250}")
CUDA_REFUSAL = "CUDA shared memory is not supported by this server: tensors reach its engines through the host's memory"


@dataclass(frozen=True, eq=False)
class Region:
    """A mapped region; `view` is exactly the registered bytes."""

    name: str
    key: str
    offset: int
    byte_size: int
    view: memoryview

    def as_plain(self) -> dict[str, Any]:
        """Its line of the status."""
        return {"name": self.name, "key": self.key, "offset": self.offset, "byte_size": self.byte_size}


class Regions:
    """Registered regions by name. A tensor keeps the mapping alive until it is answered, whatever is unregistered."""

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Map `byte_size` bytes from `offset` of the POSIX shared memory object `key`."""
        with self._lock:
            if name in self._regions:
                raise ServerError(Code.ALREADY_EXISTS, f"shared memory region '{name}' already in manager")
            self._regions[name] = _mapped(name, key, offset, byte_size)

    def unregister(self, name: str = "") -> None:
        """Forget one region, or all."""
        with self._lock:
            if not name:
                self._regions.clear()
            self._regions.pop(name, None)

    def status(self, name: str = "") -> list[dict[str, Any]]:
        """One region, or all."""
        if name:
            return [self._find(name).as_plain()]
        return [region.as_plain() for region in list(self._regions.values())]

    def tensor(self, name: str, datatype: str, shape: tuple[int, ...], place: Placement) -> Tensor:
        """An input that lies in a region."""
        return from_bytes(name, datatype, shape, self._slice(place))

    def write(self, tensor: Tensor, place: Placement) -> int:
        """Write an output into a region; returns its bytes."""
        raw = to_bytes(tensor)
        if len(raw) > place.byte_size:
            raise invalid(
                f"shared memory size specified with the request for output '{tensor.name}' ({place.byte_size} bytes) "
                f"should be at least {len(raw)} bytes to hold the results"
            )
        self._slice(place)[: len(raw)] = raw
        return len(raw)

    def _find(self, name: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            raise ServerError(Code.NOT_FOUND, f"Unable to find shared memory region: '{name}'")
        return region

    def _slice(self, place: Placement) -> memoryview:
        region = self._find(place.region)
        end = place.offset + place.byte_size
        if place.offset < 0 or place.byte_size < 0 or end > region.byte_size:
            raise invalid(
                f"Invalid offset + byte size for shared memory region: '{place.region}' has {region.byte_size} bytes, "
                f"the request asks for {place.byte_size} at {place.offset}"
            )
        return region.view[place.offset : end]


def _mapped(name: str, key: str, offset: int, byte_size: int) -> Region:
    """A region over /dev/shm; a key is one plain file name, so it cannot lead elsewhere."""
    if not _KEY.fullmatch(key) or key.strip("/") in (".", ".."):
        raise invalid(f"Unable to open shared memory region: '{name}': '{key}' is no shared memory key")
    if offset < 0 or byte_size <= 0:
        raise invalid(f"Unable to open shared memory region: '{name}': offset {offset}, byte size {byte_size}")
    try:
        handle = os.open(f"/dev/shm/{key.strip('/')}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise invalid(f"Unable to open shared memory region: '{name}': '{key}': {error.strerror}") from error
    try:
        size = os.fstat(handle).st_size
        if offset + byte_size > size:
            raise invalid(
                f"failed to register shared memory region '{name}': '{key}' has {size} bytes, "
                f"{byte_size} at {offset} were asked for"
            )
        mapped = mmap.mmap(handle, offset + byte_size)
    finally:
        os.close(handle)
    return Region(name, key, offset, byte_size, memoryview(mapped)[offset:])

"""Responses by what was asked: the same inputs of the same loaded version are computed once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ingot.server.config import Config
from ingot.server.model import Servable
from ingot.server.ports import Ports
from ingot.server.request import Done, Outcome, Request, Response, Tensor, to_bytes
from ingot.server.scheduler import Cancel, clock
from ingot.server.statistics import Statistics


class ResponseCache:
    """The most recently used responses of all models that fit into `capacity` bytes. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.bytes = capacity, 0
        self._kept: OrderedDict[bytes, tuple[Response, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Response | None:
        """A kept response, now the most recently used."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: bytes, response: Response) -> None:
        """Keep a copy of a response, dropping old ones; one too large for the cache is not kept."""
        outputs = tuple(Tensor(tensor.name, tensor.datatype, tensor.data.copy()) for tensor in response.outputs)
        size = sum(len(to_bytes(tensor)) for tensor in outputs) + len(key)
        if size > self.capacity:
            return
        with self._lock:
            self._drop(key)
            self._kept[key] = (replace(response, outputs=outputs), size)
            self.bytes += size
            while self.bytes > self.capacity:
                self._drop(next(iter(self._kept)))

    def _drop(self, key: bytes) -> None:
        dropped = self._kept.pop(key, None)
        self.bytes -= dropped[1] if dropped else 0


@dataclass(frozen=True, eq=False)
class CachedModel:
    """A servable behind a cache. `salt` tells one load of a version from the next."""

    inner: Servable
    cache: ResponseCache
    salt: bytes
    statistics: Statistics = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", self.inner.statistics)

    @property
    def version(self) -> int:
        """The inner model's."""
        return self.inner.version

    @property
    def config(self) -> Config:
        """The inner model's."""
        return self.inner.config

    @property
    def ports(self) -> Ports:
        """The inner model's."""
        return self.inner.ports

    @property
    def pending(self) -> int:
        """The inner model's."""
        return self.inner.pending

    @property
    def digests(self) -> Mapping[str, str]:
        """The inner model's."""
        return self.inner.digests

    def close(self) -> None:
        """Close the inner model; its responses fall out of the cache in time."""
        self.inner.close()

    def submit(self, request: Request, done: Done) -> Cancel:
        """Answer from the cache, or from the model and remember."""
        begun = clock()
        rows, _ = self.ports.check(request)
        key = key_of(self.salt, request)
        found = self.cache.get(key)
        self.statistics.looked_up(found is not None, clock() - begun)
        if found is not None:
            self.statistics.succeeded(clock() - begun, rows)
            done(replace(found, id=request.id))
            return lambda: False
        return self.inner.submit(request, lambda outcome: self._remember(key, outcome, done))

    def _remember(self, key: bytes, outcome: Outcome, done: Done) -> None:
        done(outcome)
        if isinstance(outcome, Response):
            self.cache.put(key, outcome)


def key_of(salt: bytes, request: Request) -> bytes:
    """A digest over everything that decides the response; inputs in the order of their names."""
    digest = hashlib.blake2b(salt, digest_size=32)
    digest.update("\0".join(output.name for output in request.outputs).encode())
    for tensor in sorted(request.inputs, key=lambda tensor: tensor.name):
        digest.update(f"\0{tensor.name}\0{tensor.datatype}\0{tensor.shape}\0".encode())
        digest.update(to_bytes(tensor))
    return digest.digest()

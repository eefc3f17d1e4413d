"""What runs a batch in this process: a session of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ingot.dtypes import HOST_ONLY
from ingot.engine import Engine
from ingot.runtime.session import Session
from ingot.server.request import Array


class Instance(Protocol):
    """One execution at a time."""

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Outputs by name; the arrays belong to the caller."""

    def close(self) -> None:
        """Give back what it holds."""


class SessionInstance:
    """A session; BYTES become the strings that an engine takes, and back."""

    def __init__(self, engine: Engine, device: str, threads: int | None) -> None:
        self._session = Session(engine, device, threads)
        self._texts = frozenset(spec.name for spec in engine.inputs if spec.dtype in HOST_ONLY)
        self._text_outputs = frozenset(spec.name for spec in engine.outputs if spec.dtype in HOST_ONLY)

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """One run of the engine."""
        if self._texts:
            feeds = {name: _decoded(data) if name in self._texts else data for name, data in feeds.items()}
        results = self._session.run(feeds)
        if self._text_outputs:
            results = {name: _encoded(data) if name in self._text_outputs else data for name, data in results.items()}
        return results

    def close(self) -> None:
        """End the session's threads."""
        self._session.close()


def _decoded(data: Array) -> Array:
    return _mapped(data, lambda item: item.decode())


def _encoded(data: Any) -> Array:
    return _mapped(np.asarray(data, object), lambda item: item if isinstance(item, bytes) else str(item).encode())


def _mapped(data: Array, change: Any) -> Array:
    changed = np.empty(data.shape, object)
    changed.ravel()[:] = [change(item) for item in data.ravel()]
    return changed

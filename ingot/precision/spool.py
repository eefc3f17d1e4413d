"""Samples and answers in any number: in memory as long as they are few, else in a file that is mapped."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Mapping
from typing import IO, Any

import numpy as np

LIMIT = 512 << 20
_ALIGNMENT = 64
Entry = Mapping[str, Any]


def held(entries: Iterable[Entry], limit: int = LIMIT) -> list[dict[str, Any]]:
    """All of them. Arrays beyond `limit` bytes in total are read from a temporary file when they are used, and cannot
    be written; the file goes with the last of them."""
    kept: list[dict[str, Any]] = []
    size = 0
    stream = iter(entries)
    for entry in stream:
        kept.append(dict(entry))
        size += sum(np.asarray(value).nbytes for value in entry.values())
        if size > limit:
            return [*kept, *_mapped(stream)]
    return kept


def _mapped(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    with tempfile.TemporaryFile(prefix="ingot-samples-") as file:
        places = [{name: _written(file, value) for name, value in entry.items()} for entry in entries]
        if not file.tell():
            return [{name: value for name, (value, _) in place.items()} for place in places]
        file.flush()
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return [{name: _read(content, *found) for name, found in place.items()} for place in places]


def _written(file: IO[bytes], value: Any) -> tuple[Any, int | None]:
    """(what stands for it, where its bytes are): the value itself where it is no array of numbers."""
    if not isinstance(value, np.ndarray) or not value.size or value.dtype.hasobject or value.dtype.kind in "SU":
        return value, None
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    place = file.tell()
    file.write(np.ascontiguousarray(value).tobytes())
    return (value.dtype, value.shape), place


def _read(content: mmap.mmap, value: Any, place: int | None) -> Any:
    if place is None:
        return value
    dtype, shape = value
    return np.frombuffer(content, dtype, int(np.prod(shape, dtype=np.int64)), place).reshape(shape)

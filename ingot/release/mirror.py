"""Mirrored requests: a version sees them too, its answers are compared with the user's and dropped."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ingot.release.upstream import Headers

MOST_UNDER_WAY = 16  # a worker's; more would cost the users something
_LARGEST = 1 << 20
_IGNORED = frozenset({"model_name", "model_version", "id", "created", "usage", "system_fingerprint", "model"})
_DTYPES = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "INT32": "<i4", "FP16": "<f2"}
Answer = tuple[int, Mapping[bytes, bytes], bytes]


class Mirrored:
    """Waits for both answers, then says once whether they agree. The mirror's is a Receiver."""

    def __init__(self, done: Callable[[bool], None]) -> None:
        self._done, self._status, self._headers = done, 0, dict[bytes, bytes]()
        self._pieces: list[bytes] = []
        self._user: Answer | None = None
        self._mirror: Answer | None = None
        self._over = False

    def user_answered(self, answer: Answer | None) -> None:
        """The user's answer; None if there was no good one, which is no comparison."""
        if answer is None:
            self._over = True
        self._user = answer
        self._compare()

    def head(self, status: int, headers: Headers) -> None:
        """The mirror's status."""
        self._status, self._headers = status, dict(headers)

    def data(self, piece: bytes) -> None:
        """A piece of the mirror's body."""
        self._pieces.append(piece)

    def complete(self) -> None:
        """The mirror's answer is whole."""
        self._mirror = (self._status, self._headers, b"".join(self._pieces))
        self._compare()

    def broken(self, reason: str, sent: bool, stale: bool) -> None:
        """No answer where the user got one: they disagree."""
        self._mirror = (0, {}, b"")
        self._compare()

    def _compare(self) -> None:
        if self._over or self._user is None or self._mirror is None:
            return
        self._over = True
        task = asyncio.get_running_loop().run_in_executor(None, alike, self._user, self._mirror)
        task.add_done_callback(lambda found: self._done(found.result()))


def alike(first: Answer, second: Answer) -> bool:
    """Whether two answers say the same: equal bytes; or the same outputs, each row's largest value in the same
    place."""
    if first[0] != second[0]:
        return False
    if first[2] == second[2]:
        return True
    if max(len(first[2]), len(second[2])) > _LARGEST:
        return False
    try:
        return _equal(_content(first), _content(second))
    except (ValueError, KeyError, TypeError):
        return False


def _content(answer: Answer) -> Any:
    """JSON without what may differ, tensors as arrays."""
    _, headers, body = answer
    length = int(headers.get(b"inference-header-content-length", len(body)))
    content = json.loads(body[:length])
    if isinstance(content, dict) and "outputs" in content:
        return _tensors(content["outputs"], body[length:])
    return content


def _tensors(outputs: list[dict[str, Any]], binary: bytes) -> dict[str, Any]:
    tensors, offset = {}, 0
    for output in outputs:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = np.asarray(output["data"])
        else:
            values = np.frombuffer(binary, _DTYPES[output["datatype"]], offset=offset, count=-1)[: _count(output)]
            offset += size
        tensors[output["name"]] = values.reshape(output["shape"])
    return tensors


def _count(output: dict[str, Any]) -> int:
    return math.prod(output["shape"])


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return _same_tensor(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        keys = (set(first) | set(second)) - _IGNORED
        return all(_equal(first.get(key), second.get(key)) for key in keys)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, float) and isinstance(second, float | int):
        return math.isclose(first, second, rel_tol=1e-3, abs_tol=1e-6)
    return bool(first == second)


def _same_tensor(first: np.ndarray, second: np.ndarray) -> bool:
    """Scores agree when every row's largest stands in the same place, other tensors when they are equal."""
    if first.shape != second.shape:
        return False
    if first.dtype.kind == "f" and first.ndim and first.shape[-1] > 1:
        return bool((first.argmax(-1) == second.argmax(-1)).all())
    if first.dtype.kind == "f":
        return bool(np.allclose(first, second, rtol=1e-3, atol=1e-6))
    return bool((first == second).all())

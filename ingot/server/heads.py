"""Heads of HTTP messages: of requests that were parsed before, known again byte for byte; of answers, as lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

LONGEST = 1 << 10  # bytes of the longest head that is remembered
_KEPT = 1024
_STATUS_LINE = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
} | {499: b"HTTP/1.1 499 Client Closed Request\r\n"}  # fmt: skip
Headers = Mapping[bytes, bytes] | bytes  # by name, or as the lines that go out


@dataclass(frozen=True, slots=True)
class Head:
    """What a request's head said; `length` of the body, 0 if there is none. `notes`: what a handler made of it."""

    method: bytes
    target: bytes
    headers: dict[bytes, bytes]
    length: int
    notes: dict[str, Any] = field(default_factory=dict)


class Heads:
    """Heads that need not be parsed again."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}

    def find(self, text: bytes) -> tuple[Head | None, int]:
        """The head that bytes begin with, if it is known, and its length."""
        size = text.find(b"\r\n\r\n") + 4
        return self._known.get(text[:size]), size

    def keep(self, text: bytes, head: Head) -> None:
        """Remember what bytes begin with: a head that the parser found plain, so that no other bytes can mean it."""
        text = text[: text.find(b"\r\n\r\n") + 4]
        if not text[:1].isalpha() or text.count(b"\n") != text.count(b"\r\n"):
            return
        if len(self._known) >= _KEPT:
            self._known.pop(next(iter(self._known)))
        self._known[text] = head


def header_lines(headers: Headers) -> bytes:
    """Headers as they go out."""
    return headers if isinstance(headers, bytes) else b"".join([b"%b: %b\r\n" % pair for pair in headers.items()])


def status_line(status: int) -> bytes:
    """The first line of an answer."""
    return _STATUS_LINE.get(status) or b"HTTP/1.1 %d\r\n" % status

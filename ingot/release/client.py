"""One HTTP call with a deadline that a server which trickles cannot outlive."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import time
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

_LARGEST = 64 << 20


class CallFailed(Exception):
    """No whole answer: refused, reset, no HTTP, too late."""


def call(
    method: str, url: str, body: bytes = b"", headers: Mapping[str, str] | None = None, timeout: float = 5.0
) -> tuple[int, bytes]:
    """(status, body); CallFailed says why there is none."""
    parts, end = urlsplit(url), time.monotonic() + timeout
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        with _connected(parts.scheme, parts.hostname or "", parts.port, timeout) as connection:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, b"".join(_pieces(answer, end, timeout))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CallFailed(f"{parts.netloc}: {str(error) or type(error).__name__}") from error


@contextlib.contextmanager
def _connected(scheme: str, host: str, port: int | None, timeout: float) -> Iterator[http.client.HTTPConnection]:
    connection: http.client.HTTPConnection
    if scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        yield connection
    finally:
        connection.close()


def _pieces(answer: http.client.HTTPResponse, end: float, timeout: float) -> Iterator[bytes]:
    size = 0
    while piece := answer.read1(1 << 16):
        size += len(piece)
        if time.monotonic() > end:
            raise TimeoutError(f"not answered within {timeout:g} s")
        if size > _LARGEST:
            raise ValueError("the answer is too large")
        yield piece

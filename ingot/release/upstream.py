"""HTTP/1.1 towards the versions' servers: kept connections, answers handed on as they come."""

from __future__ import annotations

import asyncio
import collections
import ssl
from collections.abc import Sequence
from typing import Any, Protocol

import httptools

Headers = list[tuple[bytes, bytes]]
_IDLE_KEPT = 256
_CONNECT_SECONDS = 2.0


class Receiver(Protocol):
    """Who waits for an answer. After `broken` or `complete` nothing more comes."""

    def head(self, status: int, headers: Headers) -> None:
        """The status and headers are here."""

    def data(self, piece: bytes) -> None:
        """A piece of the body."""

    def complete(self) -> None:
        """The answer is whole."""

    def broken(self, reason: str, sent: bool, stale: bool) -> None:
        """No whole answer will come. `sent`: the server may have begun to work; `stale`: a kept connection was
        found closed."""


class Call:
    """One request under way; `cancel` drops its connection."""

    __slots__ = ("_pool", "_timer", "connection", "message", "receiver", "started")

    def __init__(self, pool: Pool, message: Sequence[bytes | bytearray], receiver: Receiver) -> None:
        self._pool, self.message, self.receiver = pool, message, receiver
        self.connection: UpstreamConnection | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.started = False

    def cancel(self) -> None:
        """Nobody waits any more."""
        self.end()
        if self.connection is not None:
            self.connection.drop()

    def limit(self, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        """Break off unless the answer has begun by then, and whenever it stalls for as long."""
        self._timer = loop.call_later(seconds, self._late, seconds, loop)

    def _late(self, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        connection = self.connection
        if connection is not None and connection.moved:
            connection.moved = False
            self.limit(seconds, loop)
            return
        receiver, sent = self.receiver, connection is not None
        self.cancel()
        receiver.broken(f"no answer within {seconds:g} s", sent, False)

    def end(self) -> None:
        """The answer is whole or lost: no timer any more."""
        self.receiver = _NOBODY
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def flow(self, flowing: bool) -> None:
        """Read on, or wait for a slow client."""
        if self.connection is not None:
            self.connection.flow(flowing)


class _Nobody:
    """Hears nothing."""

    def head(self, status: int, headers: Headers) -> None: ...
    def data(self, piece: bytes) -> None: ...
    def complete(self) -> None: ...
    def broken(self, reason: str, sent: bool, stale: bool) -> None: ...


_NOBODY = _Nobody()


class Pool:
    """Connections to one server."""

    def __init__(self, host: str, port: int, tls: bool = False) -> None:
        self.host, self.port = host, port
        self._tls = ssl.create_default_context() if tls else None
        self.idle: collections.deque[UpstreamConnection] = collections.deque()
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()

    def call(
        self, message: Sequence[bytes | bytearray], receiver: Receiver, timeout: float, fresh: bool = False
    ) -> Call:
        """Send a request; its method is the message's first word."""
        call = Call(self, message, receiver)
        call.limit(timeout, self._loop)
        if self.idle and not fresh:
            self.idle.pop().send(call)
        else:
            task = self._loop.create_task(self._connect(call))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
        return call

    async def _connect(self, call: Call) -> None:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, connection = await self._loop.create_connection(
                    lambda: UpstreamConnection(self), self.host, self.port, ssl=self._tls
                )
        except (OSError, TimeoutError) as error:
            receiver = call.receiver
            call.end()
            receiver.broken(f"cannot connect to {self.host}:{self.port}: {error or 'timed out'}", False, False)
            return
        if call.receiver is _NOBODY:
            connection.keep()
        else:
            connection.send(call)

    def close(self) -> None:
        """Close what is idle."""
        for connection in tuple(self.idle):
            connection.drop()


class UpstreamConnection(asyncio.Protocol):
    """One connection: a request at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: Any = None
        self._call: Call | None = None
        self._used = self._until_close = self._reading_paused = False
        self.moved = False

    def connection_made(self, transport: Any) -> None:
        """Connected."""
        self._transport = transport

    def send(self, call: Call) -> None:
        """Send a request whose answer nobody else awaits here."""
        self._call, call.connection = call, self
        self._headers: Headers = []
        self._until_close, self.moved = False, False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.writelines(call.message)

    def keep(self) -> None:
        """Ready for another request."""
        if len(self._pool.idle) >= _IDLE_KEPT or self._transport.is_closing():
            self._transport.close()
        else:
            self._pool.idle.append(self)

    def drop(self) -> None:
        """Close without ceremony."""
        self._call = None
        self._transport.abort()

    def flow(self, flowing: bool) -> None:
        """Whether to read."""
        if flowing and self._reading_paused:
            self._transport.resume_reading()
        elif not flowing and not self._reading_paused:
            self._transport.pause_reading()
        self._reading_paused = not flowing

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer."""
        if self._call is None:  # nobody asked
            self._transport.abort()
            return
        self.moved = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._lost(f"{self._pool.host}:{self._pool.port} does not speak HTTP: {error}")
            self._transport.abort()

    def eof_received(self) -> bool:
        """The server closed."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Gone: an answer without a length is now whole, any other is lost."""
        if self in self._pool.idle:
            self._pool.idle.remove(self)
        if self._call is None:
            return
        if self._until_close and exc is None:
            self._whole(keep=False)
        else:
            self._lost(f"{self._pool.host}:{self._pool.port} closed the connection")

    def _lost(self, reason: str) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        receiver = call.receiver
        call.end()
        receiver.broken(reason, True, self._used and not self.moved)

    # -- parser -------------------------------------------------------------------------------------------------------
    def on_header(self, name: bytes, value: bytes) -> None:
        """A header of the answer."""
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is whole; an interim answer (1xx) is passed over."""
        status = self._parser.get_status_code()
        if self._call is None or 100 <= status < 200:
            self._headers = []
            return
        names = {name for name, _ in self._headers}
        self._until_close = not names & {b"content-length", b"transfer-encoding"} and status not in (204, 304)
        self._call.receiver.head(status, self._headers)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._call is not None:
            self._call.receiver.data(body)

    def on_message_complete(self) -> None:
        """The answer is whole."""
        if 100 <= self._parser.get_status_code() < 200:
            return
        self._whole(keep=self._parser.should_keep_alive())

    def _whole(self, keep: bool) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        receiver = call.receiver
        call.end()
        self.flow(True)
        self._used = True
        if keep:
            self.keep()
        else:
            self._transport.close()
        receiver.complete()

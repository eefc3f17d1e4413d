"""HTTP/1.1 over asyncio and httptools: connections, bodies, limits. Knows nothing of models.

A request is handed to the handler whole, as an `Exchange`. Large bodies are received straight into their final buffer.
Answers may come from any thread; those that come together wake the event loop once.
"""

from __future__ import annotations

import asyncio
import collections
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httptools

from ingot.server.heads import LONGEST, Head, Headers, Heads, header_lines, status_line
from ingot.server.listening import end_listening, usable
from ingot.server.lookout import Lookout
from ingot.server.mailbox import Mailbox

Handler = Callable[..., Any]  # of an Exchange; with another protocol, of what that one hands over
_NOT_PLAIN = {b"expect", b"upgrade", b"transfer-encoding"}  # headers that change how the rest is to be read
Part = bytes | bytearray | memoryview
_BREAKS = set(b"\r\n\0")  # what a header's value cannot hold
_SCRATCH = 64 << 10
_COPIED = 16 << 10  # bytes up to which one write of a joined answer is cheaper than several parts


@dataclass(frozen=True)
class Limits:
    """What one client may take; seconds and bytes."""

    body: int = 1 << 30
    header: int = 64 << 10
    connections: int = 10_000
    pipelined: int = 16
    stalled: float = 30.0
    idle: float = 120.0
    lingering: float = 2.0
    ask_after: float = 60.0  # of silence, until a gRPC client is asked whether it is there,
    answer_within: float = 20.0  # and to answer


class Exchange:
    """One request and the way to answer it. Headers have lower-case names.

    `notes`: whatever a handler puts there is there again for a request with the same head, byte for byte; None where
    heads are not remembered.
    """

    __slots__ = ("_connection", "body", "cancel", "flow", "headers", "keep_alive", "method", "notes", "target")

    def __init__(
        self, connection: Connection, method: bytes, target: bytes, headers: dict[bytes, bytes], keep_alive: bool,
        notes: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._connection, self.method, self.target, self.headers = connection, method, target, headers
        self.keep_alive, self.notes = keep_alive, notes
        self.body: bytes | bytearray = b""
        self.cancel: Callable[[], Any] | None = None
        self.flow: Callable[[bool], Any] | None = None  # told False when the client reads too slowly, True when again

    @property
    def address(self) -> str:
        """Where the client is."""
        return str((self._connection.peer or ("",))[0])

    def respond(self, status: int, parts: Sequence[Part] = (), headers: Headers | None = None) -> None:
        """Send the answer, whole; on the event loop's thread only (elsewhere: `post`)."""
        self._connection.respond(self, status, parts, headers or {})

    @property
    def here(self) -> bool:
        """Whether this is the event loop's thread."""
        return self._connection.front.mailbox.here()

    def begin(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        """Begin an answer of pieces."""
        self._connection.begin(self, status, headers)

    def piece(self, data: bytes) -> None:
        """One more piece; an empty one ends the answer."""
        self._connection.piece(self, data)

    def abandon(self) -> None:
        """Break off an answer that has begun, so that the client does not take it for whole."""
        self._connection.drop()

    def post(self, action: Callable[[], None]) -> None:
        """Run something on the event loop's thread, now or soon; from any thread."""
        self._connection.front.mailbox.run(action)


class Front:
    """Listens and keeps the connections."""

    def __init__(
        self, handler: Handler, limits: Limits | None = None, mailbox: Mailbox | None = None,
        protocol: Callable[[Front], asyncio.BaseProtocol] | None = None, lookout: Lookout | None = None,
    ) -> None:  # fmt: skip
        self.handler, self.limits, self.mailbox = handler, limits or Limits(), mailbox or Mailbox()
        self.connections: set[Any] = set()
        self._protocol, self.lookout = protocol or Connection, lookout or Lookout()
        self.heads = Heads()
        self.closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None, reuse: bool = False) -> int:
        """Listen; returns the port, chosen by the system if 0 was asked for."""
        return await self._listen(host=host, port=usable(port), ssl=tls, reuse_port=reuse or None)

    async def start_on(self, listening: socket.socket, tls: ssl.SSLContext | None = None) -> int:
        """The same on a socket that exists, which several processes may share."""
        return await self._listen(sock=listening, ssl=tls)

    async def _listen(self, **where: Any) -> int:
        self._loop = asyncio.get_running_loop()
        self.mailbox.open(self._loop)
        self._server = await self._loop.create_server(lambda: self._protocol(self), backlog=1024, **where)
        self._sweep()
        return self._server.sockets[0].getsockname()[1]

    def admitted(self, connection: Any, transport: Any) -> bool:
        """Keep a connection that was just made; one too many is dropped."""
        room = len(self.connections) < self.limits.connections and not self.closing
        self.connections.add(connection) if room else transport.abort()
        return room

    async def stop(self) -> None:
        """Stop listening, close idle connections; those in an exchange close after their answer."""
        self.closing = True
        if self._server is not None:
            for listening in self._server.sockets:
                end_listening(listening.fileno())
            self._server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in tuple(self.connections):
            connection.close_when_idle()

    def abort(self) -> None:
        """Drop what is left."""
        for connection in tuple(self.connections):
            connection.drop()

    def _sweep(self) -> None:
        """Once a second: close what stalls or idles."""
        now = time.monotonic()
        for connection in tuple(self.connections):
            connection.close_if_late(now)
        assert self._loop is not None
        self._sweeper = self._loop.call_later(1.0, self._sweep)


class Connection(asyncio.BufferedProtocol):
    """One client. Requests that arrive before the first is answered wait, and reading stops beyond a few."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self._transport: Any = None
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._waiting: collections.deque[Exchange] = collections.deque()
        self._active: Exchange | None = None
        self._progress = time.monotonic()
        self._paused_writing = self._closed = self._lingering = self._advancing = False
        self._fresh()

    def _fresh(self) -> None:
        """Ready for a next request's headers."""
        self._parser = httptools.HttpRequestParser(self)
        self._target, self._headers, self._header_bytes = b"", dict[bytes, bytes](), 0
        self._exchange: Exchange | None = None
        self._offered: Exchange | None = None
        self._body: bytearray | None = None
        self._length: int | None = None
        self._filled = 0
        self._between = True  # nothing of the next request has come
        self._parsed: Head | None = None
        self._begun = 0

    # -- transport ----------------------------------------------------------------------------------------------------
    def connection_made(self, transport: Any) -> None:
        """A client came."""
        self._transport = transport
        self._closed = not self.front.admitted(self, transport)

    @property
    def peer(self) -> Any:
        """The client's address and port."""
        return self._transport.get_extra_info("peername")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: what it waits for is cancelled."""
        self.front.connections.discard(self)
        self._leave()
        del self._parser  # it holds this connection: no circle for the collector, which comes by rarely
        self._scratch, self._exchange, self._offered = memoryview(b""), None, None

    def _leave(self) -> None:
        self._closed = True
        for exchange in (self._active, *self._waiting):
            if exchange is not None and exchange.cancel is not None:
                exchange.cancel()
        self._active = None
        self._waiting.clear()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: the rest of a large body, or the scratch buffer."""
        if self._body is not None and not self._lingering:
            return memoryview(self._body)[self._filled :]
        return self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes came."""
        if self._lingering:
            return
        self._progress = time.monotonic()
        if self._body is not None:
            self._filled += nbytes
            if self._filled == len(self._body):
                self._complete(self._body)
                self._fresh()
            return
        data = self._scratch[:nbytes]
        if self._between:
            data = self._take_known(data)
        if data:
            self._feed(data)

    def _take_known(self, data: memoryview) -> memoryview:
        """Accept requests whose heads have been parsed before, byte for byte the same; returns what is left."""
        while data and not self._closed:
            head, size = self.front.heads.find(bytes(data[:LONGEST]))
            if head is None:
                break
            exchange = Exchange(self, head.method, head.target, head.headers, True, head.notes)
            end = size + head.length
            exchange.body = bytes(data[size:end])
            if end > len(data):
                self._exchange, self._length, self._between = exchange, head.length, False
                self._receive_directly()
                return data[:0]
            data = data[end:]
            self._accept(exchange)
        return data

    def _remember(self, text: bytes) -> None:
        if self._parsed is not None:
            self.front.heads.keep(text, self._parsed)

    def _feed(self, data: memoryview) -> None:
        fresh, self._parsed, self._begun = self._between, None, 0
        try:
            self._parser.feed_data(data)
        except _Refused as refusal:
            self._refuse(refusal)
        except httptools.HttpParserUpgrade as upgrade:
            self._pass_over_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, _Refused) else _Refused(400, "malformed request"))
        except httptools.HttpParserError as error:
            self._refuse(_Refused(400, f"malformed HTTP request: {error}"))
        else:
            if fresh:
                self._remember(bytes(data[:LONGEST]))
            self._receive_directly()

    def _receive_directly(self) -> None:
        """If a body of known length has only begun, the rest bypasses the parser."""
        if self._exchange is None or self._length is None or self._closed:
            return
        begun = bytes(self._exchange.body)
        self._body = bytearray(self._length)
        self._body[: len(begun)] = begun
        self._filled = len(begun)

    def _pass_over_upgrade(self, rest: memoryview) -> None:
        """The request is answered as if no upgrade had been offered; its body is still to come, past the parser."""
        exchange, length = self._offered, self._length or 0
        self._fresh()
        if exchange is None or b"transfer-encoding" in exchange.headers:
            self._refuse(_Refused(400, "an upgrade cannot be offered with a chunked body"))
        elif len(rest) >= length:
            exchange.body = bytes(rest[:length])
            self._accept(exchange)
            if len(rest) > length:
                self._feed(rest[length:])
        else:
            exchange.body, self._exchange, self._length = bytes(rest), exchange, length
            self._receive_directly()

    def eof_received(self) -> bool:
        """The client is gone, or has said that it will send no more: taken as gone, so that its places become free."""
        self._leave()
        return False

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self._paused_writing = True
        self._tell_flow(False)

    def resume_writing(self) -> None:
        """It reads again."""
        self._paused_writing = False
        self._tell_flow(True)
        self._next()

    def _tell_flow(self, flowing: bool) -> None:
        if self._active is not None and self._active.flow is not None:
            self._active.flow(flowing)

    # -- parser -------------------------------------------------------------------------------------------------------
    def on_message_begin(self) -> None:
        """A request begins."""
        self._between = False
        self._begun += 1

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        self._target += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; repeated ones are joined."""
        self._count(len(name) + len(value) + 4)
        name = name.lower()
        self._headers[name] = self._headers[name] + b", " + value if name in self._headers else value

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self.front.limits.header:
            raise _Refused(431, f"the request's headers exceed {self.front.limits.header} bytes")

    def on_headers_complete(self) -> None:
        """All headers are here; the body follows."""
        parser, headers = self._parser, self._headers
        length = headers.get(b"content-length")
        if length is not None and int(length) > self.front.limits.body:
            raise _Refused(413, f"the request's body exceeds {self.front.limits.body} bytes")
        self._length = int(length) if length is not None else None
        self._exchange = Exchange(self, parser.get_method(), self._target, headers, parser.should_keep_alive())
        if self._begun == 1 and self._exchange.keep_alive and not headers.keys() & _NOT_PLAIN:
            self._parsed = Head(parser.get_method(), self._target, headers, self._length or 0)
        if headers.get(b"expect", b"").lower() == b"100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        exchange = self._exchange
        assert exchange is not None
        exchange.body = exchange.body + body if exchange.body else body
        if len(exchange.body) > self.front.limits.body:
            raise _Refused(413, f"the request's body exceeds {self.front.limits.body} bytes")
        if not isinstance(exchange.body, bytearray) and self._length is None:
            exchange.body = bytearray(exchange.body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        exchange = self._exchange
        assert exchange is not None
        self._target, self._headers, self._header_bytes, self._exchange, self._between = b"", {}, 0, None, True
        if self._parser.should_upgrade():
            self._offered = exchange
        else:
            self._length = None
            self._accept(exchange)

    # -- exchanges ----------------------------------------------------------------------------------------------------
    def _complete(self, body: bytearray) -> None:
        exchange = self._exchange
        assert exchange is not None
        exchange.body = body
        self._accept(exchange)

    def _accept(self, exchange: Exchange) -> None:
        if self._active is None and not (self._waiting or self._advancing or self._paused_writing or self._closed):
            self._active, self._advancing = exchange, True
            self.front.handler(exchange)
            self._advancing = False
            if self._waiting:
                self._next()
            return
        self._waiting.append(exchange)
        if len(self._waiting) >= self.front.limits.pipelined:
            self._transport.pause_reading()
        self._next()

    def _next(self) -> None:
        """Handle what waits, one after the other; an answer given at once does not nest the next one in it."""
        if self._advancing:
            return
        self._advancing = True
        while self._active is None and self._waiting and not self._paused_writing and not self._closed:
            self._active = exchange = self._waiting.popleft()
            if len(self._waiting) == self.front.limits.pipelined - 1:
                self._transport.resume_reading()
            self.front.handler(exchange)
        self._advancing = False

    def respond(self, exchange: Exchange, status: int, parts: Sequence[Part], headers: Headers) -> None:
        """Write a whole answer, then go on with the next request."""
        if self._closed or exchange is not self._active:
            return
        length = sum(map(len, parts))
        head = self._head(exchange, status, headers, b"content-length: %d\r\n\r\n" % length)
        if exchange.method == b"HEAD":
            self._transport.write(head)
        elif length < _COPIED:
            self._transport.write(b"".join((head, *parts)))
        else:
            self._transport.writelines((head, *parts))
        self._finish(exchange)

    def begin(self, exchange: Exchange, status: int, headers: Mapping[bytes, bytes]) -> None:
        """Write the head of an answer of pieces."""
        if not self._closed and exchange is self._active:
            self._transport.write(self._head(exchange, status, headers, b"transfer-encoding: chunked\r\n\r\n"))

    def piece(self, exchange: Exchange, data: bytes) -> None:
        """Write a piece."""
        if self._closed or exchange is not self._active:
            return
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        if not data:
            self._finish(exchange)

    def _head(self, exchange: Exchange, status: int, headers: Headers, framing: bytes) -> bytes:
        lines = [header_lines(headers)]
        identity = exchange.headers.get(b"x-request-id")
        if identity is not None and not _BREAKS & set(identity):
            lines.append(b"x-request-id: %b\r\n" % identity)
        if not exchange.keep_alive or self.front.closing:
            lines.append(b"connection: close\r\n")
        return b"".join((status_line(status), *lines, framing))

    def _finish(self, exchange: Exchange) -> None:
        self._active = exchange.cancel = exchange.flow = None  # they hold the exchange: no circles for the collector
        self._progress = time.monotonic()
        if not exchange.keep_alive or self.front.closing:
            self._closed = True
            self._transport.close()
        elif self._waiting:
            self._next()

    def _refuse(self, refusal: _Refused) -> None:
        """Answer what is no request, after the answers before it, and close."""
        if self._closed:
            return
        self._waiting.clear()
        body = b'{"error":"%b"}' % str(refusal).replace("\\", "/").replace('"', "'").encode()
        if self._active is None:
            self._transport.write(
                b"%bcontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
                % (status_line(refusal.status), len(body), body)
            )
        self._closed = True
        if self._transport.can_write_eof():  # a close with input unread would reset, and the client lose the answer
            self._lingering = True
            self._transport.write_eof()
        else:
            self._transport.close()

    # -- closing ------------------------------------------------------------------------------------------------------
    def close_when_idle(self) -> None:
        """Close now, or after the answer that is being made."""
        if self._active is None and not self._waiting:
            self._closed = True
            self._transport.close()

    def close_if_late(self, now: float) -> None:
        """Close a client that stalls within a request or while it is written to, or has been idle for long."""
        limits, quiet = self.front.limits, now - self._progress
        if self._lingering and quiet > limits.lingering:
            self.drop()
        receiving = self._exchange is not None or bool(self._target)
        if self._active is not None and not self._paused_writing:
            return
        if quiet > (limits.stalled if receiving or self._paused_writing else limits.idle):
            self.drop()

    def drop(self) -> None:
        """Close without ceremony."""
        self._transport.abort()


class _Refused(Exception):
    """Bytes that are no acceptable request."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

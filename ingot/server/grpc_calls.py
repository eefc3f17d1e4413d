"""gRPC's calls over HTTP/2's streams: messages behind their lengths, compression, deadlines, statuses. Knows nothing of
models.
"""

from __future__ import annotations

import asyncio
import logging
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import zttp

from ingot.errors import IngotError
from ingot.server import http_codec
from ingot.server.http2 import Header, Stream
from ingot.server.mailbox import Mailbox
from ingot.server.request import ServerError
from ingot.server.scheduler import as_server_error
from ingot.server.wire import Part

log = logging.getLogger("ingot.server.grpc")
Message = bytes | bytearray
STATUSES: Mapping[str, int] = {
    "OK": 0, "CANCELLED": 1, "UNKNOWN": 2, "INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": 4, "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6, "RESOURCE_EXHAUSTED": 8, "UNIMPLEMENTED": 12, "INTERNAL": 13, "UNAVAILABLE": 14,
    "UNAUTHENTICATED": 16,
}  # fmt: skip
_KIND = (b"content-type", b"application/grpc")
_HEAD = [_KIND, (b"grpc-accept-encoding", b"identity,deflate,gzip")]
_JOINED = 16 << 10  # bytes up to which a message and its length are sent in one piece
_STATUS = {name: [(b"grpc-status", b"%d" % number)] for name, number in STATUSES.items()}
_ENCODINGS = (b"identity", b"gzip", b"deflate")
_PLAIN = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"  # what a status' message says as it is
_HELD, _MOST_HELD = 1 << 20, 16 << 20  # bytes behind messages being answered: when a client is to wait, or ends
_LONGEST = 2000  # bytes of it: clients take 8 KiB of headers, and a byte may take three
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


@dataclass
class Calls:
    """Opens a call for each stream: `methods` by path are told of it, and say what is to happen to its messages."""

    methods: Mapping[bytes, Callable[[Call], None]]
    limit: int
    pool: ThreadPoolExecutor
    mailbox: Mailbox = field(default_factory=Mailbox)

    def __call__(self, stream: Stream, request: zttp.Request) -> Call:
        """A stream's receiver."""
        call = Call(stream, dict(request.headers), self)
        if not call.metadata.get(b"content-type", b"").startswith(b"application/grpc"):
            call.refuse(415)
        elif (method := self.methods.get(request.target)) is None:
            call.end("UNIMPLEMENTED", f"there is no method {request.target.decode('latin-1')}")
        elif b"grpc-encoding" in call.metadata and call.metadata[b"grpc-encoding"] not in _ENCODINGS:
            call.end("UNIMPLEMENTED", "messages are taken as they are, or compressed by gzip or deflate")
        else:
            method(call)
        return call


def _ignored(*_: Any) -> None:
    """What happens to a call that is over does not matter."""


class Call:
    """One call, a receiver of its stream; to be used on the event loop's thread only (elsewhere: `post`).

    `on_message` is given the client's messages while there is `room`, `on_closed` follows the last one; `on_flowing`
    says that what was sent is on its way; `cancel` is called when the client does not wait any longer.
    """

    def __init__(self, stream: Stream, metadata: dict[bytes, bytes], calls: Calls) -> None:
        self._stream: Stream | None = stream
        self.metadata, self._calls, self.room = metadata, calls, 1 << 30
        self.on_message: Callable[[Message], None] = _ignored
        self.on_closed: Callable[[], None] = _ignored
        self.on_flowing: Callable[[], None] = _ignored
        self.cancel: Callable[[], Any] | None = None
        self._begun = self._busy = self._parsing = self._heard_all = False
        self._prefix, self._held = bytearray(), bytearray()
        self._message: bytearray | None = None
        self._filled = 0
        self._timer: asyncio.TimerHandle | None = None

    def text(self, name: bytes) -> str:
        """A header; empty if it was not sent."""
        return self.metadata.get(name, b"").decode("latin-1")

    @property
    def open(self) -> bool:
        """Whether anybody waits for an answer."""
        return self._stream is not None

    @property
    def address(self) -> str:
        """Where the client is."""
        return self._stream.address if self._stream is not None else ""

    def post(self, action: Callable[[], None]) -> None:
        """Run something on the event loop's thread, now or soon; from any thread."""
        self._calls.mailbox.run(action)

    # -- answering ----------------------------------------------------------------------------------------------------
    def respond(self, *message: Part) -> None:
        """The only answer, in parts."""
        if self._stream is not None:
            stream = self._left()
            stream.answer(_HEAD, _framed(message), self._trailers("OK"))

    def send(self, message: bytes) -> None:
        """One of several answers."""
        if self._stream is None:
            return
        if not self._begun:
            self._begun = True
            self._stream.begin(_HEAD)
        self._stream.send(b"".join(_framed((message,))))

    @property
    def unread(self) -> int:
        """Answers that wait for the client to read those before."""
        return len(self._stream.unsent) if self._stream is not None else 0

    @property
    def flows(self) -> bool:
        """Whether everything sent so far is on its way."""
        return self._stream is None or self._stream.flows

    def end(self, status: str = "OK", message: str = "") -> None:
        """No more answers."""
        trailers = [*self._trailers(status)]
        if message:
            shown = message.encode()[:_LONGEST].decode(errors="ignore")
            trailers.append((b"grpc-message", urllib.parse.quote(shown, safe=_PLAIN).encode()))
        if self._stream is None:
            return
        begun, stream = self._begun, self._left()
        if begun:
            stream.finish(trailers)
        else:
            stream.refuse(200, [_KIND, *trailers])

    def _trailers(self, status: str) -> list[Header]:
        identity = self.metadata.get(b"x-request-id")
        return [*_STATUS[status], (b"x-request-id", identity)] if identity is not None else _STATUS[status]

    def fail(self, error: Exception) -> None:
        """End with what an exception says."""
        failure = reported(error)
        self.end(failure.code.value[1], str(failure))

    def refuse(self, status: int) -> None:
        """This is no call: an HTTP status."""
        if self._stream is not None:
            self._left().refuse(status, [])

    def _left(self) -> Stream:
        """Nobody waits any longer; what refers to this call in a circle is let go."""
        stream, self._stream = self._stream, None
        assert stream is not None
        self.on_message = self.on_closed = self.on_flowing = _ignored
        self.cancel = None
        if self._timer is not None:
            self._timer.cancel()
        return stream

    # -- deadlines ----------------------------------------------------------------------------------------------------
    def waits(self) -> None:
        """It was not answered at once: from now on its deadline counts."""
        match = _TIMEOUT.fullmatch(self.metadata.get(b"grpc-timeout", b""))
        if match is not None and self._stream is not None:
            seconds = int(match[1]) * _SECONDS[match[2]]
            self._timer = asyncio.get_running_loop().call_later(seconds, self._late)

    def _late(self) -> None:
        cancel = self.cancel
        self.end("DEADLINE_EXCEEDED", "the call's deadline has passed")
        if cancel is not None:
            cancel()

    # -- the stream's receiver ----------------------------------------------------------------------------------------
    @property
    def incomplete(self) -> bool:
        """A message has begun, and its end is still to come."""
        return bool(self._prefix) or self._message is not None

    def data(self, part: bytes) -> None:
        """Some bytes."""
        if self._stream is None:
            return
        if self._held or not self._ready():
            self._hold(part)
        elif not self._prefix and not self._message and _is_whole(part, self._calls.limit):
            self._deliver(part[0], bytearray(memoryview(part)[5:]))
        else:
            self._parse(memoryview(part))

    def ended(self) -> None:
        """The client has said everything."""
        self._heard_all = True
        self._perhaps_closed()

    def flowing(self) -> None:
        """What was sent is on its way."""
        self.on_flowing()

    def gone(self) -> None:
        """The client waits no longer."""
        if self._stream is not None:
            cancel = self.cancel
            self._left()
            if cancel is not None:
                cancel()

    def resume(self) -> None:
        """Go on with the messages that wait, if there is room."""
        if self._held and not self._parsing and self._ready():
            held, self._held = self._held, bytearray()
            self._parse(memoryview(held))
            if self._stream is not None and len(self._held) <= _HELD:
                self._stream.full(False)
            self._perhaps_closed()

    def _ready(self) -> bool:
        return self.room > 0 and not self._busy and self._stream is not None

    def _perhaps_closed(self) -> None:
        if not self._heard_all or self._held or self._busy:
            return
        if self.incomplete:
            self.end("INVALID_ARGUMENT", "the call ends within a message")
        else:
            self.on_closed()

    def _parse(self, view: memoryview) -> None:
        self._parsing = True
        while view and self._ready():
            view = self._fill(view) if self._message is not None else self._open(view)
        self._parsing = False
        if view and self._stream is not None:
            self._hold(view)

    def _hold(self, part: bytes | memoryview) -> None:
        """Keep what there is no room for; a client that does not mind its window is not let go on."""
        self._held += part
        if self._stream is not None and len(self._held) > _HELD:
            self._stream.full(True)
        if len(self._held) > _MOST_HELD:
            cancel = self.cancel
            self.end("RESOURCE_EXHAUSTED", f"more than {_MOST_HELD} bytes wait behind messages without answers")
            if cancel is not None:
                cancel()

    def _open(self, view: memoryview) -> memoryview:
        """Read a message's length, and the message if it is all there."""
        need = 5 - len(self._prefix)
        self._prefix += view[:need]
        view = view[need:]
        if len(self._prefix) < 5:
            return view
        length = int.from_bytes(self._prefix[1:], "big")
        if length > self._calls.limit:
            self.end("RESOURCE_EXHAUSTED", f"a message of {length} bytes, {self._calls.limit} are allowed")
        elif length <= len(view):
            self._deliver(self._packed(), bytearray(view[:length]))
            return view[length:]
        else:
            self._message, self._filled = bytearray(length), 0
        return view

    def _fill(self, view: memoryview) -> memoryview:
        """Go on with a message that has begun."""
        assert self._message is not None
        part = view[: len(self._message) - self._filled]
        self._message[self._filled : self._filled + len(part)] = part
        self._filled += len(part)
        if self._filled == len(self._message):
            message, self._message = self._message, None
            self._deliver(self._packed(), message)
        return view[len(part) :]

    def _packed(self) -> int:
        """Whether the message behind the length that was read is compressed; it is over."""
        packed = self._prefix[0]
        self._prefix.clear()
        return packed

    def _deliver(self, packed: int, message: Message) -> None:
        self.room -= 1
        if not packed:
            self.on_message(message)
            return
        self._busy = True  # the messages behind it wait: they are answered in order
        self._calls.pool.submit(self._unpack, message)

    def _unpack(self, message: Message) -> None:
        encoding = self.metadata.get(b"grpc-encoding", b"identity")
        try:
            unpacked: Message | Exception = http_codec.decompressed(message, encoding, self._calls.limit)
        except Exception as error:  # noqa: BLE001 - becomes the call's status
            unpacked = error
        self.post(partial(self._unpacked, unpacked))

    def _unpacked(self, message: Message | Exception) -> None:
        self._busy = False
        if isinstance(message, Exception):
            self.fail(message)
        else:
            self.on_message(message)
            self.resume()
            self._perhaps_closed()


def unary(action: Callable[[Call, Message], None]) -> Callable[[Call], None]:
    """A method that answers one message; what it raises becomes the call's status."""

    def begin(call: Call) -> None:
        only = _Only(action, call)
        call.on_message, call.on_closed = only.take, only.act

    return begin


class _Only:
    """The only message of a call, and what is to happen to it."""

    __slots__ = ("_action", "_call", "_message")

    def __init__(self, action: Callable[[Call, Message], None], call: Call) -> None:
        self._action, self._call = action, call
        self._message: Message | None = None

    def take(self, message: Message) -> None:
        """It came."""
        if self._message is not None:
            self._call.end("INVALID_ARGUMENT", "this call takes one message")
        self._message = message

    def act(self) -> None:
        """There are no more."""
        if self._message is None:
            self._call.end("INVALID_ARGUMENT", "this call takes a message")
            return
        try:
            self._action(self._call, self._message)
        except Exception as error:  # noqa: BLE001 - becomes the call's status
            self._call.fail(error)


def reported(error: Exception) -> ServerError:
    """An exception as the answer to a call; what nobody has foreseen is logged."""
    if not isinstance(error, IngotError):
        log.error("a call failed", exc_info=error)
    return as_server_error(error)


def _is_whole(part: bytes, limit: int) -> bool:
    """Whether some bytes are one message behind its length, and nothing else."""
    return 0 <= len(part) - 5 == int.from_bytes(part[1:5], "big") <= limit


def _framed(message: Sequence[Part]) -> Sequence[Part]:
    """A message behind its length."""
    size = sum(map(len, message))
    prefix = b"\x00" + size.to_bytes(4, "big")
    return (b"".join((prefix, *message)),) if size <= _JOINED else (prefix, *message)

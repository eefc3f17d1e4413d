"""HTTP/2 over asyncio and zttp: connections and their streams, as much as gRPC needs. Knows nothing of messages.

zttp speaks the protocol: frames, headers, windows, floods. A client's stream is handed to the front's handler with its
headers; what follows goes to the `Receiver` that this returns. `wire.Front` listens and keeps the connections.
"""

from __future__ import annotations

import asyncio
import collections
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import zttp

from ingot.server.wire import Front, Part

Header = tuple[bytes, bytes]
_REFUSED, _CANCELLED = 7, 8  # codes of RFC 9113
_STREAMS, _RESETS = 3_584, 64  # after so many a connection is retired: zttp breaks it off at 4,096 and 256
_FRAME = struct.Struct(">IBI")  # length << 8 | kind, flags, stream
_SETTINGS, _PING, _WINDOW = 4, 6, 8
_LAST = (1 << 31) - 1


def _frame(kind: int, number: int, payload: bytes) -> bytes:
    return _FRAME.pack(len(payload) << 8 | kind, 0, number) + payload


def _window(number: int, size: int) -> bytes:
    return _frame(_WINDOW, number, struct.pack(">I", size))


# zttp announces windows of 64 KiB, with which large tensors take a round trip for each: these make them 4 and 64 MiB
_WIDER = _frame(_SETTINGS, 0, struct.pack(">HI", 4, 4 << 20)) + _window(0, 64 << 20)


class Receiver(Protocol):
    """What happens to a stream; always on the event loop's thread."""

    @property
    def incomplete(self) -> bool:
        """Whether a message has begun, and its end is still to come."""

    def data(self, part: bytes) -> None:
        """Some bytes."""

    def ended(self) -> None:
        """The client will send no more."""

    def waits(self) -> None:
        """What came with the stream's headers has been dealt with, and the stream is still open."""

    def flowing(self) -> None:
        """Everything sent so far is on its way."""

    def gone(self) -> None:
        """The client has given the stream up, or is gone itself."""


Handler = Callable[["Stream", "zttp.Request"], Receiver]


class _Nobody:
    """Receives nothing: whose stream has not been handed to anybody yet."""

    incomplete = False

    def data(self, part: bytes) -> None: ...
    def ended(self) -> None: ...
    def waits(self) -> None: ...
    def flowing(self) -> None: ...
    def gone(self) -> None: ...


_NOBODY = _Nobody()


class Stream:
    """One exchange of a connection; to be used on the event loop's thread only."""

    __slots__ = ("_connection", "ended", "heard_all", "number", "out", "progress", "receiver", "trailers", "unsent")

    def __init__(self, connection: Connection, number: int, out: zttp.Stream) -> None:
        self._connection, self.number, self.out = connection, number, out
        self.receiver: Receiver = _NOBODY
        self.heard_all, self.ended, self.progress = False, False, connection.progress
        self.unsent: collections.deque[Part] = collections.deque()
        self.trailers: list[Header] | None = None  # they follow what is unsent

    @property
    def address(self) -> str:
        """Where the client is."""
        return str((self._connection.peer or ("",))[0])

    @property
    def flows(self) -> bool:
        """Whether everything sent so far is on its way."""
        return not self.unsent and not self.out.pending_bytes

    def begin(self, headers: list[Header]) -> None:
        """Send headers."""
        self.out.send_response(200, headers)
        self._connection.flush()

    def send(self, data: Part) -> None:
        """Send data, as the client's windows allow."""
        self.unsent.append(data)
        self._connection.advance(self)

    def finish(self, trailers: list[Header]) -> None:
        """Send the last headers, behind all data; the stream is over."""
        self.trailers = trailers
        self._connection.advance(self)

    def answer(self, headers: list[Header], parts: Sequence[Part], trailers: list[Header]) -> None:
        """Everything at once."""
        self.out.send_response(200, headers)
        self.unsent.extend(parts)
        self.trailers = trailers
        self._connection.advance(self)

    def full(self, full: bool) -> None:
        """Whether the receiver has as much as it can deal with for now: the client is to wait."""
        self._connection.full(self, full)

    def refuse(self, status: int, headers: list[Header]) -> None:
        """Headers alone; the stream is over."""
        self.out.send_response(status, headers, True)
        self._connection.refused(self)


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self._engine = zttp.Connection(zttp.SERVER, zttp.HTTP2)
        self._transport: Any = None
        self._streams: dict[int, Stream] = {}
        self._blocked: dict[int, Stream] = {}  # have something to send, and no window or no reader for it
        self._full: dict[int, int] = {}  # have received more than they can deal with: bytes not yet asked for again
        self._unheard: dict[int, Stream] = {}  # answered before the client has said everything: it may stop now
        self._new: list[Stream] = []  # streams whose headers were among what was read last
        self._opened = self._resets = self._last = 0
        self.progress, self._asked = time.monotonic(), False
        self._greeted = self._reading = self._paused = self._farewell = self._leaving = self._closed = False

    # -- transport ----------------------------------------------------------------------------------------------------
    def connection_made(self, transport: Any) -> None:
        """A client came."""
        self._transport = transport
        if not self.front.admitted(self, transport):
            self._closed = True
            return
        self._engine.initiate_connection()
        transport.write(self._engine.data_to_send() + _WIDER)

    @property
    def peer(self) -> Any:
        """The client's address and port."""
        return self._transport.get_extra_info("peername")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: what it waits for is cancelled."""
        self.front.connections.discard(self)
        self._leave()

    def eof_received(self) -> bool:
        """The same: a client that sends no more cannot widen our windows either."""
        return False

    def _leave(self) -> None:
        self._closed = True
        streams, self._streams = tuple(self._streams.values()), {}
        self._blocked.clear()
        for stream in streams:
            stream.receiver.gone()

    def pause_writing(self) -> None:
        """The client reads too slowly: nothing more is taken from it either."""
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._paused = False
        if not self._closed:
            self._transport.resume_reading()
            self._advance_blocked()

    def data_received(self, data: bytes) -> None:
        """Bytes came: hand on what they say, and send what that has led to in one piece."""
        self.front.lookout.heard()
        self.progress, self._asked, self._reading = time.monotonic(), False, True
        try:
            self._engine.receive_data(data)
            while (event := self._engine.next_event()) is not zttp.NEED_DATA and not self._closed:
                taker = _TAKERS.get(type(event))
                if taker is not None:
                    taker(self, event)
        except zttp.RemoteProtocolError:
            self._break()
        finally:
            self._reading = False
        self.flush()
        if self._new:
            new, self._new = self._new, []
            for stream in new:
                if stream.number in self._streams:
                    stream.receiver.waits()

    def _break(self) -> None:
        """The client does not keep to the protocol; what zttp says to that is sent before the end."""
        self._transport.write(self._engine.data_to_send())
        self._transport.close()
        self._leave()

    # -- events -------------------------------------------------------------------------------------------------------
    def _on_request(self, event: zttp.Request) -> None:
        number, out = event.stream_id, self._engine.stream(event.stream_id)
        if self._leaving:
            out.reset(_REFUSED)  # the client asks on another connection
            return
        stream = self._streams[number] = Stream(self, number, out)
        stream.heard_all = event.end_stream
        self._opened, self._last = self._opened + 1, number
        if self._opened >= _STREAMS:
            self.close_when_idle()
        self._new.append(stream)
        stream.receiver = self.front.handler(stream, event)
        if event.end_stream:
            stream.receiver.ended()

    def _on_data(self, event: zttp.Data) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is not None:
            stream.progress = self.progress
            stream.receiver.data(event.data)

    def _on_end(self, event: zttp.EndOfMessage) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None:
            self._heard(event.stream_id)
        else:
            stream.heard_all = True
            stream.receiver.ended()

    def _heard(self, number: int) -> None:
        """All of a stream that was answered before."""
        if self._unheard.pop(number, None) is not None:
            self._full.pop(number, None)

    def _on_reset(self, event: zttp.RstStream) -> None:
        self._heard(event.stream_id)
        self._resets += 1
        if self._resets >= _RESETS:
            self.close_when_idle()
        stream = self._streams.get(event.stream_id)
        if stream is not None:
            self._forget(stream)
            stream.receiver.gone()

    def _on_window(self, event: zttp.WindowUpdate) -> None:
        for stream in tuple(self._blocked.values()):
            if event.stream_id in (0, stream.number):
                stream.progress = self.progress
                self.advance(stream)

    def _on_goaway(self, event: zttp.GoAway) -> None:
        """The client opens no more streams; those that are open end as they would."""
        self._leaving = True

    def _on_settings(self, event: zttp.Settings) -> None:
        self._greeted = True
        self._advance_blocked()

    # -- sending ------------------------------------------------------------------------------------------------------
    def flush(self) -> None:
        """Write what zttp has made; once, after everything that came together."""
        if not self._reading and not self._closed:
            data = self._engine.data_to_send()
            if data:
                self._transport.write(self._withholding(data) if self._full else data)
                self.front.lookout.answered()

    def _withholding(self, data: bytes) -> bytes:
        """The frames without those that widen the windows of full streams."""
        kept, at = bytearray(), 0
        while at < len(data):
            head, _, number = _FRAME.unpack_from(data, at)
            end = at + _FRAME.size + (head >> 8)
            if head & 0xFF == _WINDOW and number in self._full:
                self._full[number] += int.from_bytes(data[end - 4 : end], "big")
            else:
                kept += data[at:end]
            at = end
        return bytes(kept)

    def full(self, stream: Stream, full: bool) -> None:
        """A stream has received more than it can deal with: its window is not widened until it has."""
        if full and stream.number in self._streams:
            self._full.setdefault(stream.number, 0)
        elif credit := self._full.pop(stream.number, 0):
            self._write(_window(stream.number, credit))

    def _write(self, frame: bytes) -> None:
        """A frame of ours, behind what zttp has made."""
        if not self._closed:
            self._transport.write(self._engine.data_to_send() + frame)

    def advance(self, stream: Stream) -> None:
        """Send what a stream has, as far as the client takes it."""
        if stream.number not in self._streams:
            return
        while stream.unsent and not self._paused and not stream.out.pending_bytes:
            stream.out.send_data(stream.unsent.popleft())
            stream.progress = self.progress
        if stream.trailers is not None and not stream.unsent and not stream.ended:
            stream.ended = True
            stream.out.end_message(stream.trailers)
        if not stream.flows:
            self._blocked[stream.number] = stream
        elif stream.ended:
            self._over(stream)
        elif self._blocked.pop(stream.number, None):
            stream.receiver.flowing()
        self.flush()

    def _advance_blocked(self) -> None:
        for stream in tuple(self._blocked.values()):
            self.advance(stream)

    def refused(self, stream: Stream) -> None:
        """A stream has been answered by its headers alone."""
        self._over(stream)
        self.flush()

    def _over(self, stream: Stream) -> None:
        """A client that still speaks stops when it hears the answer. Until then its window is not widened: what is on
        its way would be a mistake on a stream that we had ended, and many of those end the connection."""
        self._forget(stream)
        if not stream.heard_all:
            self._unheard[stream.number] = stream
            self._full[stream.number] = 0

    def _forget(self, stream: Stream) -> None:
        self._streams.pop(stream.number, None)
        self._blocked.pop(stream.number, None)
        self._full.pop(stream.number, None)
        stream.unsent.clear()

    # -- closing ------------------------------------------------------------------------------------------------------
    def close_when_idle(self) -> None:
        """Take no more streams, in two steps: the client is told; once it must have heard, new ones are refused.

        It is the client that closes then: a close from here could meet a call on its way.
        """
        if not self._farewell and not self._leaving:
            self._farewell = True
            self._engine.close(0, _LAST)
            self._write(_frame(_PING, 0, bytes(8)))

    def _on_ping(self, event: zttp.Ping) -> None:
        if event.ack and self._farewell and not self._leaving:
            self._leaving = True
            self._engine.close(0, self._last)

    def close_if_late(self, now: float) -> None:
        """Close a client that does not greet, does not read, was bidden farewell, or is silent even when asked."""
        quiet, limits = now - self.progress, self.front.limits
        if self._leaving and not self._streams and quiet > limits.lingering:
            self._transport.close()
        elif quiet > (limits.stalled if not self._greeted or self._paused else limits.ask_after + limits.answer_within):
            self.drop()
        elif quiet > limits.ask_after and not self._asked:
            self._asked = True
            self._write(_frame(_PING, 0, bytes(8)))
        for stream in [stream for stream in self._unheard.values() if now - stream.progress > limits.stalled]:
            stream.out.reset(0)
            self._heard(stream.number)
        for stream in tuple(self._streams.values()):
            stalls = stream.receiver.incomplete or stream.number in self._blocked
            if stalls and now - stream.progress > limits.stalled:
                stream.out.reset(_CANCELLED)
                self._forget(stream)
                stream.receiver.gone()
        self.flush()

    def drop(self) -> None:
        """Close without ceremony."""
        self._transport.abort()


_TAKERS: dict[type, Callable[[Connection, Any], None]] = {
    zttp.Request: Connection._on_request, zttp.Data: Connection._on_data, zttp.EndOfMessage: Connection._on_end,
    zttp.RstStream: Connection._on_reset, zttp.WindowUpdate: Connection._on_window, zttp.GoAway: Connection._on_goaway,
    zttp.Settings: Connection._on_settings, zttp.Ping: Connection._on_ping,
}  # fmt: skip

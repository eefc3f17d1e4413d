"""HTTP/2 and gRPC's calls below the service: a grpcio client beside an echo, and frames in memory."""

import asyncio
import gzip
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import grpc
import pytest
import zttp

from ingot.server import http2
from ingot.server.app import new_loop
from ingot.server.grpc_calls import Call, Calls, Message, unary
from ingot.server.http2 import Connection
from ingot.server.lookout import Lookout
from ingot.server.mailbox import Mailbox
from ingot.server.request import Code, ServerError
from ingot.server.wire import Front

LIMIT = 8 << 20


# -- an echo that keeps calls ------------------------------------------------------------------------------------------
@dataclass
class Echo:
    """`/e/Say` answers at once, `/e/Keep` when `release` is called, `/e/Talk` each message of a stream."""

    calls: int = 0
    cancelled: int = 0
    kept: list[tuple[Call, Message]] = field(default_factory=list)

    def methods(self) -> dict[bytes, Callable[[Call], None]]:
        return {b"/e/Say": unary(self.say), b"/e/Keep": unary(self.keep), b"/e/Talk": self.talk}

    def say(self, call: Call, message: Message) -> None:
        self.calls += 1
        if message == b"fail":
            raise ServerError(Code.UNSUPPORTED, "ü\n" * 3000)
        call.respond(bytes(message))

    def keep(self, call: Call, message: Message) -> None:
        call.cancel = self.gone
        self.kept.append((call, message))

    def gone(self) -> None:
        self.cancelled += 1

    def talk(self, call: Call) -> None:
        call.room = 4
        call.cancel = self.gone

        def heard(message: Message) -> None:
            self.calls += 1
            call.send(bytes(message))
            resumed()

        def resumed() -> None:
            call.room = 4 - call.unread
            call.resume()

        call.on_message, call.on_closed, call.on_flowing = heard, call.end, resumed

    def forget(self) -> None:
        """All but the first that was kept."""
        del self.kept[1:]
        self.cancelled = 0

    def release(self) -> None:
        for call, message in self.kept:
            call.respond(bytes(message))


@dataclass
class Host:
    """The echo behind a port."""

    echo: Echo
    front: Front
    loop: asyncio.AbstractEventLoop
    port: int

    def do(self, action: Callable[[], Any]) -> Any:
        """On the event loop's thread."""

        async def done() -> Any:
            return action()

        return asyncio.run_coroutine_threadsafe(done(), self.loop).result(20)

    def wait(self, reached: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not self.do(reached):
            assert time.monotonic() < end
            time.sleep(0.005)


def made(echo: Echo, pool: ThreadPoolExecutor, microseconds: int) -> Front:
    mailbox = Mailbox()
    return Front(Calls(echo.methods(), LIMIT, pool, mailbox), None, mailbox, Connection, Lookout(microseconds))


@pytest.fixture
def host() -> Iterator[Host]:
    echo, loop = Echo(), new_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    with ThreadPoolExecutor(1) as pool:
        front = made(echo, pool, 50)
        port = asyncio.run_coroutine_threadsafe(front.start("127.0.0.1", 0), loop).result(20)
        yield Host(echo, front, loop, port)
        asyncio.run_coroutine_threadsafe(front.stop(), loop).result(20)
        loop.call_soon_threadsafe(front.abort)
        loop.call_soon_threadsafe(loop.call_soon, loop.stop)
        thread.join()
    loop.close()


@pytest.fixture
def channel(host: Host) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{host.port}", options=options) as opened:
        yield opened


def code_of(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status: grpc.StatusCode = caught.value.code()
    return status


# -- with grpcio's client ----------------------------------------------------------------------------------------------
def test_connections_are_retired_and_no_call_is_lost_or_made_twice(
    host: Host, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "_STREAMS", 25)
    say = channel.unary_unary("/e/Say")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(say, [b"%d" % n for n in range(1000)])) == [b"%d" % n for n in range(1000)]
    assert host.echo.calls == 1000


def test_zttp_ends_a_connection_where_we_retire_it_before() -> None:
    """What _STREAMS and _RESETS rest on; a zttp that allows more lets them rise."""
    engine, frames = zttp.Connection(zttp.SERVER, zttp.HTTP2), Frames()
    engine.receive_data(frames.greeting)
    served, resets = 0, 0
    with pytest.raises(zttp.RemoteProtocolError):
        while True:
            engine.receive_data(frames.call(b"/e/Say", b""))
            served += 1
            while (event := engine.next_event()) is not zttp.NEED_DATA:
                if isinstance(event, zttp.EndOfMessage):
                    engine.stream(event.stream_id).send_response(200, [], True)
    assert served - 1 == 4096 >= http2._STREAMS + 4 * 128  # a client has up to 128 calls on their way to us
    engine, frames = zttp.Connection(zttp.SERVER, zttp.HTTP2), Frames()
    engine.receive_data(frames.greeting)
    with pytest.raises(zttp.RemoteProtocolError):
        while True:
            engine.receive_data(frames.call(b"/e/Say", b"") + frames.reset())
            resets += 1
            while engine.next_event() is not zttp.NEED_DATA:
                pass
    assert resets - 1 == 256 >= http2._RESETS + 128


def test_cancelled_calls_tell_and_harm_no_other(host: Host, channel: grpc.Channel) -> None:
    keep, say = channel.unary_unary("/e/Keep"), channel.unary_unary("/e/Say")
    kept = keep.future(b"to be answered")
    host.wait(lambda: len(host.echo.kept) == 1)
    for _ in range(3):
        futures = [keep.future(b"x") for _ in range(100)]
        host.wait(lambda: len(host.echo.kept) >= 101)
        for future in futures:
            future.cancel()
        host.wait(lambda: host.echo.cancelled == 100)
        assert say(b"still here") == b"still here"
        host.do(host.echo.forget)
    host.do(host.echo.release)
    assert kept.result(20) == b"to be answered"


def test_a_deadline_ends_a_call(host: Host, channel: grpc.Channel) -> None:
    keep = channel.unary_unary("/e/Keep")
    assert code_of(lambda: keep(b"x", timeout=0.05)) is grpc.StatusCode.DEADLINE_EXCEEDED
    host.wait(lambda: host.echo.cancelled == 1)
    host.do(host.echo.release)  # too late, and no harm


@pytest.mark.parametrize("size", [0, 1, 16 << 10, 16385, 600_000, LIMIT])
def test_messages_of_every_size(channel: grpc.Channel, size: int) -> None:
    assert channel.unary_unary("/e/Say")(bytes(size)) == bytes(size)


def test_messages_beyond_the_limit_bombs_and_other_mistakes(host: Host, channel: grpc.Channel) -> None:
    say = channel.unary_unary("/e/Say")
    assert code_of(lambda: say(bytes(LIMIT + 1))) is grpc.StatusCode.RESOURCE_EXHAUSTED
    bomb = partial(say, bytes(2 * LIMIT), compression=grpc.Compression.Gzip)
    assert code_of(bomb) is grpc.StatusCode.RESOURCE_EXHAUSTED
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        assert say(b"again " * 5000, compression=compression) == b"again " * 5000
    assert code_of(lambda: channel.unary_unary("/e/Unheard")(b"")) is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError) as caught:
        say(b"fail")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED and caught.value.details() == "ü\n" * 666 + "ü"
    assert code_of(lambda: channel.stream_unary("/e/Say")(iter([b"a", b"b"]))) is grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(lambda: channel.stream_unary("/e/Say")(iter(()))) is grpc.StatusCode.INVALID_ARGUMENT
    _, call = say.with_call(b"x", metadata=(("x-request-id", "seven"),))
    assert ("x-request-id", "seven") in call.trailing_metadata()


def test_a_stream_answers_in_order_and_waits_for_its_reader(host: Host, channel: grpc.Channel) -> None:
    sent = [b"%d" % number + bytes(20_000) for number in range(1500)]  # 30 MB, far beyond every window
    answers = channel.stream_stream("/e/Talk")(iter(sent))
    host.wait(lambda: host.echo.calls > 3)
    assert next(answers) == sent[0]
    time.sleep(0.2)
    assert host.echo.calls < 1400  # an unread answer holds the next ones back
    assert list(answers) == sent[1:]


def test_stopping_answers_what_is_open(host: Host, channel: grpc.Channel) -> None:
    kept = channel.unary_unary("/e/Keep").future(b"x")
    host.wait(lambda: len(host.echo.kept) == 1)
    asyncio.run_coroutine_threadsafe(host.front.stop(), host.loop).result(20)
    assert host.do(lambda: len(host.front.connections)) == 1
    host.do(host.echo.release)
    assert kept.result(20) == b"x"
    host.wait(lambda: not host.front.connections)


# -- frames in memory --------------------------------------------------------------------------------------------------
def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload) << 8 | kind) + bytes([flags]) + struct.pack(">I", stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


@dataclass
class Frames:
    """What a client sends; each call on the next stream."""

    stream: int = -1
    greeting: bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)

    def head(
        self, path: bytes, *headers: tuple[bytes, bytes], kind: bytes = b"application/grpc", flags: int = 4
    ) -> bytes:
        self.stream += 2
        named = [(b":path", path), (b"content-type", kind), (b"te", b"trailers"), *headers]
        return frame(1, flags, self.stream, b"\x83\x86" + b"".join(literal(*pair) for pair in named))

    def call(self, path: bytes, message: bytes, *headers: tuple[bytes, bytes], packed: int = 0) -> bytes:
        data = bytes([packed]) + struct.pack(">I", len(message)) + message
        return self.head(path, *headers) + frame(0, 1, self.stream, data)

    def reset(self) -> bytes:
        return frame(3, 0, self.stream, struct.pack(">I", 8))


class Transport:
    """Remembers what is done to it."""

    def __init__(self) -> None:
        self.written, self.closed, self.aborted, self.listening = bytearray(), False, False, True

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        self.listening = False

    def resume_reading(self) -> None:
        self.listening = True

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1)

    def kinds(self) -> list[int]:
        """The kinds of the frames written, which are forgotten."""
        kinds, at = [], 0
        while at < len(self.written):
            kinds.append(self.written[at + 3])
            at += 9 + int.from_bytes(self.written[at : at + 3], "big")
        assert at == len(self.written)
        self.written.clear()
        return kinds


@dataclass
class Memory:
    """A connection without a socket."""

    echo: Echo = field(default_factory=Echo)
    frames: Frames = field(default_factory=Frames)
    transport: Transport = field(default_factory=Transport)

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.front = made(self.echo, self.pool, 0)
        self.connection = Connection(self.front)
        self.connection.connection_made(self.transport)
        self.transport.written.clear()

    def greeted(self) -> "Memory":
        self.connection.data_received(self.frames.greeting)
        self.transport.written.clear()
        return self

    def hear(self, data: bytes) -> list[int]:
        self.connection.data_received(data)
        return self.transport.kinds()


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.pool.shutdown()


def test_what_came_together_is_answered_together(memory: Memory) -> None:
    memory.greeted()
    assert memory.hear(memory.frames.call(b"/e/Say", b"1") + memory.frames.call(b"/e/Say", b"2")) == [1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01 TLS", bytes(64)])
def test_what_is_no_http2_is_told_so_and_closed(memory: Memory, garbage: bytes) -> None:
    assert 7 in memory.hear(garbage) and memory.transport.closed


def test_malformed_calls_end_and_the_connection_lives(memory: Memory) -> None:
    memory.greeted()
    frames = memory.frames
    assert memory.hear(frames.head(b"/e/Say", kind=b"text/plain", flags=5)) == [1]
    assert memory.hear(frames.call(b"/e/Say", b"x", (b"grpc-encoding", b"zstd"))) == [1]
    assert memory.hear(frames.head(b"/e/Say") + frame(0, 1, frames.stream, b"\0\0\0\0\7abc")) == [1]  # cut short
    assert memory.hear(frames.head(b"/e/Say") + frame(0, 1, frames.stream, b"\0\0")) == [1]
    announced = struct.pack(">I", LIMIT + 1)
    assert memory.hear(frames.head(b"/e/Say") + frame(0, 0, frames.stream, b"\0" + announced)) == [1]
    assert memory.hear(frames.call(b"/e/Say", b"x")) == [1, 0, 1]


def test_what_follows_a_refused_message_harms_no_other_call(memory: Memory) -> None:
    """As much as its windows allow is on its way when the client hears that a message is too long."""
    memory.greeted()
    frames, announced = memory.frames, struct.pack(">I", LIMIT + 1)
    assert memory.hear(frames.head(b"/e/Say") + frame(0, 0, 1, b"\0" + announced)) == [1]
    memory.hear(frame(0, 0, 1, bytes(16_000)) * 262)
    assert memory.hear(frames.call(b"/e/Say", b"x")) == [1, 0, 1]
    memory.connection.data_received(frame(0, 0, 1, bytes(16_000)) * 10)
    assert struct.pack(">IBI", 4 << 8 | 8, 0, 1) not in memory.transport.written  # it is asked for no more
    memory.transport.written.clear()
    assert memory.hear(frame(0, 1, 1)) == [] and not memory.connection._full
    assert memory.hear(frames.head(b"/e/Say") + frame(0, 0, frames.stream, b"\0" + announced)) == [1]
    memory.connection.close_if_late(time.monotonic() + 31)
    assert memory.transport.kinds() == [3] and not memory.connection._full  # who does not stop is stopped
    assert memory.hear(frames.call(b"/e/Say", b"x")) == [1, 0, 1] and not memory.transport.closed


def test_compressed_garbage_is_the_clients_mistake(host: Host) -> None:
    for data in (b"garbage", gzip.compress(b"x" * 100)[:-9]):
        frames, packed = Frames(), (b"grpc-encoding", b"gzip")
        answer = exchange(host.port, frames.greeting + frames.call(b"/e/Say", data, packed, packed=1))
        assert b"grpc-status\x013" in answer


def exchange(port: int, data: bytes) -> bytes:
    """Send bytes; what comes until the last headers of a stream."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(data)
        received = b""
        while b"grpc-status" not in received:
            part = sock.recv(1 << 16)
            assert part, received
            received += part
    return received


def test_a_client_without_windows_or_that_does_not_read_is_given_up(memory: Memory) -> None:
    memory.greeted()
    memory.hear(frame(4, 0, 0, struct.pack(">HI", 4, 0)))  # no window for any stream
    assert memory.hear(memory.frames.call(b"/e/Say", b"answer")) == [1]
    now = time.monotonic()
    memory.connection.close_if_late(now + 29)
    assert memory.transport.kinds() == []
    memory.connection.close_if_late(now + 31)
    assert memory.transport.kinds() == [3]  # the stream alone
    memory.connection.pause_writing()
    assert not memory.transport.listening
    memory.connection.close_if_late(now + 31)
    assert memory.transport.aborted


def test_windows_are_waited_for(memory: Memory) -> None:
    memory.greeted()
    memory.hear(frame(4, 0, 0, struct.pack(">HI", 4, 3)))
    assert memory.hear(memory.frames.call(b"/e/Say", b"answer")) == [1, 0]
    assert memory.hear(frame(8, 0, memory.frames.stream, struct.pack(">I", 100))) == [0, 1]


def test_silence_is_asked_about_and_ended(memory: Memory) -> None:
    memory.greeted()
    now = time.monotonic()
    memory.connection.close_if_late(now + 61)
    memory.connection.close_if_late(now + 62)
    assert memory.transport.kinds() == [6]
    memory.connection.close_if_late(now + 81)
    assert memory.transport.aborted
    silent = Memory()
    silent.connection.close_if_late(time.monotonic() + 31)  # has not even greeted
    assert silent.transport.aborted
    silent.pool.shutdown()


def test_how_long_silence_may_last_is_a_setting(memory: Memory) -> None:
    memory.front.limits = replace(memory.front.limits, ask_after=5.0, answer_within=2.0)
    memory.greeted()
    now = time.monotonic()
    memory.connection.close_if_late(now + 6)
    assert memory.transport.kinds() == [6] and not memory.transport.aborted
    memory.connection.close_if_late(now + 8)
    assert memory.transport.aborted


def test_after_the_farewell_nothing_new_is_begun(memory: Memory) -> None:
    memory.greeted()
    memory.hear(memory.frames.call(b"/e/Keep", b"x"))
    memory.connection.close_when_idle()
    assert memory.transport.kinds() == [7, 6]
    assert memory.hear(memory.frames.call(b"/e/Say", b"on its way before that")) == [1, 0, 1]
    assert memory.hear(frame(6, 1, 0, bytes(8))) == [7]
    assert set(memory.hear(memory.frames.call(b"/e/Say", b"late"))) == {3} and memory.echo.calls == 1
    memory.echo.release()
    assert memory.transport.kinds() == [1, 0, 1] and not memory.transport.closed  # the client may still be asking
    memory.connection.close_if_late(time.monotonic() + 3)
    assert memory.transport.closed


def test_a_client_that_goes_takes_its_calls_along(memory: Memory) -> None:
    memory.greeted()
    memory.hear(memory.frames.call(b"/e/Keep", b"x") + memory.frames.call(b"/e/Keep", b"y"))
    memory.connection.connection_lost(None)
    assert memory.echo.cancelled == 2 and not memory.front.connections
    memory.echo.release()
    assert memory.transport.kinds() == []


def test_a_stream_that_gets_ahead_is_made_to_wait(memory: Memory) -> None:
    """Messages without room are kept, and the window no longer widened; who sends on regardless is ended."""
    memory.greeted()
    memory.hear(frame(4, 0, 0, struct.pack(">HI", 4, 0)) + memory.frames.head(b"/e/Talk"))
    data = frame(0, 0, memory.frames.stream, b"\0" + struct.pack(">I", 16_000) + bytes(16_000))
    memory.hear(data * 64)
    assert memory.echo.calls <= 6 and 8 in memory.hear(data * 4)
    widened = b"".join([struct.pack(">IB", 4 << 8 | 8, 0), struct.pack(">I", memory.frames.stream)])
    memory.connection.data_received(data * 64)
    assert widened not in memory.transport.written  # the connection's window is, for its other streams
    memory.transport.written.clear()
    for _ in range(140):  # windows come: all is answered, and the stream's is wide again
        memory.connection.data_received(frame(8, 0, memory.frames.stream, struct.pack(">I", 1 << 20)))
        memory.connection.data_received(frame(8, 0, 0, struct.pack(">I", 1 << 20)))
    assert memory.echo.calls == 132 and widened in memory.transport.written
    memory.hear(frame(4, 0, 0, struct.pack(">HI", 4, 0)))
    stubborn = Memory().greeted()
    stubborn.hear(frame(4, 0, 0, struct.pack(">HI", 4, 0)) + stubborn.frames.head(b"/e/Talk"))
    for _ in range(11):
        stubborn.hear(data * 100)
    assert stubborn.echo.cancelled == 1
    stubborn.connection.close_if_late(time.monotonic() + 31)  # what the end waits behind is not waited for much longer
    assert stubborn.transport.kinds() == [3]
    stubborn.pool.shutdown()

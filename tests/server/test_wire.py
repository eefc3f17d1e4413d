"""HTTP/1.1 as bytes: bodies, limits, what is refused, clients that stall or leave."""

import asyncio
import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from ingot.errors import ConfigError
from ingot.server.app import new_loop
from ingot.server.wire import Exchange, Front, Limits

LIMITS = Limits(body=1 << 20, header=4096, pipelined=4)


@dataclass
class Echo:
    """Answers a request with its body; /hold is kept until it is released, /pieces comes in two."""

    held: list[Exchange] = field(default_factory=list)
    holding: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __call__(self, exchange: Exchange) -> None:
        if exchange.target == b"/hold":
            exchange.cancel = self.cancelled.set
            self.held.append(exchange)
            self.holding.set()
        elif exchange.target == b"/pieces":
            exchange.begin(200, {})
            for piece in (b"one", b"two", b""):
                exchange.piece(piece)
        else:
            exchange.respond(200, [exchange.method, b" ", exchange.body])


@dataclass
class Running:
    echo: Echo
    front: Front
    port: int
    loop: asyncio.AbstractEventLoop

    def on_loop(self, action: Any) -> None:
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (action(), done.set()))
        assert done.wait(60)

    def talk(self, data: bytes) -> bytes:
        """Everything the server sends until it closes; the client says that it is done."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            return everything(client)


def everything(client: socket.socket) -> bytes:
    received = b""
    while chunk := client.recv(1 << 16):
        received += chunk
    return received


@pytest.fixture
def running() -> Iterator[Running]:
    echo, loop = Echo(), new_loop()
    front = Front(echo, LIMITS)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    port = asyncio.run_coroutine_threadsafe(front.start("127.0.0.1", 0), loop).result()
    yield Running(echo, front, port, loop)
    asyncio.run_coroutine_threadsafe(front.stop(), loop).result()
    loop.call_soon_threadsafe(front.abort)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def post(body: bytes, path: str = "/", *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_requests_that_come_together_are_answered_in_order(running: Running) -> None:
    answer = running.talk(b"".join(post(b"%d" % number) for number in range(10)))
    assert answer.count(b"HTTP/1.1 200 OK") == 10
    assert [answer.index(b"POST %d" % number) for number in range(10)] == sorted(
        answer.index(b"POST %d" % number) for number in range(10)
    )


def test_a_thousand_requests_behind_a_slow_one(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as client:
        client.sendall(post(b"", "/hold") + b"GET / HTTP/1.1\r\n\r\n" * 2000)
        assert running.echo.holding.wait(60)
        running.on_loop(lambda: running.echo.held[0].respond(200, [b"slow"]))
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 2001:
            received += client.recv(1 << 16)


@pytest.mark.parametrize("size", [0, 1, 60_000, 70_000, 900_000])
def test_bodies_of_any_size(running: Running, size: int) -> None:
    body = bytes(index % 251 for index in range(size))
    answer = running.talk(post(body) + post(b"after"))
    assert b"POST " + body + b"HTTP/1.1 200 OK" in answer and answer.endswith(b"POST after")


def test_a_chunked_body(running: Running) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert running.talk(head + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n").endswith(b"POST abcde")


def test_an_answer_in_pieces(running: Running) -> None:
    assert running.talk(b"GET /pieces HTTP/1.1\r\nHost: x\r\n\r\n").endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")


@pytest.mark.parametrize("path", ["/", "/pieces"])
def test_an_answer_repeats_the_requests_id(running: Running, path: str) -> None:
    named, unnamed = running.talk(post(b"", path, "X-Request-ID: seven, 8")), running.talk(post(b"", path))
    assert b"\r\nx-request-id: seven, 8\r\n" in named and b"request-id" not in unnamed
    folded = running.talk(b"GET / HTTP/1.1\r\nX-Request-Id: a\r\n b: c\r\n\r\n")
    assert b"\r\n b: c" not in folded


def test_expect_continue(running: Running) -> None:
    answer = running.talk(post(b"abc", "/", "Expect: 100-continue"))
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


def test_an_offered_upgrade_is_passed_over(running: Running) -> None:
    answer = running.talk(post(b"abc", "/", "Upgrade: h2c", "Connection: upgrade") + post(b"next"))
    assert b"POST abc" in answer and answer.endswith(b"POST next")


def test_http_1_0_closes(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"connection: close" in everything(client)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 5000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 5000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 17, 413),
    ],
)
def test_what_is_refused(running: Running, data: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as client:
        client.sendall(data)
        answer = everything(client)
    assert answer.startswith(b"HTTP/1.1 %d " % status) and b'{"error":' in answer, answer[:200]
    assert running.talk(post(b"still alive")).endswith(b"POST still alive")


def test_a_client_that_leaves_cancels_what_it_waits_for(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as client:
        client.sendall(post(b"", "/hold"))
        assert running.echo.holding.wait(60)
    assert running.echo.cancelled.wait(60)
    running.echo.held[0].post(lambda: running.echo.held[0].respond(200, [b"too late"]))
    assert running.talk(post(b"next")).endswith(b"POST next")


def test_a_connection_that_ended_is_gone_without_the_collector(running: Running) -> None:
    """Each holds 64 KiB to receive into, and a server that has frozen what stands collects rarely."""
    known: list[weakref.ref[Any]] = []
    gc.disable()
    try:
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as client:
            client.sendall(post(b"x") + b"half a requ")
            assert client.recv(1 << 16)
            running.on_loop(lambda: known.extend(map(weakref.ref, running.front.connections)))
        end = time.monotonic() + 60
        while any(reference() is not None for reference in known) and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        gc.enable()
    assert known and not any(reference() is not None for reference in known)


def test_a_stalled_client_is_dropped_a_waiting_one_is_not(running: Running) -> None:
    stalled = socket.create_connection(("127.0.0.1", running.port), timeout=60)
    waiting = socket.create_connection(("127.0.0.1", running.port), timeout=60)
    stalled.sendall(b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc")
    waiting.sendall(post(b"", "/hold"))
    assert running.echo.holding.wait(60)
    later = time.monotonic() + LIMITS.stalled + 1
    running.on_loop(lambda: [connection.close_if_late(later) for connection in tuple(running.front.connections)])
    assert stalled.recv(1) == b""
    running.on_loop(lambda: running.echo.held[0].respond(200, [b"patience"]))
    assert waiting.recv(1 << 16).endswith(b"patience")
    stalled.close()
    waiting.close()


def test_a_client_that_does_not_read_its_answers_is_not_read_either(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as client:
        body, sent = b"x" * 200_000, 0
        client.setblocking(False)
        data = memoryview(post(body) * 400)
        while True:
            try:
                sent += client.send(data[sent : sent + (1 << 20)])
            except BlockingIOError:
                running.on_loop(lambda: None)
                try:
                    sent += client.send(data[sent : sent + (1 << 20)])
                except BlockingIOError:
                    break
        assert sent < len(data) // 2


def test_the_end_of_listening_is_one_for_a_child_that_has_the_socket_too(running: Running) -> None:
    assert running.front._server is not None
    held = os.dup(running.front._server.sockets[0].fileno())
    try:
        asyncio.run_coroutine_threadsafe(running.front.stop(), running.loop).result()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", running.port), timeout=60)
    finally:
        os.close(held)


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_there_is_not(port: int) -> None:
    with pytest.raises(ConfigError, match=f"there is no port {port}"):
        asyncio.run(Front(Echo()).start("127.0.0.1", port))

"""A gateway worker: a process that serves clients on a shared socket, hears of routes and tells what it counted.

python -m ingot.release.worker LISTENING-FD CONTROL-FD       started by gateway.py alone
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from typing import Any

import msgspec

from ingot.release import rollout
from ingot.release.proxy import Proxy
from ingot.release.router import Router, Routes
from ingot.release.windows import Counters
from ingot.server.wire import Front, Limits

TELL_SECONDS = 0.2
DRAIN_SECONDS = 30.0
log = logging.getLogger("ingot.release.gateway")


class Orders(msgspec.Struct, array_like=True):
    """Supervisor to worker: the routes that changed, model => (sequence, state)."""

    routes: dict[str, tuple[int, str]]


class Report(msgspec.Struct, array_like=True):
    """Worker to supervisor: what it counted so far, whom it served since the weights changed, which routes it has."""

    counters: dict[str, dict[str, Counters]]
    users: dict[str, dict[str, bytes]]
    applied: dict[str, int]
    under_way: int
    open_breakers: list[tuple[str, str]]


ORDERS, REPORT = msgspec.msgpack.Decoder(Orders), msgspec.msgpack.Decoder(Report)
encode = msgspec.msgpack.Encoder().encode


def framed(message: bytes) -> bytes:
    """With its length before it."""
    return len(message).to_bytes(4, "big") + message


async def received(reader: asyncio.StreamReader) -> bytes | None:
    """The next message; None when the other side is gone."""
    try:
        size = int.from_bytes(await reader.readexactly(4), "big")
        return await reader.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def report_of(proxy: Proxy) -> Report:
    """What the worker has to tell."""
    users = {model: {v: bytes(bits) for v, bits in versions.items()} for model, versions in proxy.users.items()}
    applied = {model: router.sequence for model, router in proxy.routes.routers.items()}
    opened = [key for key, breaker in proxy.breakers.items() if breaker.open_until is not None]
    return Report(proxy.counters, users, applied, proxy.under_way, opened)


async def serve(listening: socket.socket, control: socket.socket) -> None:
    """Until the supervisor is gone or says so; then what is under way is answered."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, ended.set)
    reader, writer = await asyncio.open_connection(sock=control)
    proxy = Proxy(Routes({}))
    front = Front(proxy, Limits())
    first = await received(reader)
    if first is None:
        return
    _obey(proxy, first)
    writer.write(framed(encode(report_of(proxy))))
    await front.start_on(listening)
    tasks = [asyncio.create_task(_listen(proxy, reader, ended)), asyncio.create_task(_tell(proxy, writer))]
    await ended.wait()
    await front.stop()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while front.connections:
                await asyncio.sleep(0.01)
    front.abort()
    with contextlib.suppress(ConnectionError):
        writer.write(framed(encode(report_of(proxy))))
        await writer.drain()
    for task in tasks:
        task.cancel()


async def _listen(proxy: Proxy, reader: asyncio.StreamReader, ended: asyncio.Event) -> None:
    while (message := await received(reader)) is not None:
        _obey(proxy, message)
    ended.set()


async def _tell(proxy: Proxy, writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(TELL_SECONDS)
        writer.write(framed(encode(report_of(proxy))))


def _obey(proxy: Proxy, message: bytes) -> None:
    routers = dict(proxy.routes.routers)
    for model, (sequence, text) in ORDERS.decode(message).routes.items():
        routers[model] = Router(rollout.decode(text), sequence)
    proxy.change(Routes(routers))


def main() -> None:
    import uvloop

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    descriptors: list[Any] = [socket.socket(fileno=int(text)) for text in sys.argv[1:3]]
    for descriptor in descriptors:
        descriptor.setblocking(False)
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    uvloop.run(serve(*descriptors))


if __name__ == "__main__":
    main()

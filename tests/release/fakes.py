"""Servers that behave, hang, lie, reset or stream, and a gateway in a thread: what the tests talk to
through real sockets."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingot.release import events
from ingot.release.gateway import Gateway, Options
from ingot.release.rollout import State
from ingot.release.spec import parse
from ingot.release.store import Store
from ingot.server.app import new_loop
from ingot.server.wire import Exchange, Front


@dataclass
class Loop:
    """An event loop in a thread."""

    loop: asyncio.AbstractEventLoop = field(default_factory=new_loop)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, coroutine: Any, timeout: float = 30.0) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@dataclass
class Upstream:
    """A version's server. `behave` answers an exchange; by default with its name and what it was asked."""

    name: str
    behave: Callable[["Upstream", Exchange], None] | None = None
    seen: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    held: list[Exchange] = field(default_factory=list)
    port: int = 0

    def __call__(self, exchange: Exchange) -> None:
        self.seen.append((exchange.method, exchange.target, bytes(exchange.body)))
        (self.behave or answer)(self, exchange)

    async def start(self, port: int = 0) -> None:
        self.front = Front(self)
        self.port = await self.front.start("127.0.0.1", port)

    async def stop(self) -> None:
        await self.front.stop()
        self.front.abort()


def answer(upstream: Upstream, exchange: Exchange) -> None:
    body = json.dumps({"version": upstream.name, "target": exchange.target.decode()}).encode()
    exchange.respond(200, [body], {b"content-type": b"application/json"})


def status(code: int) -> Callable[[Upstream, Exchange], None]:
    return lambda upstream, exchange: exchange.respond(code, [b"{}"])


def hang(upstream: Upstream, exchange: Exchange) -> None:
    upstream.held.append(exchange)


def reset(upstream: Upstream, exchange: Exchange) -> None:
    exchange.abandon()


def lie(upstream: Upstream, exchange: Exchange) -> None:
    """Says more than it sends, in no HTTP."""
    exchange._connection._transport.write(b"SMTP ready\r\n\r\n")


def cut(upstream: Upstream, exchange: Exchange) -> None:
    """Promises ten bytes, sends three, closes."""
    exchange._connection._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
    exchange._connection._transport.close()


def slow(seconds: float) -> Callable[[Upstream, Exchange], None]:
    def behave(upstream: Upstream, exchange: Exchange) -> None:
        asyncio.get_running_loop().call_later(seconds, answer, upstream, exchange)

    return behave


SPEC = """
model: digits
stable: v1
candidates: [v2]
versions:
  v1: {{endpoints: [{{url: 'http://127.0.0.1:{v1}'}}], timeout: 2s}}
  v2: {{endpoints: [{{url: 'http://127.0.0.1:{v2}'}}], timeout: 500ms}}
{extra}
"""
HALF = "steps: [{setWeight: 50}, {pause: {}}]"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def version(self) -> str:
        return self.headers.get("x-ingot-version", "")

    @property
    def route(self) -> str:
        return self.headers.get("x-ingot-route", "")


@dataclass
class World:
    """A store, upstreams, a gateway."""

    folder: Path
    loop: Loop
    store: Store
    upstreams: dict[str, Upstream]
    gateway: Gateway

    def apply(self, extra: str = HALF, text: str = SPEC) -> State:
        ports = {name: upstream.port for name, upstream in self.upstreams.items()}
        spec = parse(text.format(extra=extra, **ports))
        self.store.submit(spec.model, events.Applied(spec), "test")
        for version in spec.candidates:
            self.submit(events.Ready(version), spec.model)
        return self.settled(spec.model)

    def submit(self, event: events.Event, model: str = "digits") -> None:
        self.store.submit(model, event, "test")

    def settled(self, model: str = "digits") -> State:
        """Once every worker has the newest routes."""
        state, sequence = self.store.load(model)
        self.until(lambda: self.observation(model) is not None and self.observation(model).applied >= sequence)
        assert state is not None
        return state

    def observation(self, model: str = "digits") -> Any:
        async def read() -> Any:
            return self.gateway.observations().get(model)

        return self.loop.run(read())

    def counters(self, version: str) -> Any:
        """Of all that was answered by now."""
        self.told()
        return self.observation().counters[version]

    def told(self) -> None:
        """Once every worker has told twice: the first time may have been on its way before."""
        for _ in range(2):
            before = [worker.report for worker in self.gateway.workers]
            self.until(lambda before=before: not any(one is worker.report for one, worker in self._beside(before)))

    def _beside(self, reports: list[Any]) -> Any:
        return zip(reports, self.gateway.workers, strict=False)

    def until(self, holds: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not come about"
            time.sleep(0.02)

    def ask(self, user: str | None = None, path: str = "/v2/models/digits/infer", method: str = "POST",
            body: bytes = b"{}", **headers: str) -> Answer:  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=60)
        try:
            if user is not None:
                headers["x-user-id"] = user
            plain = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, plain)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def user_of(self, version: str) -> str:
        """Somebody whom the weights give to a version."""
        from ingot.release.router import Request, Router

        state, sequence = self.store.load("digits")
        router = Router(state, sequence)
        names = (f"user{n}" for n in range(10_000))
        return next(n for n in names if router.decide(Request({b"x-user-id": n.encode()})).version == version)


@contextlib.contextmanager
def world(folder: Path, workers: int = 1, versions: tuple[str, ...] = ("v1", "v2"), url: str = "") -> Iterator[World]:
    loop = Loop()
    store = Store(url or f"sqlite:///{folder}/release.db")
    store.migrate()
    upstreams = {name: Upstream(name) for name in versions}
    for upstream in upstreams.values():
        loop.run(upstream.start())
    gateway = Gateway(Options(store.url, port=0, metrics_port=0, workers=workers, remember=folder / "routes.json"))
    loop.run(gateway.start())
    made = World(folder, loop, store, upstreams, gateway)
    try:
        yield made
    finally:
        loop.run(gateway.stop(), 60)
        for upstream in upstreams.values():
            loop.run(upstream.stop())
        loop.end()
        store.close()

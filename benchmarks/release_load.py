"""An open-loop load: requests leave when they are due, whatever became of those before; each has a user."""

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httptools

Message = Callable[[str], bytes]


@dataclass(frozen=True)
class Sample:
    """One request: when it was due (seconds since the beginning), how long it took from then, what came."""

    due: float
    seconds: float
    status: int
    version: str
    user: str
    route: str


@dataclass
class Load:
    """Runs until `stop`; samples grow meanwhile. A broken connection is tried again once, as HTTP clients do."""

    port: int
    message: Message
    rate: float
    users: int = 2000
    seed: int = 0
    samples: list[Sample] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    late: float = 0.0
    stopped: bool = False

    async def run(self, seconds: float = float("inf")) -> None:
        """Send for so long, then wait for what is under way."""
        drawn, self._idle = random.Random(self.seed), list[_Client]()
        tasks: set[asyncio.Task[None]] = set()
        begun, due = time.perf_counter(), 0.0
        while not self.stopped and due < seconds:
            ahead = begun + due - time.perf_counter()
            if ahead > 0:
                await asyncio.sleep(ahead)
            else:
                self.late = max(self.late, -ahead)
            task = asyncio.create_task(self._one(begun, due, f"user{drawn.randrange(self.users)}"))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += drawn.expovariate(self.rate)
        if tasks:
            await asyncio.wait(tasks, timeout=15)
        for client in self._idle:
            client.close()

    async def _one(self, begun: float, due: float, user: str) -> None:
        reason = ""
        for attempt in (1, 2, 3):
            try:
                client = self._idle.pop() if self._idle and attempt == 1 else await self._connected()
                status, version, route = await asyncio.wait_for(client.ask(self.message(user)), 10.0)
            except (OSError, TimeoutError) as error:
                reason = f"{user} at {due:.1f} s: {error or type(error).__name__}"
                await asyncio.sleep(0.05 * (attempt - 1))
                continue
            self._idle.append(client)
            self.samples.append(Sample(due, time.perf_counter() - begun - due, status, version, user, route))
            return
        self.lost.append(reason)

    async def _connected(self) -> "_Client":
        _, client = await asyncio.get_running_loop().create_connection(_Client, "127.0.0.1", self.port)
        return client


class _Client(asyncio.Protocol):
    """One kept connection."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.waiting: asyncio.Future[tuple[int, str, str]] | None = None
        self.version = self.route = ""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    async def ask(self, message: bytes) -> tuple[int, str, str]:
        if self.transport.is_closing():
            raise ConnectionResetError("closed while idle")
        self.waiting = asyncio.get_running_loop().create_future()
        self.parser, self.version, self.route = httptools.HttpResponseParser(self), "", ""
        self.transport.write(message)
        try:
            return await self.waiting
        except asyncio.CancelledError:
            self.transport.abort()
            raise

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-ingot-version":
            self.version = value.decode()
        elif name.lower() == b"x-ingot-route":
            self.route = value.decode()

    def on_message_complete(self) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result((self.parser.get_status_code(), self.version, self.route))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(ConnectionResetError("the connection was closed"))

    def close(self) -> None:
        self.transport.close()


def inference(path: str, bodies: Sequence[bytes], kind: str = "application/json", extra: str = "") -> Message:
    """Requests to a path with one body after another."""
    turn = itertools.cycle(bodies)

    def message(user: str) -> bytes:
        body = next(turn)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nX-User-Id: {user}\r\n{extra}"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    return message


def percentile(values: Sequence[float], share: float) -> float:
    """Of a list that is not empty."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

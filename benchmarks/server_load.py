"""HTTP load in one thread: closed loops (a client sends once it is answered) and open ones (arrivals on a clock)."""

import random
import select
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

CHUNK = 1 << 16


@dataclass(frozen=True)
class Load:
    """What a run measured: requests a second and latencies in microseconds."""

    requests: int
    seconds: float
    p50: float
    p99: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


@dataclass(frozen=True)
class Offered:
    """What became of requests that came on a clock: answered in time, late, refused (503); arrivals a second."""

    good: int
    late: int
    refused: int
    seconds: float
    offered: float

    @property
    def goodput(self) -> float:
        """Answers in time a second."""
        return self.good / self.seconds


@dataclass
class Connection:
    """One client: its socket, when its request left, what has come back."""

    socket: socket.socket
    sent: float = 0.0
    received: bytearray = field(default_factory=bytearray)

    def send(self, request: bytes) -> None:
        self.sent = time.perf_counter()
        self.received.clear()
        self.socket.sendall(request)

    def status(self) -> int | None:
        """Read what is there; the answer's status once it is whole."""
        data = self.socket.recv(CHUNK)
        if not data:
            raise ConnectionError(f"the server closed the connection after {bytes(self.received[:200])!r}")
        self.received += data
        head = self.received.find(b"\r\n\r\n")
        if head < 0 or len(self.received) < head + 4 + content_length(bytes(self.received[:head])):
            return None
        return int(self.received[9:12])

    def complete(self) -> bool:
        """Read what is there; True when the answer is whole. Raises on anything but a 200."""
        status = self.status()
        if status not in (None, 200):
            raise ConnectionError(f"the server answered {bytes(self.received[:400])!r}")
        return status is not None


def content_length(head: bytes) -> int:
    lower = head.lower()
    at = lower.index(b"content-length:") + 15
    end = lower.find(b"\r\n", at)
    return int(lower[at : end if end >= 0 else len(lower)])


def connect(port: int, count: int) -> list[Connection]:
    connections = []
    for _ in range(count):
        made = socket.create_connection(("127.0.0.1", port))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections.append(Connection(made))
    return connections


@contextmanager
def polled(port: int, count: int) -> Iterator[tuple[dict[int, Connection], select.epoll]]:
    """So many connections by file number, and an epoll over them."""
    connections = {connection.socket.fileno(): connection for connection in connect(port, count)}
    poll = select.epoll()
    for number in connections:
        poll.register(number, select.EPOLLIN)
    try:
        yield connections, poll
    finally:
        for connection in connections.values():
            connection.socket.close()
        poll.close()


def closed_loop(port: int, request: bytes, clients: int, seconds: float) -> Load:
    """Every client sends its next request as soon as its last one is answered."""
    latencies: list[float] = []
    with polled(port, clients) as (connections, poll):
        for connection in connections.values():
            connection.send(request)
        begun = time.perf_counter()
        end = begun + seconds
        while time.perf_counter() < end:
            for number, _ in poll.poll(1.0):
                connection = connections[number]
                if connection.complete():
                    latencies.append(time.perf_counter() - connection.sent)
                    connection.send(request)
        took = time.perf_counter() - begun
    return summary(latencies, took)


def summary(latencies: Sequence[float], seconds: float) -> Load:
    ordered = sorted(latencies)
    last = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return Load(len(ordered), seconds, statistics.median(ordered) * 1e6, last * 1e6)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Poisson arrivals in seconds."""
    source, now, times = random.Random(seed), 0.0, list[float]()
    while (now := now + source.expovariate(rate)) < seconds:
        times.append(now)
    return times


def open_loop(
    port: int, request: bytes, rate: float, seconds: float, deadline: float, connections: int, seed: int = 0
) -> Offered:
    """Requests at Poisson times whatever becomes of those before; an answer counts if it comes `deadline` seconds after
    its request was due. A request that finds no free connection waits for one, and its time runs meanwhile."""
    due, counts, last = deque(arrivals(rate, seconds, seed)), {"good": 0, "late": 0, "refused": 0}, 0.0
    with polled(port, connections) as (clients, poll):
        free, began = list(clients.values()), time.perf_counter() + 0.01
        asked: dict[int, float] = {}
        while due or asked:
            now = time.perf_counter() - began
            while due and due[0] <= now and free:
                connection = free.pop()
                asked[connection.socket.fileno()] = due.popleft()
                connection.send(request)
            for number, _ in poll.poll(max(due[0] - now, 0.0) if due and free else 1.0):
                status = clients[number].status()
                if status is None:
                    continue
                last = time.perf_counter() - began
                in_time = last - asked.pop(number) <= deadline
                counts["refused" if status != 200 else "good" if in_time else "late"] += 1
                free.append(clients[number])
    return Offered(**counts, seconds=max(last, seconds), offered=rate)


def wait_for(port: int, path: str, alive: Callable[[], bool] = lambda: True, seconds: float = 240.0) -> None:
    """Until the server answers 200 on a path; TimeoutError if it is not `alive` or takes too long."""
    end = time.monotonic() + seconds
    while not answers(port, path):
        if time.monotonic() > end or not alive():
            raise TimeoutError(f"the server on port {port} {'is not ready' if alive() else 'has ended'}")
        time.sleep(0.1)


def answers(port: int, path: str) -> bool:
    """Whether a GET gets a 200."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as probe:
            probe.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            return probe.recv(CHUNK).startswith(b"HTTP/1.1 200")
    except OSError:  # not listening yet
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

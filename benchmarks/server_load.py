"""A closed-loop HTTP load generator: so many connections, each with one request under way, in one thread."""

import select
import socket
import statistics
import time
from collections.abc import Sequence
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

    def complete(self) -> bool:
        """Read what is there; True when the answer is whole. Raises on anything but a 200."""
        data = self.socket.recv(CHUNK)
        if not data:
            raise ConnectionError(f"the server closed the connection after {bytes(self.received[:200])!r}")
        self.received += data
        head = self.received.find(b"\r\n\r\n")
        if head < 0:
            return False
        if not self.received.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(f"the server answered {bytes(self.received[:400])!r}")
        return len(self.received) >= head + 4 + content_length(bytes(self.received[:head]))


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


def closed_loop(port: int, request: bytes, clients: int, seconds: float) -> Load:
    """Every client sends its next request as soon as its last one is answered."""
    connections = {connection.socket.fileno(): connection for connection in connect(port, clients)}
    poll = select.epoll()
    latencies: list[float] = []
    for number, connection in connections.items():
        poll.register(number, select.EPOLLIN)
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
    for connection in connections.values():
        connection.socket.close()
    poll.close()
    return summary(latencies, took)


def summary(latencies: Sequence[float], seconds: float) -> Load:
    ordered = sorted(latencies)
    last = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return Load(len(ordered), seconds, statistics.median(ordered) * 1e6, last * 1e6)


def wait_for(port: int, path: str, seconds: float = 60.0) -> None:
    """Until the server answers 200 on a path."""
    end = time.monotonic() + seconds
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as probe:
                probe.sendall(request)
                if probe.recv(CHUNK).startswith(b"HTTP/1.1 200"):
                    return
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(f"nothing answers on port {port}") from error
        if time.monotonic() > end:
            raise TimeoutError(f"the server on port {port} is not ready")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

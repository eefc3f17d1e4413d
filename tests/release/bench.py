"""A controller on a bench: its clock passed, counters as a gateway would write them, a server that obeys."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from ingot.release import events
from ingot.release.controller import Clock, Controller
from ingot.release.rollout import State
from ingot.release.spec import parse
from ingot.release.store import Store
from ingot.release.windows import Counters, Observation, bucket_of


class Server:
    """A version's server: KServe's metadata and inference, the repository API, Prometheus' text and queries."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, bytes]] = []
        self.answers: dict[str, tuple[int, bytes]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.asked.append((self.command, self.path, body))
                status, text = outer.answers.get(self.path.partition("?")[0], (200, b"{}"))
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                return

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class Time:
    """A clock that only the test moves; the wall may jump."""

    def __init__(self) -> None:
        self.monotonic, self.wall = 0.0, 1000.0

    def clock(self) -> Clock:
        return Clock(lambda: self.wall, lambda: self.monotonic)


class Bench:
    """A store, a controller, a clock, counters that a gateway would have written."""

    def __init__(self, folder: Path, server: Server, extra: str, versions: str = "") -> None:
        self.server, self.time = server, Time()
        self.store = Store(f"sqlite:///{folder}/release.db")
        self.store.migrate()
        self.controller = Controller(self.store, self.time.clock(), "first")
        text = (
            f"model: digits\nstable: v1\ncandidates: [v2]\nversions:\n  v1: {{endpoints: [{{url: '{server.url}'}}]}}\n"
            f"  v2: {{endpoints: [{{url: '{server.url}'}}]{versions}}}\n{extra}"
        )
        self.counters = {"v1": Counters(histogram={}), "v2": Counters(histogram={})}
        self.store.submit("digits", events.Applied(parse(text)), "test", 1000.0)

    def round(self, seconds: float = 0.1) -> State:
        """Let time pass, make a round, wait for what it began."""
        self.time.monotonic += seconds
        self.time.wall += seconds
        self.controller.step()
        for job in list(self.controller.jobs.values()):
            job.result(60)
        return self.state

    def rounds(self, until: Callable[[State], bool], most: int = 100, seconds: float = 0.5) -> State:
        for _ in range(most):
            if until(self.round(seconds)):
                return self.state
        raise AssertionError(f"it did not come about: {self.state.stage} {self.state.hold} {self.state.message}")

    @property
    def state(self) -> State:
        found, _ = self.store.load("digits")
        assert found is not None
        return found

    def traffic(self, version: str, requests: int, errors: int = 0, latency: float = 0.01) -> None:
        counters, bucket = self.counters[version], bucket_of(latency)
        counters.requests += requests
        counters.errors += errors
        counters.histogram[bucket] = counters.histogram.get(bucket, 0) + requests - errors
        self.store.observe({"digits": Observation("gateway", self.time.wall, self.counters)})

    def close(self) -> None:
        self.controller.threads.shutdown()
        self.store.close()

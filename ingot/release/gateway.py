"""The gateway's supervisor: keeps workers alive, brings them the routes, brings the store what they counted.

`ingot release gateway`. Without a store that answers, the workers go on with the routes they have; counters are
cumulative, so the next observation makes good for those that could not be written.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingot.release import gateway_metrics, windows
from ingot.release.store import Store, Unavailable
from ingot.release.windows import USER_BITS, Counters, Observation
from ingot.release.worker import REPORT, Orders, Report, encode, framed, received
from ingot.server.wire import Exchange, Front

log = logging.getLogger("ingot.release.gateway")
FOLLOW_SECONDS, OBSERVE_SECONDS, RESTART_SECONDS = 0.1, 0.5, 0.2


@dataclass(frozen=True)
class Options:
    """How a gateway runs; `remember` keeps the last routes for a start without a store."""

    store: str
    address: str = "127.0.0.1"
    port: int = 8080
    metrics_port: int = 8081
    workers: int = 1
    remember: Path | None = None


@dataclass
class Worker:
    """A process, the line to it, and the last it told."""

    process: subprocess.Popen[bytes]
    writer: asyncio.StreamWriter
    report: Report | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Gateway:
    """`start`, then `stop`, on one event loop."""

    def __init__(self, options: Options, clock: Callable[[], float] = time.time) -> None:
        self.options, self.clock = options, clock
        self.store = Store(options.store, wait=2.0)
        self.boot = uuid.uuid4().hex[:12]
        self.routes: dict[str, tuple[int, str]] = {}
        self.workers: list[Worker] = []
        self.past: dict[str, dict[str, Counters]] = {}
        self.front = Front(self._answer)
        self.port = self.metrics_port = 0
        self.store_answers = True
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []
        self._attending: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="ingot-store")

    async def start(self) -> None:
        """Listen with all workers, with the routes that can be had."""
        options = self.options
        self._recall()
        await self._follow_once()
        self._listening = socket.create_server(
            (options.address, options.port), backlog=1024, reuse_port=True
        )  # a successor may listen before this one's workers have drained
        self._listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = self._listening.getsockname()[1]
        self.workers = [await self._spawn() for _ in range(options.workers)]
        self.metrics_port = await self.front.start(options.address, options.metrics_port)
        self._tasks = [asyncio.create_task(self._repeat(self._follow_once, FOLLOW_SECONDS)),
                       asyncio.create_task(self._repeat(self._observe, OBSERVE_SECONDS))]  # fmt: skip
        log.info("gateway %s listens on %s:%d, metrics on %d", self.boot, options.address, self.port, self.metrics_port)

    async def stop(self) -> None:
        """Workers answer what is under way, the last counts are written."""
        self._ending = True
        for task in self._tasks:
            task.cancel()
        self._listening.close()
        for worker in self.workers:
            worker.process.terminate()
        await asyncio.gather(*self._attending)
        await self._observe()
        await self.front.stop()
        self.front.abort()
        self._threads.shutdown()
        self.store.close()

    async def _repeat(self, action: Callable[[], Any], period: float) -> None:
        while True:
            await asyncio.sleep(period)
            await action()

    # -- workers ------------------------------------------------------------------------------------------------------
    async def _spawn(self) -> Worker:
        ours, theirs = socket.socketpair()
        listening = self._listening.fileno()
        command = [sys.executable, "-m", "ingot.release.worker", str(listening), str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=(listening, theirs.fileno()), start_new_session=True)
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        worker = Worker(process, writer)
        writer.write(framed(encode(Orders(self.routes))))
        first = await received(reader)
        worker.report = REPORT.decode(first) if first is not None else None
        worker.task = asyncio.create_task(self._attend(worker, reader))
        self._attending.add(worker.task)  # a loop holds its tasks weakly, and a dead worker is forgotten before its end
        worker.task.add_done_callback(self._attending.discard)
        return worker

    async def _attend(self, worker: Worker, reader: asyncio.StreamReader) -> None:
        """Hear a worker until it is gone; then keep what it counted and start another."""
        while (message := await received(reader)) is not None:
            worker.report = REPORT.decode(message)
        worker.writer.close()
        code = await asyncio.get_running_loop().run_in_executor(None, worker.process.wait)
        if worker.report is not None:
            self._keep(worker.report)
        worker.report = None
        if self._ending:
            return
        log.error("a worker ended with %s; another one is started", code)
        self.workers.remove(worker)
        await asyncio.sleep(RESTART_SECONDS)
        if not self._ending:
            self.workers.append(await self._spawn())

    def _keep(self, report: Report) -> None:
        for model, versions in report.counters.items():
            kept = self.past.setdefault(model, {})
            for version, counters in versions.items():
                kept[version] = windows.combined(kept.get(version, Counters()), counters)

    # -- routes -------------------------------------------------------------------------------------------------------
    async def _follow_once(self) -> None:
        known = {model: sequence for model, (sequence, _) in self.routes.items()}
        loop = asyncio.get_running_loop()
        try:
            changed = await loop.run_in_executor(self._threads, self.store.states, known)
        except Unavailable as error:
            self._store_is(False, error)
            return
        self._store_is(True)
        if changed:
            self.routes = {**self.routes, **changed}
            for worker in self.workers:
                worker.writer.write(framed(encode(Orders(changed))))
            self._remember()

    def _store_is(self, answers: bool, error: Exception | None = None) -> None:
        if answers != self.store_answers:
            log.warning("the store answers again" if answers else f"{error}; routes stay as they are")
        self.store_answers = answers

    def _remember(self) -> None:
        path = self.options.remember
        if path is not None:
            part = path.with_suffix(".part")
            part.write_text(json.dumps(self.routes))
            os.replace(part, path)

    def _recall(self) -> None:
        path = self.options.remember
        if path is not None and path.exists():
            self.routes = {model: (int(pair[0]), pair[1]) for model, pair in json.loads(path.read_text()).items()}

    # -- counts -------------------------------------------------------------------------------------------------------
    def observations(self) -> dict[str, Observation]:
        """model => what was counted so far, over all workers, dead ones too"""
        reports = [worker.report for worker in self.workers if worker.report is not None]
        return {model: self._observation(model, reports) for model in self.routes}

    def _observation(self, model: str, reports: list[Report]) -> Observation:
        counters = dict(self.past.get(model, {}))
        for report in reports:
            for version, counted in report.counters.get(model, {}).items():
                counters[version] = windows.combined(counters.get(version, Counters()), counted)
        applied = min((report.applied.get(model, 0) for report in reports), default=0)
        opened = {version for report in reports for name, version in report.open_breakers if name == model}
        users = distinct([report.users.get(model, {}) for report in reports])
        return Observation(self.boot, self.clock(), counters, applied, users, tuple(sorted(opened)))

    async def _observe(self) -> None:
        rows = self.observations()
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self.store.observe, rows)
        except Unavailable as error:
            self._store_is(False, error)

    def _answer(self, exchange: Exchange) -> None:
        """The metrics port: /metrics, /v2/health/ready."""
        path = exchange.target.partition(b"?")[0]
        if path == b"/metrics":
            page = gateway_metrics.page(self.observations(), self.routes, len(self.workers), self.store_answers)
            exchange.respond(200, [page.encode()], {b"content-type": gateway_metrics.CONTENT_TYPE})
        else:
            exchange.respond(200 if path in (b"/v2/health/ready", b"/v2/health/live") else 404)


def distinct(maps: list[dict[str, bytes]]) -> dict[str, int]:
    """version => distinct users, by linear counting over the workers' bits (Whang 1990); 1 % up to 200,000"""
    import math

    found = {}
    for version in {version for one in maps for version in one}:
        merged = 0
        for one in maps:
            merged |= int.from_bytes(one.get(version, b""), "little")
        empty = max(USER_BITS - merged.bit_count(), 1)
        found[version] = round(USER_BITS * math.log(USER_BITS / empty))
    return found


def summary(observations: Mapping[str, Observation]) -> dict[str, int]:
    """version => requests, over all models; for the log at the end."""
    totals: dict[str, int] = {}
    for observation in observations.values():
        for version, counters in observation.counters.items():
            totals[version] = totals.get(version, 0) + counters.requests
    return totals

"""A batcher with a lock, and the instance threads that pull from it: gather, run, split, answer.

A model that takes less than the hand-over to a thread runs on the event loop instead, a batch after each look at the
input: what arrived together runs together.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ingot.errors import IngotError
from ingot.server.batcher import Entry, Take
from ingot.server.instances import Instance
from ingot.server.latency import LatencyTable
from ingot.server.mailbox import Mailbox
from ingot.server.ports import Ports, answer
from ingot.server.request import Code, Done, Outcome, Request, SequencePlace, ServerError
from ingot.server.states import States
from ingot.server.statistics import Statistics, Timing

log = logging.getLogger("ingot.server")
clock = time.monotonic_ns
Cancel = Callable[[], bool]
_PUMPED = 1_000_000  # nanoseconds for which quick models may keep the event loop from its input


class Closed(Exception):
    """The scheduler takes no more requests."""


class Queue(Protocol):
    """A pure batcher: batcher.Batcher, or sequences.SequenceBatcher for models with state."""

    def __len__(self) -> int: ...
    def push(
        self, rows: int, shape: Hashable, token: Any, now: int, level: int, timeout_us: int, place: SequencePlace | None
    ) -> Entry:
        """Queue a request."""

    def take(self, now: int) -> Take:
        """What to run now."""

    def finished(self, batch: Sequence[Entry], now: int) -> None:
        """These have run."""

    def cancel(self, entry: Entry) -> bool:
        """Forget a request that waits."""

    def closing(self) -> None:
        """No more will come."""


@dataclass(frozen=True, eq=False, slots=True)
class _Job:
    request: Request
    done: Done


class Scheduler:
    """Answers every request it accepts exactly once, also those that wait when it closes."""

    def __init__(
        self, ports: Ports, version: int, batcher: Queue, instances: Sequence[Instance], statistics: Statistics,
        latency: LatencyTable, ordered: bool = False, loop: Mailbox | None = None,
        states: States | None = None,
    ) -> None:  # fmt: skip
        self._ports, self._version, self._batcher, self._statistics = ports, version, batcher, statistics
        self._latency, self._instances, self._states = latency, instances, states
        self._ready = threading.Condition(threading.Lock())
        self._closing = False
        self._order: _InOrder | None = _InOrder() if ordered else None
        self._loop, self._pumping, self._idle = loop, False, threading.Event()
        self._at_once = loop is not None and not ports.max_rows and not ordered
        self._threads = [
            threading.Thread(target=self._serve, args=(instance,), name=f"ingot-{ports.model}-{number}", daemon=True)
            for number, instance in enumerate(() if loop else instances)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return len(self._batcher)

    def submit(self, request: Request, done: Done) -> Cancel:
        """Queue a request; returns what cancels it while it waits. Closed if this version takes no more."""
        rows, shape = self._ports.check(request)
        job = _Job(request, done)
        now = clock()
        if self._at_once and self._loop is not None and self._loop.here() and not len(self._batcher):
            return self._run_at_once(Entry(0, rows, shape, now, 1, None, job))
        with self._ready:
            if self._closing:
                raise Closed
            entry = self._batcher.push(rows, shape, job, now, request.priority, request.timeout_us, request.sequence)
            self._wake()
        return lambda: self._cancel(entry)

    def _run_at_once(self, entry: Entry) -> Cancel:
        """On the event loop, with nothing before it and nothing that could run with it."""
        if self._closing:
            raise Closed
        self._run(self._instances[0], (entry,))
        return _too_late

    def close(self) -> None:
        """Take no more requests, answer those that wait, end the threads, close the instances."""
        with self._ready:
            self._closing = True
            self._batcher.closing()
            self._ready.notify_all()
            if self._loop is not None:
                self._wake()
        if self._loop is not None:
            self._idle.wait()
        for thread in self._threads:
            thread.join()
        for instance in self._instances:
            instance.close()

    def _cancel(self, entry: Entry) -> bool:
        with self._ready:
            waiting = self._batcher.cancel(entry)
        if waiting:
            self._finish(entry, ServerError(Code.CANCELLED, "the request was cancelled", "CANCELED"))
        return waiting

    def _wake(self) -> None:
        """Something is there to be taken; under the lock."""
        if self._loop is None:
            self._ready.notify()
        elif not self._pumping:
            self._pumping = True
            self._loop.post(self._pump)

    def _take(self) -> Take:
        """What the batcher says; under the lock."""
        take = self._batcher.take(clock())
        for entry in take.rejected:
            self._latency.relax(entry.shape)
        if self._order:
            self._order.expect(take.batch)
        return take

    # -- an instance thread -------------------------------------------------------------------------------------------
    def _serve(self, instance: Instance) -> None:
        while (batch := self._next()) is not None:
            if batch:
                self._run(instance, batch)

    def _next(self) -> tuple[Entry, ...] | None:
        """The next batch; empty after refusals, None when closed and nothing waits."""
        with self._ready:
            take = self._take()
            while not take.batch and not take.rejected:
                if self._closing and not len(self._batcher):
                    return None
                self._ready.wait(None if take.wake is None else max(take.wake - clock(), 0) / 1e9)
                take = self._take()
            if len(self._batcher):
                self._ready.notify()
        self._reject(take)
        return take.batch

    # -- on the event loop --------------------------------------------------------------------------------------------
    def _pump(self) -> None:
        """Run what waits, for a while, and come again if more does."""
        until = clock() + _PUMPED
        while True:
            with self._ready:
                take = self._take()
                more = bool(len(self._batcher)) and bool(take.batch or take.rejected)
                self._pumping = more
            self._reject(take)
            if take.batch:
                self._run(self._instances[0], take.batch)
            if not more or clock() > until:
                break
        if self._loop is not None and more:
            self._loop.post(self._pump)
        elif self._loop is not None and take.wake is not None:
            self._loop.post_later(self._pump_again, max(take.wake - clock(), 0) / 1e9)
        elif self._closing and not len(self._batcher):
            self._idle.set()

    def _pump_again(self) -> None:
        with self._ready:
            self._wake()

    def _reject(self, take: Take) -> None:
        for entry in take.rejected:
            self._finish(entry, ServerError(Code.UNAVAILABLE, "Request timeout expired", "REJECTED"))

    # -- one batch ----------------------------------------------------------------------------------------------------
    def _run(self, instance: Instance, batch: tuple[Entry, ...]) -> None:
        requests = [self._job(entry).request for entry in batch]
        start = clock()
        try:
            feeds = self._ports.gather(requests)
            if self._states:
                feeds |= self._states.feeds(batch)
            gathered = clock()
            results = instance.run(feeds)
            computed = clock()
            if self._states:
                self._states.keep(batch, results)
            parts = self._ports.split(results, requests, [entry.rows for entry in batch])
        except Exception as error:  # noqa: BLE001 - whatever a model raises is its requests' answer, not the server's end
            self._fail(batch, error)
            return
        self._note(batch, Timing(start, gathered, computed, clock()))
        self._answer(
            batch, [answer(r, self._version, part, self._ports) for r, part in zip(requests, parts, strict=True)]
        )

    def _note(self, batch: Sequence[Entry], timing: Timing) -> None:
        rows = sum(entry.rows for entry in batch)
        with self._ready:
            self._latency.observe(batch[0].shape, rows, timing.answered - timing.start)
            self._over(batch)
        self._statistics.executed([entry.arrived for entry in batch], rows, timing)

    def _fail(self, batch: Sequence[Entry], error: Exception) -> None:
        if not isinstance(error, IngotError):
            log.exception("model %s failed", self._ports.model, exc_info=error)
        failure = as_server_error(error)
        with self._ready:
            self._over(batch)
        for entry in batch:
            self._statistics.failed(clock() - entry.arrived, failure.reason)
        self._answer(batch, [failure] * len(batch))

    def _over(self, batch: Sequence[Entry]) -> None:
        """A batch has run; what follows in its sequences may be taken. Under the lock."""
        if self._states:
            self._batcher.finished(batch, clock())
            if len(self._batcher):
                self._wake()
            elif self._closing:
                self._ready.notify_all()

    def _job(self, entry: Entry) -> _Job:
        return entry.token.inner if self._states else entry.token

    def _answer(self, batch: Sequence[Entry], outcomes: Sequence[Outcome]) -> None:
        for entry, outcome in zip(batch, outcomes, strict=True):
            if self._order:
                self._order.finish(entry, outcome)
            else:
                self._job(entry).done(outcome)

    def _finish(self, entry: Entry, error: ServerError) -> None:
        self._statistics.failed(clock() - entry.arrived, error.reason)
        self._job(entry).done(error)


def _too_late() -> bool:
    return False


class _InOrder:
    """Lets answers out in the order in which their requests were taken (preserve_ordering)."""

    def __init__(self) -> None:
        self._expected: deque[Entry] = deque()
        self._finished: dict[Entry, Outcome] = {}
        self._lock = threading.Lock()

    def expect(self, batch: Sequence[Entry]) -> None:
        """These were taken, in this order."""
        with self._lock:
            self._expected.extend(batch)

    def finish(self, entry: Entry, outcome: Outcome) -> None:
        """Answer whatever is next in order and has its outcome."""
        with self._lock:
            self._finished[entry] = outcome
            while self._expected and self._expected[0] in self._finished:
                first: Any = self._expected.popleft()
                first.token.done(self._finished.pop(first))


def as_server_error(error: Exception) -> ServerError:
    """An exception of a model as the answer to its requests."""
    if isinstance(error, ServerError):
        return error
    if isinstance(error, IngotError):
        return ServerError(Code.INVALID_ARG, str(error), "BACKEND")
    return ServerError(Code.INTERNAL, f"{type(error).__name__}: {error}", "BACKEND")

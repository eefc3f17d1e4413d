"""A queue with a lock, and what happens to a batch: gather, run, split, answer. drivers.py says who runs it, where."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ingot.errors import IngotError
from ingot.server.batcher import Entry, Take
from ingot.server.instances import Instance
from ingot.server.latency import LatencyTable
from ingot.server.ports import Feeds, PartlyRefused, Ports, answer
from ingot.server.request import Array, Code, Done, Outcome, Request, SequencePlace, ServerError, Tensor
from ingot.server.states import States
from ingot.server.statistics import Statistics, Timing

log = logging.getLogger("ingot.server")
clock = time.monotonic_ns
Cancel = Callable[[], bool]
Execute = Callable[[Instance, Feeds, Sequence[Request]], Mapping[str, Array]]


class Closed(Exception):
    """The scheduler takes no more requests."""


class Queue(Protocol):
    """A pure batcher: batcher.Batcher, or sequences.SequenceBatcher for models with state."""

    def __len__(self) -> int: ...
    @property
    def patient(self) -> bool:
        """Whether what waits may wait a moment longer for company."""

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


@dataclass(eq=False, slots=True)
class _Job:
    request: Request
    done: Done


class Driver(Protocol):
    """What takes batches from the queue and runs them: drivers.py."""

    def wake(self) -> None:
        """Something is there to be taken; called under the lock."""

    def at_once(self, entry: Entry) -> bool:
        """Run it now, if that is better than to queue it."""

    def close(self) -> None:
        """Return when everything that was accepted is answered."""


class Scheduler:
    """Answers every request it accepts exactly once, also those that wait when it closes."""

    def __init__(
        self, ports: Ports, version: int, queue: Queue, drive: Callable[[Scheduler], Driver], statistics: Statistics,
        latency: LatencyTable, ordered: bool = False, states: States | None = None, execute: Execute | None = None,
    ) -> None:  # fmt: skip
        self.ports, self._version, self._queue, self._statistics = ports, version, queue, statistics
        self._latency, self._states, self._execute = latency, states, execute
        self.lock = threading.Lock()
        self.ready = threading.Condition(self.lock)
        self.closing = False
        self._order: _InOrder | None = _InOrder() if ordered else None
        self._driver = drive(self)

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def patient(self) -> bool:
        """Whether what waits may wait a moment longer for company."""
        return self._queue.patient

    def submit(self, request: Request, done: Done) -> Cancel:
        """Queue a request; returns what cancels it while it waits. Closed if this version takes no more."""
        rows, shape = self.ports.check(request)
        job = _Job(request, done)
        now = clock()
        if not self.ports.max_rows and not len(self._queue) and not self._order and not self._states:
            if self.closing:
                raise Closed
            if self._driver.at_once(Entry(0, rows, shape, now, 1, None, job)):
                return _too_late
        with self.lock:
            if self.closing:
                raise Closed
            entry = self._queue.push(rows, shape, job, now, request.priority, request.timeout_us, request.sequence)
            self._driver.wake()
        return lambda: self._cancel(entry)

    def close(self) -> None:
        """Take no more requests, answer those that wait, end the driver and its instances."""
        with self.lock:
            self.closing = True
            self._queue.closing()
            self.ready.notify_all()
            self._driver.wake()
        self._driver.close()

    def _cancel(self, entry: Entry) -> bool:
        with self.lock:
            waiting = self._queue.cancel(entry)
        if waiting:
            self._finish(entry, ServerError(Code.CANCELLED, "the request was cancelled", "CANCELED"))
        return waiting

    # -- for drivers --------------------------------------------------------------------------------------------------
    def take(self) -> Take:
        """What the queue says; under the lock."""
        take = self._queue.take(clock())
        for shape in {entry.shape for entry in take.rejected}:
            self._latency.relax(shape)
        if self._order:
            self._order.expect(take.batch)
        return take

    def drained(self) -> bool:
        """Closing, and nothing waits; under the lock."""
        return self.closing and not len(self._queue)

    def reject(self, take: Take) -> None:
        """Answer what the queue has refused."""
        for entry in take.rejected:
            self._finish(entry, ServerError(Code.UNAVAILABLE, "Request timeout expired", "REJECTED"))

    def gather(self, batch: Sequence[Entry]) -> Feeds:
        """What the model is given for a batch."""
        feeds = self.ports.gather([self._job(entry).request for entry in batch])
        return feeds | self._states.feeds(batch) if self._states else feeds

    def run(self, instance: Instance, batch: Sequence[Entry]) -> None:
        """Run a batch here and now, and answer it."""
        start = clock()
        try:
            feeds = self.gather(batch)
            gathered = clock()
            if self._execute is None:
                results = instance.run(feeds)
            else:
                results = self._execute(instance, feeds, [self._job(entry).request for entry in batch])
        except Exception as error:  # noqa: BLE001 - whatever a model raises is its requests' answer, not the server's end
            self.fail(batch, error)
        else:
            self.complete(batch, results, start, gathered, clock())

    def complete(
        self, batch: Sequence[Entry], results: Mapping[str, Array], start: int, gathered: int, ran: int
    ) -> None:
        """Answer a batch that has run; the times are when it started, was gathered and had run."""
        jobs = [self._job(entry) for entry in batch] if self._states else [entry.token for entry in batch]
        requests = [job.request for job in jobs]
        try:
            if self._states:
                self._states.keep(batch, results)
            parts = self.ports.split(results, requests, [entry.rows for entry in batch])
        except PartlyRefused as partly:
            self._complete_partly(batch, partly.parts, Timing(start, gathered, ran, clock()))
            return
        except Exception as error:  # noqa: BLE001 - a model that returns nonsense fails its requests
            self.fail(batch, error)
            return
        timing = Timing(start, gathered, ran, clock())
        self._note(batch, timing)
        for entry, job, part in zip(batch, jobs, parts, strict=True):
            request = job.request
            if request.origin is not None:
                request.origin.executed(request.model, self._version, entry.arrived, timing)
            outcome = answer(request, self._version, part, self.ports)
            if self._order:
                self._order.finish(entry, outcome)
            else:
                job.done(outcome)

    def _complete_partly(
        self, batch: Sequence[Entry], parts: Sequence[Sequence[Tensor] | ServerError], timing: Timing
    ) -> None:
        """Fail what the model refused, one by one; answer the rest."""
        good = [(entry, part) for entry, part in zip(batch, parts, strict=True) if not isinstance(part, ServerError)]
        for entry, part in zip(batch, parts, strict=True):
            if isinstance(part, ServerError):
                self.fail((entry,), part)
        if good:
            entries = [entry for entry, _ in good]
            self._note(entries, timing)
            outcomes = [answer(self._job(entry).request, self._version, part, self.ports) for entry, part in good]
            self._answer(entries, outcomes)

    def fail(self, batch: Sequence[Entry], error: Exception) -> None:
        """Answer a batch with what went wrong."""
        if not isinstance(error, IngotError):
            log.error("model %s failed", self.ports.model, exc_info=error)
        failure = as_server_error(error)
        if self._states:
            with self.lock:
                self._over(batch)
        for entry in batch:
            self._statistics.failed(clock() - entry.arrived, failure.reason)
        self._answer(batch, [failure] * len(batch))

    def expected(self, batch: Sequence[Entry]) -> int:
        """Nanoseconds a batch will probably take; under the lock."""
        return self._latency(batch[0].shape, sum(entry.rows for entry in batch))

    def _note(self, batch: Sequence[Entry], timing: Timing) -> None:
        rows = sum([entry.rows for entry in batch])
        with self.lock:
            self._latency.observe(batch[0].shape, rows, timing.answered - timing.start)
            if self._states:
                self._over(batch)
        self._statistics.executed([entry.arrived for entry in batch], rows, timing)

    def _over(self, batch: Sequence[Entry]) -> None:
        """A batch with states has run; what follows in its sequences may be taken. Under the lock."""
        self._queue.finished(batch, clock())
        self._driver.wake()
        if self.closing:
            self.ready.notify_all()

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

"""Requests of stateful models: one at a time of each sequence, in order; so many sequences at once. Pure.

A sequence holds one of the slots from its START to its END (or until it has been idle for too long). Others wait. A
batch takes at most one request of each sequence, those that waited longest first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ingot.server.batcher import Entry, Take
from ingot.server.request import Code, SequencePlace, ServerError, invalid


@dataclass(frozen=True)
class SequenceRules:
    """Slots of all instances together; idle nanoseconds after which a sequence loses its slot; how batches form."""

    model: str
    slots: int
    idle: int = 1_000_000_000
    max_rows: int = 1
    preferred: tuple[int, ...] = ()
    max_delay: int = 0


@dataclass(eq=False)
class Run:
    """One sequence from START to END: what waits, what it remembers between requests."""

    identity: int | str
    waiting: deque[Entry] = field(default_factory=deque)
    running: bool = False
    ended: bool = False  # its END was accepted: the identity is free for a new START
    touched: int = 0
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class SequenceToken:
    """What an entry carries: the scheduler's own token, its sequence and its place in it."""

    inner: Any
    run: Run
    place: SequencePlace


class SequenceBatcher:
    """The queue of a stateful model."""

    def __init__(self, rules: SequenceRules) -> None:
        self.rules = rules
        self._open: dict[int | str, Run] = {}  # sequences that may still get requests
        self._active: list[Run] = []  # those that hold a slot
        self._backlog: deque[Run] = deque()
        self._count = self._order = 0
        self._closing = False

    def __len__(self) -> int:
        return self._count

    @property
    def patient(self) -> bool:
        """Sequences are run as they come."""
        return False

    def push(
        self, rows: int, shape: Hashable, token: Any, now: int, level: int = 0, timeout_us: int = 0,
        place: SequencePlace | None = None,
    ) -> Entry:  # fmt: skip
        """Queue a request of a sequence; ServerError for one that belongs to none."""
        if place is None:
            raise invalid(
                f"inference request to model '{self.rules.model}' must specify a non-zero or non-empty correlation ID"
            )
        if rows != 1:
            raise invalid(f"inference request to model '{self.rules.model}' must have batch-size 1, it has {rows}")
        run = self._run_of(place, now)
        run.touched = now
        run.ended = place.end
        if place.end:
            self._open.pop(place.identity, None)
        entry = Entry(self._order, rows, shape, now, 1, None, SequenceToken(token, run, place))
        self._order += 1
        self._count += 1
        run.waiting.append(entry)
        return entry

    def _run_of(self, place: SequencePlace, now: int) -> Run:
        run = self._open.get(place.identity)
        if run is not None and self._idle(run, now):
            self._end(run)
            run = None
        if place.start:
            if run is not None:  # a START ends the old sequence after what it has queued
                run.ended = True
            run = self._open[place.identity] = Run(place.identity)
            self._backlog.append(run)
        if run is None:
            raise ServerError(
                Code.INVALID_ARG,
                f"inference request for sequence {place.identity} to model '{self.rules.model}' must specify the START "
                "flag on the first request of the sequence",
            )
        return run

    def cancel(self, entry: Entry) -> bool:
        """Forget a waiting request; the sequence goes on without it."""
        waiting = entry.token.run.waiting
        if entry not in waiting:
            return False
        waiting.remove(entry)
        self._count -= 1
        return True

    def drain(self) -> tuple[Entry, ...]:
        """Forget and return all that wait."""
        runs = (*self._active, *self._backlog)
        entries = tuple(entry for run in runs for entry in run.waiting)
        for run in runs:
            run.waiting.clear()
        self._count = 0
        return entries

    def closing(self) -> None:
        """No more will come: sequences that wait for a slot run beside those that hold one."""
        self._closing = True

    def take(self, now: int) -> Take:
        """At most one request of each sequence that is not running."""
        self._admit(now)
        heads = sorted(
            (run.waiting[0] for run in self._active if run.waiting and not run.running), key=lambda entry: entry.order
        )
        if not heads:
            return Take()
        batch = [entry for entry in heads if entry.shape == heads[0].shape][: max(self.rules.max_rows, 1)]
        wake = self._wait_until(batch)
        if wake is not None and wake > now:
            return Take((), (), wake)
        for entry in batch:
            run = entry.token.run
            run.waiting.popleft()
            run.running = True
        self._count -= len(batch)
        return Take(tuple(batch))

    def finished(self, batch: Sequence[Entry], now: int) -> None:
        """These have run: their sequences may go on, or have ended."""
        for entry in batch:
            run = entry.token.run
            run.running, run.touched = False, now
            if run.ended and not run.waiting:
                self._end(run)

    def _admit(self, now: int) -> None:
        """Give free slots to sequences that wait, in order of their START."""
        self._active = [run for run in self._active if not self._idle(run, now) and not self._over(run)]
        while self._backlog and (self._closing or len(self._active) < self.rules.slots):
            self._active.append(self._backlog.popleft())

    @staticmethod
    def _over(run: Run) -> bool:
        return run.ended and not run.waiting and not run.running

    def _idle(self, run: Run, now: int) -> bool:
        return not run.waiting and not run.running and now - run.touched > self.rules.idle

    def _end(self, run: Run) -> None:
        if self._open.get(run.identity) is run:
            del self._open[run.identity]
        if run in self._active:
            self._active.remove(run)

    def _wait_until(self, batch: Sequence[Entry]) -> int | None:
        rules = self.rules
        full = len(batch) >= min(max(rules.max_rows, 1), len(self._active))
        if not rules.max_delay or full or len(batch) in rules.preferred or self._closing:
            return None
        return min(entry.arrived for entry in batch) + rules.max_delay

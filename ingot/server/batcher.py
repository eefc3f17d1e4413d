"""Which waiting requests run together, and when. Pure: every method takes the clock; times are nanoseconds.

Triton's rules are hard bounds: arrival order within a priority level, shapes never mix, the largest preferred size or
else the largest possible, a delay only where one is configured, queue limits and timeouts. Within them, requests with
deadlines run earliest deadline first, in the batch size whose measured latency still meets the first deadline.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, Protocol

from ingot.server.request import Code, SequencePlace, ServerError


class Latency(Protocol):
    """What is known of a model's speed; latency.LatencyTable."""

    def __call__(self, shape: Hashable, rows: int) -> int:
        """Expected nanoseconds of one execution; 0 if nothing is known."""

    def bound(self, shape: Hashable, rows: int) -> int:
        """Nanoseconds that one execution rarely exceeds: what deadlines are held against."""

    def warm(self, shape: Hashable, rows: int) -> bool:
        """Whether this very size has been measured."""


@dataclass(frozen=True)
class QueuePolicy:
    """Limits of one priority level. A timeout of 0 is none; `max_size` 0 is unlimited."""

    action: Literal["REJECT", "DELAY"] = "REJECT"
    default_timeout: int = 0
    allow_override: bool = False
    max_size: int = 0


@dataclass(frozen=True)
class Rules:
    """Triton's dynamic_batching. `levels` 0: no priorities; level 1 comes first. `slack` is left before deadlines.

    `linger`, ours: the share of the last batch's time for which one waits until as many rows are there as ran last.
    """

    max_rows: int = 1
    preferred: tuple[int, ...] = ()
    max_delay: int = 0
    levels: int = 0
    default_level: int = 1
    policy: QueuePolicy = QueuePolicy()
    policies: Mapping[int, QueuePolicy] = field(default_factory=dict)
    slack: int = 500_000
    linger: float = 0.0

    def policy_of(self, level: int) -> QueuePolicy:
        """The queue policy of a priority level."""
        return self.policies.get(level, self.policy)


@dataclass(eq=False, slots=True)
class Entry:
    """A waiting request: `rows` of the batch it fills, `shape` what must be equal within a batch."""

    order: int
    rows: int
    shape: Hashable
    arrived: int
    level: int
    deadline: int | None
    token: Any


@dataclass(slots=True)
class Take:
    """What to do now: run `batch` (may be empty), refuse `rejected`; if both are empty, ask again at `wake`."""

    batch: tuple[Entry, ...] = ()
    rejected: tuple[Entry, ...] = ()
    wake: int | None = None


_NOTHING = Take()


class Batcher:
    """Requests waiting for one model; each level's list is kept in order of urgency."""

    def __init__(self, rules: Rules, latency: Latency | None = None) -> None:
        self.rules, self._latency = rules, latency
        self._waiting: dict[int, list[Entry]] = {}
        self._delayed: dict[int, list[Entry]] = {}
        self._order = 0
        self._deadlines = 0
        self._count = 0
        self._last_rows = 0
        self._lingering: int | None = None  # since when
        self._passed, self._patience = 0, _LEAST_PATIENCE

    def __len__(self) -> int:
        return self._count

    @property
    def patient(self) -> bool:
        """Nobody has said how to batch, and nobody has said by when."""
        return self.rules.linger > 0 and not self._deadlines

    def push(
        self, rows: int, shape: Hashable, token: Any, now: int, level: int = 0, timeout_us: int = 0,
        place: SequencePlace | None = None,
    ) -> Entry:  # fmt: skip
        """Queue a request; ServerError when its queue is full or its batch too large."""
        rules = self.rules
        if rows > rules.max_rows:
            raise ServerError(
                Code.INVALID_ARG, f"inference request batch-size must be <= {rules.max_rows}, it is {rows}"
            )
        level = min(level or rules.default_level, rules.levels) if rules.levels else 1
        policy = rules.policy_of(level)
        if policy.max_size and self._size(level) >= policy.max_size:
            raise ServerError(Code.UNAVAILABLE, "Exceeds maximum queue size", "REJECTED")
        entry = Entry(self._order, rows, shape, now, level, _deadline(policy, now, timeout_us), token)
        self._order += 1
        queue = self._waiting.setdefault(level, [])
        if self._deadlines or entry.deadline is not None:
            insort(queue, entry, key=_urgency)
        else:  # nothing is more urgent than what came before it
            queue.append(entry)
        self._deadlines += entry.deadline is not None
        self._count += 1
        return entry

    def cancel(self, entry: Entry) -> bool:
        """Forget a waiting request; False if it is not waiting any more."""
        before = len(self)
        self._forget((entry,))
        return len(self) < before

    def drain(self) -> tuple[Entry, ...]:
        """Forget and return all that wait."""
        entries = tuple(self._in_order())
        self._forget(entries)
        return entries

    def closing(self) -> None:
        """No more will come: nothing waits for company."""
        self.rules = replace(self.rules, max_delay=0, linger=0.0)

    def finished(self, batch: Sequence[Entry], now: int) -> None:
        """These have run; requests of a model without state do not wait for one another."""

    def take(self, now: int) -> Take:
        """The batch to run now on an instance that is free."""
        rejected = self._expire(now) if self._deadlines else ()
        candidates = self._in_order()
        if not candidates:
            return Take(rejected=rejected) if rejected else _NOTHING
        if len(candidates) == 1 and not self.rules.max_delay and self._last_rows <= 1:
            alone = candidates[0]
            self._forget((alone,))
            self._last_rows = alone.rows
            return Take((alone,), rejected)
        batch = self._largest(candidates, now)
        preferred = self._preferred(batch)
        wake = None if preferred else self._wait_until(batch, len(candidates), now)
        if wake is not None and wake > now:
            return Take((), rejected, wake)
        chosen = preferred or self._worthwhile(batch)
        self._forget(chosen)
        self._last_rows, self._lingering = _rows(chosen), None
        return Take(chosen, rejected)

    def _size(self, level: int) -> int:
        return len(self._waiting.get(level, ())) + len(self._delayed.get(level, ()))

    def _forget(self, entries: Sequence[Entry]) -> None:
        first = self._waiting.get(entries[0].level, []) if entries else []
        if first[: len(entries)] == list(entries):  # as nearly always
            del first[: len(entries)]
            self._count -= len(entries)
            if self._deadlines:
                self._deadlines -= sum([entry.deadline is not None for entry in entries])
            return
        for entry in entries:
            for queue in (self._waiting, self._delayed):
                found = queue.get(entry.level, [])
                if entry in found:
                    found.remove(entry)
                    self._deadlines -= entry.deadline is not None
                    self._count -= 1
                    break

    # -- expiry -------------------------------------------------------------------------------------------------------
    def _expire(self, now: int) -> tuple[Entry, ...]:
        """Refuse or set back what cannot meet its deadline any more, before it costs an execution."""
        late = [
            entry
            for entries in self._waiting.values()
            for entry in entries
            if entry.deadline is not None and now + self._bound(entry.shape, entry.rows) > entry.deadline
        ]
        set_back = [entry for entry in late if self.rules.policy_of(entry.level).action == "DELAY"]
        for entry in set_back:
            self._waiting[entry.level].remove(entry)
            self._delayed.setdefault(entry.level, []).append(entry)
        rejected = tuple(entry for entry in late if entry not in set_back)
        self._forget(rejected)
        return rejected

    def _expected(self, shape: Hashable, rows: int) -> int:
        return self._latency(shape, rows) if self._latency else 0

    def _bound(self, shape: Hashable, rows: int) -> int:
        return self._latency.bound(shape, rows) if self._latency else 0

    # -- order --------------------------------------------------------------------------------------------------------
    def _in_order(self) -> list[Entry]:
        """Waiting before delayed, level before level, urgent first; not to be changed."""
        if not self._delayed and len(self._waiting) == 1:
            return next(iter(self._waiting.values()))
        return [entry for queue in (self._waiting, self._delayed) for level in sorted(queue) for entry in queue[level]]

    # -- size ---------------------------------------------------------------------------------------------------------
    def _largest(self, candidates: Sequence[Entry], now: int) -> tuple[Entry, ...]:
        """The largest batch from the head of the order; under deadlines the start that serves most rows a second.

        What is passed over is late after that batch: so only where the head's deadline makes the batch small.
        """
        best = self._from(candidates, 0, now)
        if not self._latency or len(best) == len(candidates) or candidates[0].deadline is None:
            return best
        best_rate = self._rate(best)
        for start in range(1, min(len(candidates), _STARTS)):
            if candidates[start].level != candidates[0].level or _rows(best) >= self.rules.max_rows:
                break
            batch = self._from(candidates, start, now)
            rate = self._rate(batch)
            if rate > best_rate * _CLEAR_GAIN:
                best, best_rate = batch, rate
        return best

    def _from(self, candidates: Sequence[Entry], start: int, now: int) -> tuple[Entry, ...]:
        """Entries of the first one's shape, from `start` on, while they fit and the earliest deadline is met."""
        head, most = candidates[start], self.rules.max_rows
        batch, rows, shape, limit = [head], head.rows, head.shape, head.deadline
        for entry in islice(candidates, start + 1, None):
            if entry.shape != shape:
                if self._latency is None:
                    break  # Triton: a new shape ends the batch
                continue
            rows += entry.rows
            if rows > most:
                break
            if self._deadlines:
                limit = _earlier(limit, entry.deadline)
                if not self._meets(limit, shape, rows, now):
                    break
            batch.append(entry)
        return tuple(batch)

    def _meets(self, deadline: int | None, shape: Hashable, rows: int, now: int) -> bool:
        if deadline is None or self._latency is None or now > deadline:
            return True
        return now + self._latency.bound(shape, rows) + self.rules.slack <= deadline

    def _rate(self, batch: Sequence[Entry]) -> float:
        return _rows(batch) / max(self._expected(batch[0].shape, _rows(batch)), 1)

    def _preferred(self, batch: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """The longest beginning whose rows are a preferred size; empty if none is."""
        rows, chosen = 0, 0
        if self.rules.preferred:
            for count, entry in enumerate(batch, 1):
                rows += entry.rows
                chosen = count if rows in self.rules.preferred else chosen
        return batch[:chosen]

    def _worthwhile(self, batch: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """The beginning of a batch up to the last size that pays: a larger one must serve clearly more rows a second.

        Only a few sizes are used, so that each is soon known and its memory kept; one not yet measured is tried, and
        one that did not pay is tried again now and then: else a size that was slow by chance would be slow for good.
        """
        if self._latency is None or self.rules.max_delay or len(batch) == 1:
            return batch
        latency, shape, most = self._latency, batch[0].shape, self.rules.max_rows
        best, best_rate, rows, passed = 0, 0.0, 0, 0
        for count, entry in enumerate(batch, 1):
            rows += entry.rows
            if count > 1 and rows not in _STEPS and rows != most:
                continue
            rate = rows / (latency(shape, rows) or 1)
            if rate > best_rate * _CLEAR_GAIN or not latency.warm(shape, rows):
                best, best_rate, passed = count, rate, 0
            else:
                passed = passed or count
        return batch[: passed if passed and self._curious() else best]

    def _curious(self) -> bool:
        """Whether to try the size that does not seem to pay: ever more rarely."""
        self._passed += 1
        if self._passed < self._patience:
            return False
        self._passed, self._patience = 0, min(2 * self._patience, _MOST_PATIENCE)
        return True

    # -- delay --------------------------------------------------------------------------------------------------------
    def _wait_until(self, batch: Sequence[Entry], waiting: int, now: int) -> int | None:
        """Until when a batch may wait for more; None to run at once."""
        rows = _rows(batch)
        if len(batch) < waiting or rows >= self.rules.max_rows:
            return None
        if self.rules.max_delay:
            until = min(entry.arrived for entry in batch) + self.rules.max_delay
        elif self.rules.linger and rows < self._last_rows:
            self._lingering = now if self._lingering is None else self._lingering
            pause = int(self.rules.linger * self._expected(batch[0].shape, self._last_rows))
            until = self._lingering + (pause if pause > _SHORTEST_PAUSE else 0)
        else:
            return None
        deadlines = [entry.deadline for entry in batch if entry.deadline is not None]
        if deadlines:
            until = min(until, min(deadlines) - self._bound(batch[0].shape, rows) - self.rules.slack)
        return until


_STARTS = 64
_SHORTEST_PAUSE = 100_000  # a shorter one is not worth a timer
_CLEAR_GAIN = 1.05
_STEPS = frozenset(rows for power in range(32) for rows in (1 << power, 3 << power))  # 1, 2, 3, 4, 6, 8, 12, 16, 24, …
_LEAST_PATIENCE, _MOST_PATIENCE = 16, 1024  # batches after which a size that did not pay is tried again
_PATIENCE = 1_000_000_000  # a request without a deadline is served as if it were due after a second: it never starves


def _rows(batch: Sequence[Entry]) -> int:
    return sum([entry.rows for entry in batch])


def _earlier(first: int | None, second: int | None) -> int | None:
    known = [deadline for deadline in (first, second) if deadline is not None]
    return min(known, default=None)


def _deadline(policy: QueuePolicy, now: int, timeout_us: int) -> int | None:
    """A client's timeout counts where the policy allows it, and may then only shorten the policy's own."""
    timeout = policy.default_timeout
    if timeout_us and policy.allow_override:
        timeout = min(timeout_us * 1000, timeout) if timeout else timeout_us * 1000
    return now + timeout if timeout else None


def _urgency(entry: Entry) -> tuple[int, int]:
    return (entry.arrived + _PATIENCE if entry.deadline is None else entry.deadline, entry.order)

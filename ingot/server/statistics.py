"""What a loaded version has done: counters and durations, as the statistics extension and the metrics report them."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LATENCY_BOUNDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_BOUNDS_NS = [round(bound * 1e9) for bound in LATENCY_BOUNDS]
_TOGETHER = 32  # executions that are counted together
_STAGES = ("compute_input", "compute_infer", "compute_output")


@dataclass(slots=True)
class Duration:
    """How often, and nanoseconds in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """`count` events that took `ns` together."""
        self.count += count
        self.ns += ns

    def as_plain(self) -> dict[str, int]:
        """The fields of inference.StatisticDuration."""
        return {"count": self.count, "ns": self.ns}


@dataclass(slots=True)
class Timing:
    """The stages of one execution, nanoseconds of the monotonic clock."""

    start: int
    gathered: int
    computed: int
    answered: int


@dataclass
class Counts:
    """What has been counted so far."""

    durations: dict[str, Duration] = field(default_factory=lambda: defaultdict(Duration))
    failures: Counter[str] = field(default_factory=Counter)
    batches: dict[int, dict[str, Duration]] = field(default_factory=dict)
    inferences: int = 0
    executions: int = 0
    last_inference_ns: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS) + 1))

    def succeeded(self, ns: int) -> None:
        """A request has been answered."""
        self.durations["success"].add(ns)
        self.histogram[bisect_left(_BOUNDS_NS, ns)] += 1

    def executed(self, arrivals: Sequence[int], rows: int, timing: Timing) -> None:
        """One execution that answered requests which arrived at `arrivals`."""
        count, arrived, answered, durations = len(arrivals), sum(arrivals), timing.answered, self.durations
        self.executions += 1
        self.inferences += rows
        self.last_inference_ns = answered
        batch = self.batches.get(rows) or self.batches.setdefault(rows, {name: Duration() for name in _STAGES})
        began = timing.start
        for name, ended in zip(_STAGES, (timing.gathered, timing.computed, answered), strict=True):
            ns = ended - began
            batch[name].add(ns)
            durations[name].add(ns * count, count)
            began = ended
        durations["queue"].add(timing.start * count - arrived, count)
        for each in arrivals:
            self.succeeded(answered - each)


@dataclass
class Statistics:
    """Thread-safe counters of one model version. Executions are only noted at first, and counted when somebody asks or
    some have come together: so an answer does not wait for that, and all but the first find everything at hand.
    """

    _counts: Counts = field(default_factory=Counts)
    _noted: deque[tuple[Sequence[int], int, Timing]] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def counts(self) -> Counts:
        """Everything up to now."""
        with self._lock:
            while self._noted:
                self._counts.executed(*self._noted.popleft())
        return self._counts

    def executed(self, arrivals: Sequence[int], rows: int, timing: Timing) -> None:
        """One execution that answered requests which arrived at `arrivals`."""
        self._noted.append((arrivals, rows, timing))
        if len(self._noted) >= _TOGETHER:
            _ = self.counts

    def succeeded(self, ns: int, rows: int = 0) -> None:
        """A request answered without an execution of its own: an ensemble's, or one from the cache."""
        with self._lock:
            self._counts.inferences += rows
            self._counts.succeeded(ns)

    def failed(self, ns: int, reason: str) -> None:
        """A request that got an error."""
        with self._lock:
            self._counts.durations["fail"].add(ns)
            self._counts.failures[reason] += 1

    def looked_up(self, hit: bool, ns: int) -> None:
        """One look into the response cache."""
        with self._lock:
            self._counts.durations["cache_hit" if hit else "cache_miss"].add(ns)

    def as_plain(self, name: str, version: int) -> dict[str, Any]:
        """The fields of inference.ModelStatistics."""
        names = (
            "success",
            "fail",
            "queue",
            "compute_input",
            "compute_infer",
            "compute_output",
            "cache_hit",
            "cache_miss",
        )
        counts = self.counts
        with self._lock:
            return {
                "name": name,
                "version": str(version),
                "last_inference": _milliseconds(counts.last_inference_ns),
                "inference_count": counts.inferences,
                "execution_count": counts.executions,
                "inference_stats": {stage: counts.durations[stage].as_plain() for stage in names},
                "batch_stats": [
                    {"batch_size": rows, **{stage: duration.as_plain() for stage, duration in stages.items()}}
                    for rows, stages in sorted(counts.batches.items())
                ],
            }


def _milliseconds(clock_ns: int) -> int:
    """A moment of the monotonic clock in milliseconds since the epoch; 0 is no moment."""
    return (time.time_ns() - time.monotonic_ns() + clock_ns) // 1_000_000 if clock_ns else 0

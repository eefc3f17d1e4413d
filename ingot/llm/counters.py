"""What an engine counts: read by /metrics, by tests, by benchmarks."""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass
class Histogram:
    """Counts below bounds; the last is beyond all of them."""

    bounds: tuple[float, ...] = _SECONDS
    total: float = 0.0
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """One more."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many were observed."""
        return sum(self.counts)


@dataclass
class Counters:
    """Since the engine began; the loop's thread writes, others read."""

    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)
    queued: Histogram = field(default_factory=Histogram)
    step: Histogram = field(default_factory=Histogram)
    prompt_tokens: int = 0
    answer_tokens: int = 0
    proposed: int = 0
    accepted: int = 0
    steps: int = 0
    faults: int = 0
    finished: Counter[str] = field(default_factory=Counter)

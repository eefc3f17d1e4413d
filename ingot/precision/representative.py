"""What in the calibration samples makes their ranges doubtful, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ingot.precision.histogram import Histogram
from ingot.precision.ranges import TensorRange

Array = np.ndarray[Any, Any]
FEW_SAMPLES = 32
_SLOTS = 64
_CLIPPED = 0.01
_DRIFT = 0.25  # of the root mean square, between the first half of the samples and the second
_NAMED = 3


@dataclass(eq=False)
class Series:
    """(count, sum, sum of squares) along the stream, in at most 64 slots: neighbours merge when they are full."""

    slots: list[tuple[float, float, float]] = field(default_factory=list)

    def add(self, values: Array) -> None:
        """One batch."""
        flat = values.reshape(-1)
        total, squares = float(flat.sum(dtype=np.float64)), float(np.dot(flat, flat))
        self.slots.append((float(flat.size), total, squares))
        if len(self.slots) >= _SLOTS:
            self.slots = [_joined(a, b) for a, b in zip(self.slots[::2], self.slots[1::2], strict=True)]

    def drift(self) -> float:
        """How far the mean moves, or the root mean square changes, from half to half, in units of the latter."""
        if len(self.slots) < 2:
            return 0.0
        middle = len(self.slots) // 2
        (one, first), (two, second) = (_moments(self.slots[:middle]), _moments(self.slots[middle:]))
        size = max(first, second)
        return max(abs(one - two), abs(first - second)) / size if size else 0.0


def _joined(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _moments(slots: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Mean and root mean square."""
    count, total, squares = (sum(column) for column in zip(*slots, strict=True))
    return total / max(count, 1), float(np.sqrt(squares / max(count, 1)))


class Seen(Protocol):
    """What calibration keeps of a tensor."""

    histogram: Histogram
    lows: Array | None
    highs: Array | None
    series: Series


def warnings(seen: Mapping[str, Seen], ranges: Mapping[str, TensorRange], count: int) -> Iterator[str]:
    """A sentence for each doubt, the worst tensors named."""
    if count < FEW_SAMPLES:
        few = "one sample" if count == 1 else f"{count} samples"
        yield f"{few} only: ranges are those of a few inputs; {FEW_SAMPLES} to 500 like those in use are better"
    idle = {name: int(((o.lows == 0) & (o.highs == 0)).sum()) for name, o in seen.items() if o.lows is not None}
    yield from _named("channels that are 0 in every sample", {n: v for n, v in idle.items() if v}, "{}",
                      "the samples may lack what these look for, or they are dead")  # fmt: skip
    clipped = {name: r.clipped for name, r in ranges.items() if r.clipped > _CLIPPED}
    yield from _named("values beyond the range", clipped, "{:.1%}", "minmax clips nothing")
    drift = {name: o.series.drift() for name, o in seen.items()}
    yield from _named("difference between the first half of the samples and the second",
                      {n: d for n, d in drift.items() if d > _DRIFT}, "{:.0%}",
                      "shuffle the samples, or give more of each kind")  # fmt: skip


def _named(what: str, found: Mapping[str, float], form: str, remedy: str) -> Iterator[str]:
    if not found:
        return
    worst = sorted(found, key=lambda name: -found[name])[:_NAMED]
    listed = ", ".join(f"{name} ({form.format(found[name])})" for name in worst)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    yield f"{what}: {listed}{more}; {remedy}"

"""How much accuracy may be given away."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ingot.errors import ConfigError
from ingot.precision.metric import Metric

_DROP, _FLOOR = "drop", "at least"


@dataclass(frozen=True)
class Budget:
    """`kind` "drop": the score may fall by `value` below the reference's; "at least": it may not fall below `value`."""

    kind: str
    value: float
    text: str

    def floor(self, reference: float) -> float:
        """The smallest score allowed beside the reference's."""
        return reference - self.value if self.kind == _DROP else self.value

    def allows(self, score: float, reference: float) -> bool:
        """Whether the score is within the budget; sums of decimals are forgiven their last digit."""
        floor = self.floor(reference)
        return score >= floor or math.isclose(score, floor, rel_tol=1e-12, abs_tol=1e-12)


UNLIMITED = Budget(_DROP, math.inf, "none")


def parse(text: str | float | None, metric: Metric) -> Budget:
    """`0.5%` (of a metric between 0 and 1: half a point), `0.02` (in the metric's unit), `30dB` (of metric snr)."""
    if text is None:
        return UNLIMITED
    words = str(text).strip()
    decibel = words.lower().endswith("db")
    if decibel != (metric.name == "snr"):
        raise ConfigError(f"budget {words!r} does not fit metric {metric.name}: write 30dB for snr, and for no other")
    number, scale = (words[:-2], 1.0) if decibel else (words[:-1], 0.01) if words.endswith("%") else (words, 1.0)
    try:
        value = float(number) * scale
    except ValueError:
        value = math.nan
    if not value >= 0 or math.isinf(value):
        raise ConfigError(f"budget {words!r} is not known; write 0.5% (half a point of a metric between 0 and 1), a "
                          "drop in the metric's own unit such as 0.02, or 30dB with metric snr")  # fmt: skip
    return Budget(_FLOOR if decibel else _DROP, value, words)

"""What a user asks of precision, typed and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from ingot.errors import ConfigError
from ingot.precision.constraints import Constraints

NARROW = ("int8", "int8_smooth", "fp8", "int4")  # of single nodes; fp16, bf16, tf32 are precisions of a whole build


@dataclass(frozen=True)
class Request:
    """Narrow formats that nodes may be computed in, and what proves them.

    formats: of `NARROW`, the one to prefer first. data: samples to calibrate on and to judge by, in any form that
    `ingot.precision.data.samples` takes; None draws inputs, which says nothing about accuracy. metric: a file, a
    function of (outputs, samples), or a built-in name; budget: what may be lost by it ("0.5%"), None for everything.
    confidence: of the budget being kept beyond the samples that there are; 0.5 takes the score as it is.
    calibrator: of `ingot.precision.calibrate`. cache: a file of ranges, read if it exists and written otherwise.
    """

    formats: tuple[str, ...] = ()
    data: Any = None
    metric: str | Path | Callable[..., float] | None = None
    budget: str | float | None = None
    confidence: float = 0.95
    calibrator: str = "auto"
    cache: str | Path | None = None
    preprocess: str | Path | None = None
    constraints: Constraints = field(default_factory=Constraints)

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in NARROW]
        if unknown:
            raise ConfigError(f"there is no format {unknown[0]!r}; choose from {', '.join(NARROW)}")
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(f"confidence must be at least 0.5 and below 1, not {self.confidence}")
        if self.data is None and (self.budget is not None or self.metric is not None):
            raise ConfigError("a metric and a budget need samples: give them with --data")

    @property
    def quantile(self) -> float:
        """Standard errors that the confidence stands for."""
        return NormalDist().inv_cdf(self.confidence)

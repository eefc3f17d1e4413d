"""Streaming histograms: any number of samples, a few KiB a tensor.

Bins have one width and lie around 0; when a value falls outside, the width doubles and bins merge in pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
HALF = 4096  # bins on either side of 0


@dataclass(eq=False)
class Histogram:
    """Counts of values; bin k holds [(k - HALF) * width, (k - HALF + 1) * width). Zeros are counted apart."""

    width: float = 0.0
    low: float = 0.0
    high: float = 0.0
    zeros: int = 0
    counts: Array = field(default_factory=lambda: np.zeros(2 * HALF, np.int64))

    @property
    def total(self) -> int:
        """How many values were seen."""
        return int(self.counts.sum()) + self.zeros

    def add(self, values: Array) -> None:
        """Count finite values; what is not finite is the caller's to refuse."""
        flat = values.reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high))
        if not self.width:
            self.zeros += flat.size
            return
        places = np.floor(flat * np.float32(1 / self.width)).astype(np.int32) + HALF
        self.counts += np.bincount(np.clip(places, 0, 2 * HALF - 1), minlength=2 * HALF)
        zeros = flat.size - int(np.count_nonzero(flat))
        self.counts[HALF] -= zeros
        self.zeros += zeros

    def _widen(self, largest: float) -> None:
        if not self.width and largest > 0:
            self.width = max(largest * 1.05 / HALF, 1e-30)
        while largest >= self.width * HALF and largest > 0:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate([np.zeros(HALF // 2, np.int64), merged, np.zeros(HALF // 2, np.int64)])
            self.width *= 2

    def middles(self) -> Array:
        """The value that stands for each bin."""
        return (np.arange(2 * HALF) - HALF + 0.5) * self.width

    def magnitudes(self) -> Array:
        """Counts of |x| in HALF bins."""
        return self.counts[HALF:] + self.counts[:HALF][::-1]

    def quantile(self, share: float) -> float:
        """The value below which so many of all lie, zeros included."""
        negative, positive = self.counts[:HALF], self.counts[HALF:]
        ordered = np.concatenate([negative, [self.zeros], positive])
        edges = np.concatenate([self.middles()[:HALF], [0.0], self.middles()[HALF:]])
        place = int(np.searchsorted(np.cumsum(ordered), share * self.total))
        return float(edges[min(place, len(edges) - 1)])

    def outside(self, low: float, high: float) -> float:
        """Share of the values beyond a range."""
        middles = self.middles()
        beyond = int(self.counts[(middles < low) | (middles > high)].sum())
        return beyond / max(self.total, 1)

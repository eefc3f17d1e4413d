"""From a histogram to the range that 8 bits shall cover: one function a calibrator, all in one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ingot.errors import ConfigError
from ingot.precision.histogram import HALF, Histogram

Array = np.ndarray[Any, Any]
Bounds = tuple[float, float]
LEVELS = 255
_PERCENTILE = 0.9999
_OUTERMOST = 0.02
_BINS, _KEPT = 2048, 128  # entropy: bins of |x|, and those an 8-bit half has


def minmax(histogram: Histogram) -> Bounds:
    """All that was seen."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, share: float = _PERCENTILE) -> Bounds:
    """All but the outermost 1 - share on either side."""
    low, high = histogram.quantile(1 - share), histogram.quantile(share)
    return min(0.0, max(low, histogram.low)), max(0.0, min(high, histogram.high))


def entropy(histogram: Histogram) -> Bounds:
    """The threshold of |x| whose 128 levels lose least information (TensorRT's: S. Migacz, GTC 2017)."""
    counts = histogram.magnitudes().reshape(_BINS, -1).sum(1).astype(np.float64)
    width = histogram.width * HALF / _BINS
    last = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    if last <= _KEPT:
        return minmax(histogram)
    losses = {size: _divergence(counts[:last], size) for size in [*range(_KEPT, last, 16), last]}
    threshold = min(losses, key=lambda size: losses[size]) * width
    return max(histogram.low, -threshold), min(histogram.high, threshold)


def _divergence(counts: Array, size: int) -> float:
    """KL(P, Q): P the first `size` bins with the rest in the last, Q the same in 128 levels."""
    wanted = counts[:size].copy()
    filled = counts[:size] > 0
    wanted[-1] += counts[size:].sum()
    groups = np.arange(size) * _KEPT // size
    sums = np.bincount(groups, counts[:size], _KEPT)
    members = np.bincount(groups, filled, _KEPT)
    level = np.divide(sums, members, out=np.zeros(_KEPT), where=members > 0)
    given = np.where(filled, level[groups], 0.0)
    p, q = _smoothed(wanted / wanted.sum()), _smoothed(given / given.sum())
    return float((p * np.log(p / q)).sum())


def _smoothed(share: Array) -> Array:
    """No empty bin, still a distribution: a logarithm of 0 would decide by itself."""
    kept = np.maximum(share, 1e-7)
    return kept / kept.sum()


def mse(histogram: Histogram) -> Bounds:
    """The range whose rounding and clipping errors have the least mean square; each end is tried by itself."""
    best = minmax(histogram)
    shares = np.linspace(1.0, 0.05, 96)
    for _ in range(2):
        for end in (0, 1):
            tried = [_with(best, end, minmax(histogram)[end] * share) for share in shares]
            best = min(tried, key=lambda bounds: square_error(histogram, bounds))
    return best


def most_channels(lows: Array, highs: Array) -> Bounds:
    """All that was seen in all channels but the outermost 2 %, of which there is one at least."""
    kept = len(lows) - max(1, round(_OUTERMOST * len(lows)))
    return min(0.0, float(np.sort(lows)[::-1][kept - 1])), max(0.0, float(np.sort(highs)[kept - 1]))


def _with(bounds: Bounds, end: int, value: float) -> Bounds:
    return (value, bounds[1]) if end == 0 else (bounds[0], value)


def square_error(histogram: Histogram, bounds: Bounds) -> float:
    """Mean square error of 8 bits over the range, zeros being exact."""
    low, high = bounds
    step = (high - low) / LEVELS
    if not step:
        return float("inf")
    middles = histogram.middles()
    used = histogram.counts > 0
    x, weight = middles[used], histogram.counts[used]
    beyond = np.maximum(low - x, 0) + np.maximum(x - high, 0)
    inside = np.minimum(step, histogram.width + np.abs(x))  # a lone bin around 0 is no finer than it is wide
    return float((weight * np.where(beyond > 0, beyond**2, inside**2 / 12)).sum() / max(histogram.total, 1))


CALIBRATORS: dict[str, Callable[[Histogram], Bounds]] = {
    "minmax": minmax, "entropy": entropy, "percentile": percentile, "mse": mse,
}  # fmt: skip
AUTO = "auto"


def named(name: str) -> Callable[[Histogram], Bounds]:
    """The calibrator of a name."""
    if name not in CALIBRATORS:
        raise ConfigError(f"there is no calibrator {name!r}; choose from {', '.join([AUTO, *CALIBRATORS])}")
    return CALIBRATORS[name]

"""Latency at a step's end: Mann-Whitney and Hodges-Lehmann on the gateways' logarithmic buckets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ingot.release.windows import PER_OCTAVE

_MOST = 20_000  # samples an arm; more change nothing but the time it takes


@dataclass(frozen=True)
class Shift:
    """How much slower the canary is: a factor on the median pair, and the one-sided p-value that it is slower
    at all."""

    factor: float
    p_value: float


def shift(canary: Mapping[int, int], stable: Mapping[int, int]) -> Shift:
    """Both arms need samples."""
    ours, theirs = _samples(canary), _samples(stable)
    p_value = float(stats.mannwhitneyu(ours, theirs, alternative="greater", method="asymptotic").pvalue)
    return Shift(2.0 ** (_median_difference(canary, stable) / PER_OCTAVE), p_value)


def _samples(histogram: Mapping[int, int]) -> np.ndarray:
    buckets = np.array(sorted(histogram))
    counts = np.array([histogram[int(bucket)] for bucket in buckets], float)
    if counts.sum() > _MOST:
        counts = np.floor(counts * _MOST / counts.sum())
    return np.repeat(buckets, counts.astype(int))


def _median_difference(canary: Mapping[int, int], stable: Mapping[int, int]) -> int:
    """Hodges-Lehmann in buckets: the median of all pairs' differences, by convolution."""
    low_c, low_s, high_s = min(canary), min(stable), max(stable)
    ours = np.array([canary.get(bucket, 0) for bucket in range(low_c, max(canary) + 1)], float)
    theirs = np.array([stable.get(bucket, 0) for bucket in range(high_s, low_s - 1, -1)], float)
    pairs = np.cumsum(np.convolve(ours, theirs))
    return int(np.searchsorted(pairs, pairs[-1] / 2)) + low_c - high_s

"""Sequential tests of rates, valid at every look: mixture SPRTs on the odds of where an event fell.

Given that an event happened, equal rates put it on the canary with probability w, the canary's share of the requests
of that interval; a rate r times as high with p_r = w·r / (w·r + 1 - w). The mean over r of the likelihood ratios,

    Λ = mean_r Π_k (p_r,k / w_k)^events_canary,k · ((1 - p_r,k) / (1 - w_k))^events_stable,k ,

is a supermartingale under equal rates (counts without replacement are less spread than with: Hoeffding 1963, theorem
4), so P(Λ ever ≥ 1/α) ≤ α (Ville), whatever the rate, the arms' sizes, or how they change. The normal form
√(V/(V+nτ²))·exp(…) is not used: with V pooled it gives 4 % false alarms at errors of 0.2 % where 1 % was asked for
(tests/release/test_judge.py computes it), with V by arm it takes twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

HIGHER = (1.2, 1.5, 2.0, 3.0, 5.0, 8.0, 15.0)
LOWER = tuple(1 / ratio for ratio in HIGHER)


@dataclass(frozen=True)
class Look:
    """One interval's counts: events and requests of both arms."""

    canary_events: int
    canary: int
    stable_events: int
    stable: int


def log_evidence(looks: Iterable[Look], ratios: Sequence[float] = HIGHER) -> np.ndarray:
    """log Λ after each look."""
    counts = np.array([(k.canary_events, k.canary, k.stable_events, k.stable) for k in looks], float).reshape(-1, 4)
    events_c, n_c, events_s, n_s = counts.T
    both = (n_c > 0) & (n_s > 0)
    share = np.where(both, n_c / np.maximum(n_c + n_s, 1), 0.5)
    ratio = np.asarray(ratios)[:, None]
    canary = ratio * share / (ratio * share + 1 - share)
    steps = events_c * np.log(canary / share) + events_s * np.log((1 - canary) / (1 - share))
    return np.logaddexp.reduce(np.cumsum(np.where(both, steps, 0.0), axis=1), axis=0) - math.log(len(ratios))


def log_evidence_against(limit: float, bad: int, count: int) -> float:
    """log Λ that a rate lies above a limit: mixture of binomial likelihood ratios, a supermartingale at or below it."""
    limit = min(max(limit, 1e-6), 0.999)
    worse = [limit + (1 - limit) * share for share in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)]
    terms = [bad * math.log(p / limit) + (count - bad) * math.log((1 - p) / (1 - limit)) for p in worse]
    return float(np.logaddexp.reduce(terms)) - math.log(len(worse))

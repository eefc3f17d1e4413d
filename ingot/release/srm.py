"""Sample-ratio mismatch: were as many users served by a version as its weight says? Valid at every look.

Bayes factor of Beta(κw, κ(1-w)) against the point w (Lindon and Malek 2022): a martingale under w, so P(ever ≥
1/α) ≤ α.
"""

from __future__ import annotations

from scipy.special import betaln, xlog1py, xlogy

_KAPPA = 100.0


def log_evidence(users: int, everyone: int, share: float) -> float:
    """log of the evidence against `users` of `everyone` being drawn with probability `share` (0 < share < 1)."""
    a, b = _KAPPA * share, _KAPPA * (1 - share)
    marginal = betaln(a + users, b + everyone - users) - betaln(a, b)
    return float(marginal - xlogy(users, share) - xlog1py(everyone - users, -share))

"""How long an execution of so many rows takes: measured at load, corrected by every execution."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable

_NEW = 0.2  # weight of the latest execution
_RELAX = 0.98


class LatencyTable:
    """(shape, rows) -> nanoseconds; between known sizes a straight line, 0 where nothing is known. Not thread-safe."""

    def __init__(self) -> None:
        self._known: dict[Hashable, dict[int, float]] = {}

    def __call__(self, shape: Hashable, rows: int) -> int:
        known = self._known.get(shape)
        if not known:
            return 0
        if rows in known:
            return int(known[rows])
        return int(_between(known, rows))

    def observe(self, shape: Hashable, rows: int, ns: int) -> None:
        """An execution took so long."""
        known = self._known.setdefault(shape, {})
        known[rows] = ns if rows not in known else known[rows] + _NEW * (ns - known[rows])

    def relax(self, shape: Hashable) -> None:
        """A request was refused on this estimate: lower it a little, so that a wrong one is tried again some day."""
        known = self._known.get(shape, {})
        for rows in known:
            known[rows] *= _RELAX


def _between(known: dict[int, float], rows: int) -> float:
    sizes = sorted(known)
    at = bisect_left(sizes, rows)
    if at == 0:
        return known[sizes[0]]
    below = sizes[at - 1]
    if at == len(sizes):
        return known[below] * rows / below
    above = sizes[at]
    return known[below] + (known[above] - known[below]) * (rows - below) / (above - below)

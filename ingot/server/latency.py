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
        self._cold: set[tuple[Hashable, int]] = set()

    def __call__(self, shape: Hashable, rows: int) -> int:
        known = self._known.get(shape)
        if not known:
            return 0
        if rows in known:
            return int(known[rows])
        return int(_between(known, rows))

    def observe(self, shape: Hashable, rows: int, ns: int) -> None:
        """An execution took so long. The first of its size also made room for itself: the second replaces it."""
        known, key = self._known.setdefault(shape, {}), (shape, rows)
        if rows not in known:
            known[rows] = ns
            self._cold.add(key)
        elif key in self._cold:
            self._cold.remove(key)
            known[rows] = ns
        else:
            known[rows] += _NEW * (ns - known[rows])

    def warm(self, shape: Hashable, rows: int) -> bool:
        """Whether executions of this size have been timed when nothing was new to them."""
        return rows in self._known.get(shape, ()) and (shape, rows) not in self._cold

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

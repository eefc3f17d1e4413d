"""How long an execution of so many rows takes: measured at load, corrected by every execution."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable

_NEW = 0.2  # weight of the latest execution
_CHANGE = 0.2  # share by which one execution may differ; what goes beyond is the machine's doing, not the model's
_NOTICED = 0.01  # share by which a size's time must have changed for estimates to be made again
_RELAX = 0.98
_DEVIATIONS = 2.0
_TOGETHER = 32  # observations that are worked out together
_DEARER = 1.25  # a row of a larger batch costs at most so many times what it costs in a smaller one
Known = dict[int, float]


class LatencyTable:
    """(shape, rows) -> nanoseconds; between known sizes a straight line, 0 where nothing is known. Not thread-safe."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Known] = {}
        self._cold: dict[Hashable, Known] = {}  # sizes that ran once, when room had to be made for them
        self._spread: dict[Hashable, float] = {}  # usual deviation, as a share of the estimate
        self._ran: set[Hashable] = set()  # shapes that have run since a request was last refused
        self._estimates: dict[Hashable, dict[int, int]] = {}
        self._told: dict[Hashable, Known] = {}  # what the estimates were made from
        self._noted: list[tuple[Hashable, int, int]] = []

    def observe(self, shape: Hashable, rows: int, ns: int) -> None:
        """An execution took so long; what follows from that is worked out when somebody asks."""
        self._noted.append((shape, rows, ns))
        if len(self._noted) >= _TOGETHER:
            self._learn()

    def _learn(self) -> None:
        """From everything that was observed, in order."""
        noted, self._noted = self._noted, []
        for shape, rows, ns in noted:
            self._learn_of(shape, rows, ns)

    def __call__(self, shape: Hashable, rows: int) -> int:
        if self._noted:
            self._learn()
        estimates = self._estimates.setdefault(shape, {})
        found = estimates.get(rows)
        if found is None:
            known = self._known.get(shape) or self._cold.get(shape)
            found = estimates[rows] = int(_estimate(known, rows)) if known else 0
        return found

    def bound(self, shape: Hashable, rows: int) -> int:
        """What an execution rarely exceeds: what it usually takes and twice the usual deviation."""
        return int(self(shape, rows) * (1 + _DEVIATIONS * self._spread.get(shape, 0.0)))

    def _learn_of(self, shape: Hashable, rows: int, ns: int) -> None:
        """The first execution of its size also made room for itself: the second replaces it."""
        known, cold = self._known.setdefault(shape, {}), self._cold.setdefault(shape, {})
        self._ran.add(shape)
        if rows in known:
            spread, change = self._spread.get(shape, 0.0), min(max(ns / known[rows] - 1, -_CHANGE), _CHANGE)
            self._spread[shape] = spread + _NEW * (abs(change) - spread)
            known[rows] *= 1 + _NEW * change
        elif rows in cold:
            del cold[rows]
            known[rows] = max(ns, 1)
        else:
            cold[rows] = ns
        told, now = self._told.setdefault(shape, {}), known.get(rows, ns)
        if abs(now - told.get(rows, 0)) > _NOTICED * now or rows in cold:
            self._estimates.pop(shape, None)
            told[rows] = now

    def warm(self, shape: Hashable, rows: int) -> bool:
        """Whether executions of this size have been timed when nothing was new to them."""
        if self._noted:
            self._learn()
        return rows in self._known.get(shape, ())

    def relax(self, shape: Hashable) -> None:
        """Requests were refused on this estimate, and nothing has run since the last time: lower it a little.

        So a wrong one is tried again some day; under overload, where some are refused and others run, it is corrected
        by what runs.
        """
        self._learn()
        if shape in self._ran:
            self._ran.remove(shape)
            return
        self._estimates.pop(shape, None)
        for known in (self._known.get(shape, {}), self._cold.get(shape, {})):
            for rows in known:
                known[rows] *= _RELAX


def _estimate(known: Known, rows: int) -> float:
    """What the sizes that are known say of one: no more than a larger one takes, nor than smaller ones would lead to.

    So one slow execution does not keep its size from ever being tried again.
    """
    larger = [ns for size, ns in known.items() if size >= rows]
    smaller = [ns * rows / size * _DEARER for size, ns in known.items() if size < rows]
    return min(_between(known, rows), *larger, *smaller)


def _between(known: Known, rows: int) -> float:
    if rows in known:
        return known[rows]
    sizes = sorted(known)
    at = bisect_left(sizes, rows)
    if at == 0:
        return known[sizes[0]]
    below = sizes[at - 1]
    if at == len(sizes):
        return known[below] * rows / below
    above = sizes[at]
    return known[below] + (known[above] - known[below]) * (rows - below) / (above - below)

"""Placing buffers of known size and lifetime in one arena: greedy by size, best fit between live neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256  # bytes: what cuBLASLt wants of a workspace; lines of caches are shorter
_GOOD_ENOUGH = 1.02
_TRIES, _EFFORT = 100, 2_000_000


@dataclass(frozen=True)
class Interval:
    """`bytes` needed from step `first` to step `last`, both included."""

    bytes: int
    first: int
    last: int


def align(size: int, to: int = ALIGNMENT) -> int:
    """Smallest multiple of `to` that is at least `size`."""
    return -(-size // to) * to


def lower_bound(intervals: Sequence[Interval]) -> int:
    """Most bytes live at any one step: no packing can be smaller."""
    changes: dict[int, int] = {}
    for interval in intervals:
        changes[interval.first] = changes.get(interval.first, 0) + align(interval.bytes)
        changes[interval.last + 1] = changes.get(interval.last + 1, 0) - align(interval.bytes)
    live = peak = 0
    for step in sorted(changes):
        live += changes[step]
        peak = max(peak, live)
    return peak


def pack(intervals: Sequence[Interval]) -> tuple[tuple[int, ...], int]:
    """Offsets, one per interval, and total bytes; intervals that overlap in time never overlap in space."""
    orders = (
        lambda i: (-intervals[i].bytes, intervals[i].first),
        lambda i: (intervals[i].first, -intervals[i].bytes),
        lambda i: (-(intervals[i].last - intervals[i].first) * intervals[i].bytes, intervals[i].first),
    )
    bound = lower_bound(intervals)
    best: tuple[tuple[int, ...], int] | None = None
    for order in orders:
        found = _improved(intervals, sorted(range(len(intervals)), key=order), bound)
        best = found if best is None or found[1] < best[1] else best
        if best[1] <= bound * _GOOD_ENOUGH:
            break
    assert best is not None
    return best


def _improved(intervals: Sequence[Interval], order: list[int], bound: int) -> tuple[tuple[int, ...], int]:
    """Place in order; as long as it is far from the bound, what sticks out at the top is placed earlier."""
    best = packing = _pack_in_order(intervals, order)
    for _ in range(min(_TRIES, _EFFORT // (len(intervals) ** 2 + 1))):
        if best[1] <= bound * _GOOD_ENOUGH:
            break
        offsets, total = packing
        top = next(i for i in order if offsets[i] + align(intervals[i].bytes) == total)
        place = order.index(top)
        order.insert(place // 2, order.pop(place))
        packing = _pack_in_order(intervals, order)
        best = packing if packing[1] < best[1] else best
    return best


def _pack_in_order(intervals: Sequence[Interval], order: Sequence[int]) -> tuple[tuple[int, ...], int]:
    offsets = [0] * len(intervals)
    placed: list[int] = []
    for index in order:
        offsets[index] = _best_gap(intervals, offsets, placed, index)
        placed.append(index)
    total = max((offsets[i] + align(intervals[i].bytes) for i in placed), default=0)
    return tuple(offsets), total


def _best_gap(intervals: Sequence[Interval], offsets: Sequence[int], placed: Sequence[int], index: int) -> int:
    mine = intervals[index]
    size = align(mine.bytes)
    taken = sorted(
        (offsets[i], offsets[i] + align(intervals[i].bytes))
        for i in placed
        if intervals[i].first <= mine.last and mine.first <= intervals[i].last
    )
    best: tuple[int, int] | None = None
    end = 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best is None or gap < best[0]):
            best = (gap, end)
        end = max(end, stop)
    return end if best is None else best[1]

"""Placing buffers of known size and lifetime in one arena: greedy by size, best fit between live neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64


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
    packings = (_pack_in_order(intervals, sorted(range(len(intervals)), key=order)) for order in orders)
    return min(packings, key=lambda packing: packing[1])


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

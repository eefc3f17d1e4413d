"""Steps of a graph side by side: which stream each goes on, and what it waits for there.

A step goes on behind the step on which the longest chain before it ends, where that is the last of its lane, else into
a lane of its own. Steps depend on each other by the memory that they read and write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from ingot.plan.plan import GraphSegment, Launch, LibraryCall, Plan


@dataclass(frozen=True)
class Turn:
    """Where a step goes: its lane, and the steps of other lanes that must have ended before it begins."""

    lane: int
    waits: tuple[int, ...]


@dataclass(frozen=True)
class Use:
    """What a step reads and writes."""

    reads: Set[int]
    writes: Set[int]


def sharing(ranges: Sequence[tuple[int, int]]) -> list[frozenset[int]]:
    """For each range of addresses the numbers of those that have memory in common with it, its own included."""
    order = sorted(range(len(ranges)), key=lambda k: ranges[k])
    found = [{k} for k in range(len(ranges))]
    for place, k in enumerate(order):
        for other in order[place + 1 :]:
            if ranges[other][0] >= ranges[k][1]:
                break
            found[k].add(other)
            found[other].add(k)
    return [frozenset(numbers) for numbers in found]


def uses(plan: Plan, segment: GraphSegment, shared: Sequence[Set[int]]) -> list[Use]:
    """What each step of the segment touches; `shared`: the storages that have memory in common with each, which are
    written with it. What a step keeps for itself counts as written, weights do not count."""
    places = [storage.place for storage in plan.storages]
    touched: list[set[int]] = [set() for _ in segment.steps]
    calls: list[Launch | LibraryCall] = [*segment.launches, *segment.libraries]
    for call in calls:
        touched[call.step] |= {p for p in call.pointers if places[p] != "weight"}
    found = []
    for step, pointers in zip(segment.steps, touched, strict=True):
        made = {plan.values[v].storage for v in step.outputs}
        read = {plan.values[v].storage for v in step.inputs if v is not None}
        written = frozenset().union(*(shared[k] for k in pointers - (read - made)))
        found.append(Use(read & pointers, written))
    return found


def arranged(steps: Sequence[Use], lanes: int) -> list[Turn]:
    """A turn for each step, in `lanes` lanes at most. A step begins when the one before it in its lane has ended, and
    what it waits for is not waited for again by what comes after it there."""
    turns: list[Turn] = []
    depths: list[int] = []
    tails: list[int | None] = [None] * lanes
    known: list[Mapping[int, int]] = []  # by step: the last step of each lane that has ended when this one has
    for step, needed in enumerate(_needed(steps)):
        if not steps[step].reads | steps[step].writes:  # it has no launch
            turns.append(Turn(0, ()))
            depths.append(0)
            known.append({})
            continue
        lane = _lane(tails, needed, depths)
        tail = tails[lane]
        seen = dict(known[tail]) if tail is not None else {}
        waits = []
        for other in sorted(needed, reverse=True):
            where = turns[other].lane
            if where != lane and seen.get(where, -1) < other:
                waits.append(other)
                seen = {k: max(seen.get(k, -1), known[other].get(k, -1)) for k in {*seen, *known[other]}}
        turns.append(Turn(lane, tuple(sorted(waits))))
        depths.append(1 + max((depths[k] for k in needed), default=0))
        known.append({**seen, lane: step})
        tails[lane] = step
    return turns


def _needed(steps: Sequence[Use]) -> list[set[int]]:
    """For each step those whose results it reads, or who read or wrote before what it writes."""
    wrote: dict[int, int] = {}
    read: dict[int, list[int]] = {}
    found = []
    for step, use in enumerate(steps):
        needed = {wrote[s] for s in use.reads | use.writes if s in wrote}
        needed |= {other for s in use.writes for other in read.get(s, ())}
        found.append(needed)
        for storage in use.reads:
            read.setdefault(storage, []).append(step)
        for storage in use.writes:
            wrote[storage], read[storage] = step, []
    return found


def _lane(tails: Sequence[int | None], needed: Set[int], depths: Sequence[int]) -> int:
    """Behind the deepest of those needed that are last in their lanes; else in an empty lane, or the one that rests
    longest."""
    behind = [lane for lane, tail in enumerate(tails) if tail in needed]
    if behind:
        return max(behind, key=lambda lane: (depths[tails[lane] or 0], -lane))
    empty = next((lane for lane, tail in enumerate(tails) if tail is None), None)
    return empty if empty is not None else min(range(len(tails)), key=lambda lane: tails[lane] or 0)

"""Memory of a plan: who may take whose storage, how long each lives, where it lies for each profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ingot.plan.extent import evaluate, symbols_of
from ingot.plan.packing import Interval, lower_bound, pack
from ingot.plan.plan import GraphSegment, MemoryPlan, Plan, Storage, steps_of


def plan_memory(plan: Plan, bounds: Sequence[Mapping[str, int]]) -> Plan:
    """The plan with arena offsets for each set of symbol bounds (largest extents); static plans need none given."""
    usable = list(bounds) or [{}]
    planned = [_memory(plan.storages, b) for b in usable if _all_known(plan, b)]
    return replace(plan, memory=tuple(planned))


def in_lanes(plan: Plan, lanes: int, apart: int | None) -> Plan:
    """The plan with steps on a GPU in so many lanes. apart: storages of up to so many bytes share memory with none, of
    any size where it is None: steps whose storages share memory cannot run side by side, but what is not shared takes
    more of caches."""
    end = sum(len(steps_of(segment)) for segment in plan.segments)
    kept = tuple(replace(s, first=0, last=end) if s.place == "arena" and _up_to(s, apart) else s for s in plan.storages)
    segments = tuple(replace(s, lanes=lanes) if isinstance(s, GraphSegment) else s for s in plan.segments)
    return plan_memory(replace(plan, storages=kept, segments=segments), [m.bounds for m in plan.memory])


def _up_to(storage: Storage, most: int | None) -> bool:
    return most is None or (isinstance(storage.bytes, int) and storage.bytes <= most)


def _all_known(plan: Plan, bounds: Mapping[str, int]) -> bool:
    """Data-dependent sizes are placed at run time; every other symbol must have a bound."""
    known = bounds.keys() | set(plan.derived)
    return all(symbols_of(s.bytes) <= known for s in plan.storages if s.place == "arena")


def _memory(storages: Sequence[Storage], bounds: Mapping[str, int]) -> MemoryPlan:
    placed = [i for i, s in enumerate(storages) if s.place == "arena" and symbols_of(s.bytes) <= bounds.keys()]
    intervals = [Interval(evaluate(storages[i].bytes, bounds), storages[i].first, storages[i].last) for i in placed]
    offsets, total = pack(intervals)
    by_storage = dict(zip(placed, offsets, strict=True))
    return MemoryPlan(
        dict(bounds), tuple(by_storage.get(i) for i in range(len(storages))), total, lower_bound(intervals)
    )

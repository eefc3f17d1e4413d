"""Times per step: native steps by the time-stamp counter, read by whoever first sees a step finished; those on a GPU by
its events; the others by the clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ingot.plan.extent import evaluate
from ingot.plan.plan import GraphSegment, NativeSegment, Segment, Step
from ingot.runtime.buffers import address_of
from ingot.runtime.cpu import zeros

if TYPE_CHECKING:
    from ingot.runtime.executor import Frame


@dataclass(frozen=True)
class StepTime:
    """One step of one run. `bytes` moved and `flops` done are the plan's estimates for these shapes."""

    name: str
    nodes: tuple[str, ...]
    kernel: str
    microseconds: float
    bytes: int
    flops: int


def profile(frame: Frame, arrays: Sequence[Any]) -> list[StepTime]:
    """Run once on `arrays`, timing every step."""
    times: list[StepTime] = []
    executor = frame.executor
    actions = executor.actions

    def timed(segment: Segment, action: Any) -> Any:
        return lambda f: times.extend(_time_segment(f, segment, action))

    executor_actions = [timed(s, a) for s, a in zip(executor.plan.segments, actions, strict=True)]
    frame.run(arrays, {}, executor_actions)
    return times


def _time_segment(frame: Frame, segment: Segment, action: Any) -> list[StepTime]:
    if isinstance(segment, NativeSegment):
        return _time_native(frame, segment, action)
    if isinstance(segment, GraphSegment):
        spans = frame.step_times(segment)
        return [_step_time(frame, step, span) for step, span in zip(segment.steps, spans, strict=True)]
    start = time.perf_counter()
    action(frame)
    return [_step_time(frame, segment.step, (time.perf_counter() - start) * 1e6)]


def _time_native(frame: Frame, segment: NativeSegment, action: Any) -> list[StepTime]:
    stamps = zeros(len(segment.steps) + 1, "uint64")
    frame.stamps = address_of(stamps)
    try:
        action(frame)
    finally:
        frame.stamps = 0
    code = frame.executor.code
    assert code is not None
    rate = code.ticks_per_microsecond
    spans = [(int(b) - int(a)) / rate for a, b in pairwise(stamps)]
    return [_step_time(frame, step, span) for step, span in zip(segment.steps, spans, strict=True)]


def _step_time(frame: Frame, step: Step, microseconds: float) -> StepTime:
    sizes = [evaluate(e, frame.symbols) for e in (step.bytes, step.flops)]
    return StepTime(step.name, step.nodes, step.kernel, microseconds, sizes[0], sizes[1])

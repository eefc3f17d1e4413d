"""Absolute limits over the last seconds; they hold whatever stable does, also while paused. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ingot.release import windows
from ingot.release.events import Breached
from ingot.release.rollout import State, guarded
from ingot.release.spec import Guards, seconds
from ingot.release.windows import Observation


def breaches(state: State, observations: Sequence[Observation], now: float) -> Iterator[Breached]:
    """Every limit that a guarded version crosses."""
    guards = state.spec.guards
    if guards is None:
        return
    for version in guarded(state):
        yield from _of_traffic(guards, version, state, observations, now)
        yield from _of_gauges(guards, version, observations, now)


def _of_traffic(
    guards: Guards, version: str, state: State, observations: Sequence[Observation], now: float
) -> Iterator[Breached]:
    start = max(now - seconds(guards.window), state.changed)
    seen = windows.between(observations, version, start, now)
    if seen.requests < guards.minimum_samples:
        return
    p99 = windows.quantile(seen.histogram, 0.99)
    if guards.p99 is not None and p99 is not None and p99 > seconds(guards.p99):
        said = f"P99 {1e3 * p99:.4g} ms of {seen.requests} requests, limit {guards.p99}"
        yield Breached(version, "p99", said, {"p99": p99, "requests": seen.requests})
    rate = seen.errors / seen.requests
    if guards.error_rate is not None and rate > guards.error_rate:
        said = f"{100 * rate:.3g} % errors of {seen.requests} requests, limit {100 * guards.error_rate:.3g} %"
        yield Breached(version, "errorRate", said, {"rate": rate, "requests": seen.requests})


def _of_gauges(guards: Guards, version: str, observations: Sequence[Observation], now: float) -> Iterator[Breached]:
    """What the version's servers say of themselves: the largest of their newest values."""
    newest: dict[str, dict[str, float]] = {}
    for observation in observations:
        if version in observation.gauges and now - seconds(guards.window) <= observation.time <= now:
            newest[observation.boot] = observation.gauges[version]
    limits = {
        "queueTime": seconds(guards.queue_time) if guards.queue_time is not None else None,
        "gpuMemory": guards.gpu_memory, "cpuMemory": guards.cpu_memory,
    }  # fmt: skip
    for name, limit in limits.items():
        values = [gauges[name] for gauges in newest.values() if name in gauges]
        if limit is not None and values and max(values) > limit:
            said = f"{name} {max(values):.6g}, limit {limit:.6g}"
            yield Breached(version, name, said, {"value": max(values), "limit": limit})

"""A rollout as people see it: phase, steps, weights, what really serves, figures by version, verdicts. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ingot.release import events, rollout, windows
from ingot.release.rollout import State, phase
from ingot.release.slots import weights
from ingot.release.spec import Step, plain
from ingot.release.store import Entry
from ingot.release.windows import Counters, Observation

LATELY = 10.0  # seconds that "now" covers
_ALIVE = 5.0
SERVER = "server "  # begins the boot of what a model server, not a gateway, says of itself


def summary(state: State) -> dict[str, Any]:
    """A line of the list."""
    shares = {version: count / 100 for version, count in weights(state.assignment).items()}
    step = f"{min(state.step + 1, len(state.spec.steps))}/{len(state.spec.steps)}"
    return {
        "model": state.spec.model, "phase": phase(state), "stage": state.stage, "stable": state.stable,
        "candidates": list(state.spec.candidates), "step": step, "weights": shares, "message": message(state),
    }  # fmt: skip


def message(state: State) -> str:
    """Why it stands where it stands."""
    return f"{state.hold.kind}: {state.hold.reason}" if state.hold is not None else state.message


def full(state: State, sequence: int, observations: Sequence[Observation], now: float) -> dict[str, Any]:
    """Everything about one rollout."""
    return {
        **summary(state), "sequence": sequence, "since": state.since, "now": now,
        "previous": state.previous, "hold": plain(state.hold), "mirror": plain(state.mirror),
        "ready": list(state.ready), "serving": serving(state, observations, now),
        "in_effect": in_effect(sequence, observations, now),
        "steps": [step_line(step, index, state) for index, step in enumerate(state.spec.steps)],
        "versions": {name: figures(name, observations, now) for name in state.spec.versions},
        "verdicts": [plain(note) for note in state.notes], "commands": commands(state),
        "analyses": [plain(analysis) for analysis in state.analyses],
    }  # fmt: skip


def serving(state: State, observations: Sequence[Observation], now: float) -> dict[str, float]:
    """Which versions answered lately, as shares: what the gateways saw, not what was ordered."""
    counts = {v: windows.between(observations, v, now - LATELY, now).requests for v in state.spec.versions}
    everything = sum(counts.values())
    return {version: round(count / everything, 4) for version, count in counts.items() if count}


def in_effect(sequence: int, observations: Sequence[Observation], now: float) -> bool:
    """Whether every gateway that is alive has the newest routes."""
    applied: dict[str, int] = {}
    for observation in observations:
        if observation.time > now - _ALIVE and not observation.boot.startswith(SERVER):
            applied[observation.boot] = observation.applied
    return all(number >= sequence for number in applied.values())


def step_line(step: Step, index: int, state: State) -> dict[str, Any]:
    """A step and whether it is done, current or to come."""
    current = state.stage == "steps" and index == state.step
    done = index < state.step or (index <= state.step and state.stage != "steps")
    kind, what = next(iter(plain(step).items()))
    return {"kind": kind, "what": what, "status": "current" if current else "done" if done else "to come"}


def figures(version: str, observations: Sequence[Observation], now: float) -> dict[str, Any]:
    """A version's figures over the last seconds."""
    seen = windows.between(observations, version, now - LATELY, now)
    ever = windows.at(observations, version, now)
    users: dict[str, int] = {}
    gauges: dict[str, float] = {}
    for observation in observations:
        if version in observation.users:
            users[observation.boot] = observation.users[version]
        gauges = {**gauges, **observation.gauges.get(version, {})}
    return {**_rates(seen, LATELY), "requests": ever.requests, "total_errors": ever.errors, "retried": ever.retried,
            "diverted": ever.diverted, "users": sum(users.values()), "mirrored": ever.mirrored,
            "agreement": ever.agreed / ever.mirrored if ever.mirrored else None,
            "feedback": {name: list(pair) for name, pair in ever.feedback.items()}, **gauges}  # fmt: skip


def _rates(seen: Counters, span: float) -> dict[str, Any]:
    return {
        "qps": round(seen.requests / span, 2), "error_rate": seen.errors / seen.requests if seen.requests else None,
        "p50": windows.quantile(seen.histogram, 0.5), "p90": windows.quantile(seen.histogram, 0.9),
        "p99": windows.quantile(seen.histogram, 0.99),
    }  # fmt: skip


def series(
    versions: Sequence[str], observations: Sequence[Observation], end: float, span: float, points: int = 60
) -> dict[str, Any]:
    """Charts: each version's figures in `points` intervals before `end`."""
    width = span / points
    edges = [end - span + index * width for index in range(points + 1)]
    found: dict[str, Any] = {"time": edges[1:]}
    for version in versions:
        marks = list(_at_edges(observations, version, edges))
        steps = [windows.combined(b, a, -1) for a, b in itertools.pairwise(marks)]
        found[version] = [_rates(step, width) for step in steps]
    return found


def _at_edges(observations: Sequence[Observation], version: str, edges: Sequence[float]) -> Iterator[Counters]:
    """Counters at rising moments, in one pass."""
    latest: dict[str, Counters] = {}
    position = 0
    for edge in edges:
        while position < len(observations) and observations[position].time <= edge:
            row = observations[position]
            if version in row.counters:
                latest[row.boot] = row.counters[version]
            position += 1
        yield windows.total(latest.values())


def commands(state: State) -> list[str]:
    """What may be asked for now."""
    tried: dict[str, events.Event] = {
        "promote": events.Promote(), "promote --full": events.Promote(True, state.spec.candidate),
        "pause": events.Pause(), "resume": events.Resume(), "abort": events.Abort(), "retry": events.Retry(),
        "undo": events.Undo(), "set-weight": events.SetWeight({state.spec.candidate: 0.0}),
    }  # fmt: skip
    return [name for name, event in tried.items() if _changes(state, event)]


def _changes(state: State, event: events.Event) -> bool:
    try:
        return rollout.advance(state, event, state.time)[0] != state
    except rollout.Refused:
        return False


def entry(one: Entry) -> dict[str, Any]:
    """A line of the history: who, when, what, why, with the figures."""
    return {"sequence": one.sequence, "time": one.time, "actor": one.actor, **told(one.event), "digest": one.digest}


def told(event: events.Event) -> dict[str, Any]:
    """What and why."""
    body = plain(event)
    body.pop("kind")
    why = body.pop("reason", "")
    if isinstance(event, events.Applied):
        return {"what": "Applied", "why": f"{event.spec.stable} -> {', '.join(event.spec.candidates)}", "figures": {}}
    if isinstance(event, events.Judged):
        why = f"{event.metric} of {event.version} {event.outcome}: {why}"
    elif isinstance(event, events.Breached):
        why = f"{event.guard} of {event.version}: {why}"
    elif isinstance(event, events.Ready | events.NotReady | events.Unloaded):
        why = f"{event.version} {why}".strip()
    elif isinstance(event, events.Tick):
        why = "a pause or the watch is over"
    figures = body.pop("evidence", body)
    return {"what": type(event).__name__, "why": why, "figures": figures}

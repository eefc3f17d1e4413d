"""The rollout as a pure state machine: advance(state, event, now) -> (state, actions).

Actions are what the new state owes and the old one did not; `duties` lists all that a state owes, which is what a
controller
does after a restart. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from ingot.release import events
from ingot.release.slots import Assignment, everything, reassigned, weights
from ingot.release.spec import WHOLE, HeaderRoute, ReleaseError, Rollout, Step, seconds, slots

Phase = Literal["Healthy", "Progressing", "Paused", "Degraded"]
Stage = Literal["idle", "preparing", "steps", "promoting", "watching", "undoing", "aborted"]
HoldKind = Literal["step", "user", "inconclusive", "error", "capacity", "preparation", "choice"]


class Refused(ReleaseError):
    """The command is not legal in this state."""


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of the state."""


class Hold(Record, frozen=True):
    """Why nothing goes on; `beneath` is a step's pause that a user's lies on."""

    kind: HoldKind
    reason: str
    until: float | None = None
    beneath: Hold | None = None


class Analysis(Record, frozen=True):
    """Metrics being judged; one in the background has no end of its own."""

    run: int
    metrics: tuple[str, ...]
    since: float
    until: float | None = None
    give_up: float | None = None
    passed: tuple[tuple[str, str], ...] = ()


class Mirror(Record, frozen=True):
    """A share of requests that a version sees as well."""

    version: str
    slots: int


class Note(Record, frozen=True):
    """The last verdict of a metric on a version."""

    metric: str
    version: str
    outcome: str
    reason: str
    time: float
    evidence: dict[str, Any] = {}


class State(Record, frozen=True):
    """All that matters of a model's rollouts so far."""

    spec: Rollout
    stage: Stage
    stable: str
    assignment: Assignment
    time: float
    step: int = -1
    previous: str | None = None
    promoting: str | None = None
    since: float = 0.0
    hold: Hold | None = None
    wanted: dict[str, int] | None = None
    analyses: tuple[Analysis, ...] = ()
    runs: int = 0
    header_routes: tuple[HeaderRoute, ...] = ()
    mirror: Mirror | None = None
    ready: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    message: str = ""
    changed: float = 0.0


# -- what a state means -----------------------------------------------------------------------------------------------
def phase(state: State) -> Phase:
    """Argo's word for it."""
    if state.stage == "aborted":
        return "Degraded"
    if state.stage == "idle":
        return "Healthy"
    return "Paused" if state.hold is not None else "Progressing"


def under_way(state: State) -> bool:
    """Whether another rollout would be a second one."""
    return state.stage not in ("idle", "aborted")


class Duty(msgspec.Struct, frozen=True):
    """Something a state owes: prepare, unload, capacity, analyse, guard."""

    kind: Literal["prepare", "unload", "capacity", "analyse", "guard"]
    subject: str = ""


def duties(state: State) -> tuple[Duty, ...]:
    """All that this state owes; each may be done again without harm."""
    owed = [Duty("prepare", version) for version in _unprepared(state)]
    if state.wanted is not None and state.hold is None:
        owed.append(Duty("capacity"))
    owed += [Duty("analyse", str(analysis.run)) for analysis in state.analyses]
    owed += [Duty("guard", version) for version in guarded(state)]
    return (*owed, *(Duty("unload", version) for version in _superfluous(state)))


def guarded(state: State) -> tuple[str, ...]:
    """Versions under absolute limits: candidates that may get traffic."""
    if state.spec.guards is None or state.stage not in ("steps", "promoting", "watching"):
        return ()
    return state.spec.candidates


def _unprepared(state: State) -> tuple[str, ...]:
    if state.hold is not None:
        return ()
    if state.stage == "undoing":
        return (state.previous,) if state.previous else ()
    return tuple(v for v in state.spec.candidates if v not in state.ready) if state.stage == "preparing" else ()


def _superfluous(state: State) -> tuple[str, ...]:
    if under_way(state):
        return ()
    versions = state.spec.versions
    return tuple(v for v in state.ready if v != state.stable and v in versions and versions[v].managed)


def actions(before: State | None, after: State) -> tuple[Duty, ...]:
    """What is newly owed."""
    old = set(duties(before)) if before is not None else set()
    return tuple(duty for duty in duties(after) if duty not in old)


# -- the machine ------------------------------------------------------------------------------------------------------
def advance(state: State | None, event: events.Event, now: float) -> tuple[State, tuple[Duty, ...]]:
    """The next state and what it newly owes; Refused if a command is not legal now. A clock that went back
    stands still."""
    if isinstance(event, events.Applied):
        after = _applied(state, event, now if state is None else max(now, state.time))
        return after, actions(state, after)
    if state is None:
        raise Refused("there is no rollout of this model: apply one first")
    now = max(now, state.time)
    after = _walk(_HANDLERS[type(event)](state, event, now), now)
    if after == state:
        return state, ()
    after = replace(after, time=now)
    return after, actions(state, after)


def _applied(state: State | None, event: events.Applied, now: float) -> State:
    spec = event.spec
    if state is None:
        fresh = State(spec, "preparing", spec.stable, everything(spec.stable), now, since=now, changed=now)
        return replace(fresh, ready=(spec.stable,), message="preparing")
    if under_way(state):
        if spec == state.spec:
            return state
        raise Refused(
            f"a rollout of {spec.model!r} is {phase(state)}: two at once would judge each other; abort it or wait"
        )
    if spec.stable != state.stable:
        raise Refused(f"rollout.yaml says stable is {spec.stable!r}, but {state.stable!r} serves {spec.model!r}")
    return _prepared_again(replace(state, spec=spec, previous=state.previous), now)


def _prepared_again(state: State, now: float) -> State:
    kept = State(state.spec, "preparing", state.stable, everything(state.stable), now, previous=state.previous)
    return replace(kept, runs=state.runs, since=now, changed=now, ready=(state.stable,), message="preparing")


def _walk(state: State, now: float) -> State:
    """Enter steps until one takes time."""
    while state.stage == "steps" and not _occupied(state):
        state = _enter(state, state.step + 1, now)
    return state


def _occupied(state: State) -> bool:
    return state.hold is not None or state.wanted is not None or foreground(state) is not None


def foreground(state: State) -> Analysis | None:
    """The analysis that the current step waits for."""
    return next((analysis for analysis in state.analyses if analysis.until is not None), None)


def _enter(state: State, index: int, now: float) -> State:
    spec = state.spec
    if index >= len(spec.steps):
        if len(spec.candidates) > 1:
            return replace(
                state, step=index, hold=Hold("choice", "steps are done: promote --full --version one of them")
            )
        return _promote(replace(state, step=index), spec.candidate, now)
    state = replace(state, step=index, since=now, message=f"step {index + 1} of {len(spec.steps)}")
    if spec.analysis is not None and spec.analysis.starting_step == index:
        state = _analysed(state, Analysis(state.runs, spec.analysis.metrics, now))
    return _perform(state, spec.steps[index], now)


def _perform(state: State, step: Step, now: float) -> State:
    """The one thing a step asks for."""
    if step.set_weight is not None:
        return _weigh(state, {state.spec.candidate: slots(step.set_weight)}, now)
    if step.set_weights is not None:
        return _weigh(state, {version: slots(weight) for version, weight in step.set_weights.items()}, now)
    if step.pause is not None:
        until = now + seconds(step.pause.duration) if step.pause.duration is not None else None
        return replace(state, hold=Hold("step", "pause" if until else "waits for somebody to resume or promote", until))
    if step.analysis is not None:
        until = now + seconds(step.analysis.duration)
        give_up = until + seconds(step.analysis.give_up) if step.analysis.give_up is not None else None
        return _analysed(state, Analysis(state.runs, step.analysis.metrics, now, until, give_up))
    if step.set_header_route is not None:
        route = step.set_header_route
        others = tuple(other for other in state.header_routes if other.name != route.name)
        return replace(state, header_routes=(*others, route) if route.version is not None else others)
    assert step.set_mirror_route is not None
    mirror = step.set_mirror_route
    seen = Mirror(mirror.version or state.spec.candidate, slots(mirror.percentage))
    return replace(state, mirror=seen if seen.slots else None)


def _analysed(state: State, analysis: Analysis) -> State:
    return replace(state, analyses=(*state.analyses, analysis), runs=state.runs + 1)


def _weigh(state: State, candidates: Mapping[str, int], now: float) -> State:
    """Candidates get these slots and stable the rest, once capacity was checked where that is asked for and needed."""
    wanted = {**candidates, state.stable: WHOLE - sum(candidates.values())}
    before = weights(state.assignment)
    grows = any(count > before.get(version, 0) for version, count in candidates.items())
    if state.spec.capacity is not None and grows:
        return replace(state, wanted=wanted)
    return _weighed(state, wanted, now)


def _weighed(state: State, wanted: Mapping[str, int], now: float) -> State:
    state = replace(state, assignment=reassigned(state.assignment, wanted), wanted=None, changed=now)
    return _promoted(state, now) if state.stage == "promoting" else state


def _promote(state: State, version: str, now: float) -> State:
    state = replace(state, stage="promoting", promoting=version, hold=None, since=now, analyses=(), mirror=None)
    return _weigh(state, {**dict.fromkeys(state.spec.candidates, 0), version: WHOLE}, now)


def _promoted(state: State, now: float) -> State:
    """All traffic is on the new version; the old one stays ready until the watch is over."""
    watch = seconds(state.spec.watch)
    state = replace(state, stage="watching", since=now, header_routes=(), message=f"watching {state.promoting}")
    return state if watch > 0 else _finished(state, now)


def _finished(state: State, now: float) -> State:
    assert state.promoting is not None
    new = state.promoting
    return replace(
        state, stage="idle", stable=new, previous=state.stable, promoting=None, hold=None, analyses=(), since=now,
        message=f"{new} is stable",
    )  # fmt: skip


def _aborted(state: State, reason: str, now: float) -> State:
    return replace(
        state, stage="aborted", assignment=everything(state.stable), hold=None, wanted=None, analyses=(), mirror=None,
        header_routes=(), promoting=None, since=now, changed=now, message=reason,
    )  # fmt: skip


# -- events -----------------------------------------------------------------------------------------------------------
def _tick(state: State, event: events.Tick, now: float) -> State:
    if state.hold is not None:
        over = state.hold.until is not None and now >= state.hold.until
        return replace(state, hold=None) if over else state
    if state.stage == "watching" and now >= state.since + seconds(state.spec.watch):
        return _finished(state, now)
    return state


def _ready(state: State, event: events.Ready, now: float) -> State:
    if event.version not in (*_unprepared(state), *state.spec.candidates) or event.version in state.ready:
        return state if state.stage != "undoing" else _undone(state, event, now)
    state = replace(state, ready=(*state.ready, event.version))
    if state.stage == "undoing":
        return _undone(state, event, now)
    everyone = all(version in state.ready for version in state.spec.candidates)
    return replace(state, stage="steps", since=now) if everyone and state.stage == "preparing" else state


def _undone(state: State, event: events.Ready, now: float) -> State:
    if event.version != state.previous:
        return state
    return replace(
        state, stage="idle", stable=event.version, previous=state.stable, assignment=everything(event.version),
        since=now, changed=now, message=f"undone: {event.version} is stable again",
    )  # fmt: skip


def _not_ready(state: State, event: events.NotReady, now: float) -> State:
    if event.version not in _unprepared(state):
        return state
    return replace(state, hold=Hold("preparation", f"{event.version} is not ready: {event.reason}"))


def _unloaded(state: State, event: events.Unloaded, now: float) -> State:
    if event.version == state.stable or under_way(state):
        return state
    return replace(state, ready=tuple(version for version in state.ready if version != event.version))


def _capacity(state: State, event: events.CapacityChecked, now: float) -> State:
    if state.wanted is None or event.weights != state.wanted:
        return state
    if not event.passed:
        return replace(state, hold=Hold("capacity", event.reason))
    return _weighed(state, state.wanted, now)


def _judged(state: State, event: events.Judged, now: float) -> State:
    analysis = next((a for a in state.analyses if a.run == event.run and event.metric in a.metrics), None)
    if analysis is None or (event.metric, event.version) in analysis.passed:
        return state
    note = Note(event.metric, event.version, event.outcome, event.reason, now, event.evidence)
    others = tuple(n for n in state.notes if (n.metric, n.version) != (event.metric, event.version))
    state = replace(state, notes=(*others, note))
    said = f"{event.metric} of {event.version}: {event.reason}"
    if event.outcome == "Successful" or state.spec.metrics[event.metric].dry_run:
        return _passed(state, analysis, (event.metric, event.version))
    if event.outcome == "Failed":
        return _aborted(state, said, now)
    held = Hold("error" if event.outcome == "Error" else "inconclusive", said)
    return replace(state, hold=held if state.hold is None or state.hold.kind != "user" else state.hold)


def _passed(state: State, analysis: Analysis, pair: tuple[str, str]) -> State:
    done = replace(analysis, passed=(*analysis.passed, pair))
    wanted = {(metric, version) for metric in analysis.metrics for version in state.spec.candidates}
    complete = analysis.until is not None and wanted <= set(done.passed)
    kept = [done if a is analysis else a for a in state.analyses if not (complete and a is analysis)]
    return replace(state, analyses=tuple(kept))


def _breached(state: State, event: events.Breached, now: float) -> State:
    if event.version not in guarded(state):
        return state
    note = Note(event.guard, event.version, "Failed", event.reason, now, event.evidence)
    return _aborted(
        replace(state, notes=(*state.notes, note)), f"{event.guard} of {event.version}: {event.reason}", now
    )


# -- commands ---------------------------------------------------------------------------------------------------------
def _command_promote(state: State, event: events.Promote, now: float) -> State:
    if state.stage not in ("steps", "promoting", "watching"):
        raise Refused(f"nothing to promote: the rollout is {phase(state)} ({state.stage})")
    if event.version is not None and event.version not in state.spec.candidates:
        raise Refused(f"{event.version!r} is no candidate: {', '.join(state.spec.candidates)}")
    if state.hold is not None and state.wanted is not None:  # the operator answers for the capacity
        return _weighed(replace(state, hold=None), state.wanted, now)
    if state.stage == "watching":
        return _finished(state, now)
    if event.full and state.stage == "steps":
        if len(state.spec.candidates) > 1 and event.version is None:
            raise Refused(f"say which: --version {' or '.join(state.spec.candidates)}")
        return _promote(replace(state, wanted=None), event.version or state.spec.candidate, now)
    if state.hold is not None and state.hold.kind == "choice":
        raise Refused("the steps are done: promote --full --version one of the candidates")
    running = tuple(analysis for analysis in state.analyses if analysis.until is None)
    return replace(state, hold=None, analyses=running)


def _command_pause(state: State, event: events.Pause, now: float) -> State:
    if not under_way(state):
        raise Refused(f"nothing to pause: the rollout is {phase(state)}")
    if state.hold is not None and state.hold.kind == "user":
        return state
    beneath = state.hold if state.hold is not None else None
    return replace(state, hold=Hold("user", "paused by hand", None, beneath))


def _command_resume(state: State, event: events.Resume, now: float) -> State:
    hold = state.hold
    if hold is None:
        raise Refused(f"nothing to resume: the rollout is {phase(state)}")
    if hold.kind == "choice":
        raise Refused("the steps are done: promote --full --version one of the candidates")
    state = replace(state, hold=hold.beneath)
    return _analysed_again(state, now) if hold.kind in ("inconclusive", "error") else state


def _analysed_again(state: State, now: float) -> State:
    """The same analyses over fresh data."""
    again = []
    for offset, analysis in enumerate(state.analyses):
        shift = now - analysis.since
        until = analysis.until + shift if analysis.until is not None else None
        give_up = analysis.give_up + shift if analysis.give_up is not None else None
        again.append(Analysis(state.runs + offset, analysis.metrics, now, until, give_up))
    return replace(state, analyses=tuple(again), runs=state.runs + len(again))


def _command_abort(state: State, event: events.Abort, now: float) -> State:
    if not under_way(state):
        return state
    return _aborted(state, "aborted by hand", now)


def _command_retry(state: State, event: events.Retry, now: float) -> State:
    if state.stage != "aborted":
        raise Refused(f"only an aborted rollout can be retried, this one is {phase(state)}")
    return _prepared_again(state, now)


def _command_undo(state: State, event: events.Undo, now: float) -> State:
    if under_way(state):
        return _aborted(state, "undone by hand", now)
    if state.previous is None or state.previous not in state.spec.versions:
        raise Refused("there is no earlier stable version to go back to")
    ready = tuple(version for version in state.ready if version != state.previous)
    return replace(state, stage="undoing", since=now, ready=ready, message=f"going back to {state.previous}")


def _command_weight(state: State, event: events.SetWeight, now: float) -> State:
    if state.stage != "steps":
        raise Refused(f"weights can be set between the first step and the last, not while {state.stage}")
    unknown = sorted(set(event.weights) - set(state.spec.candidates))
    if unknown:
        raise Refused(f"{unknown[0]!r} is no candidate: {', '.join(state.spec.candidates)}; stable gets the rest")
    if any(not 0 <= weight <= 100 for weight in event.weights.values()) or sum(event.weights.values()) > 100:
        raise Refused("weights lie between 0 and 100, and so does their sum")
    try:
        wanted = {version: slots(weight) for version, weight in event.weights.items()}
    except ValueError as error:
        raise Refused(str(error)) from error
    before = weights(state.assignment)
    rest = {version: before.get(version, 0) for version in state.spec.candidates}
    merged = {**rest, **wanted}
    if sum(merged.values()) > WHOLE:
        raise Refused("with the other candidates' weights that is over 100")
    state = _weighed(replace(state, wanted=None), {**merged, state.stable: WHOLE - sum(merged.values())}, now)
    beneath = state.hold if state.hold is None or state.hold.kind != "user" else state.hold.beneath
    return replace(state, hold=Hold("user", "weights set by hand", None, beneath))


_HANDLERS: Mapping[type, Callable[[State, Any, float], State]] = {
    events.Tick: _tick, events.Ready: _ready, events.NotReady: _not_ready, events.Unloaded: _unloaded,
    events.CapacityChecked: _capacity, events.Judged: _judged, events.Breached: _breached,
    events.Promote: _command_promote, events.Pause: _command_pause, events.Resume: _command_resume,
    events.Abort: _command_abort, events.Retry: _command_retry, events.Undo: _command_undo,
    events.SetWeight: _command_weight,
}  # fmt: skip
_ENCODER, _DECODER = msgspec.json.Encoder(), msgspec.json.Decoder(State)


def encode(state: State) -> str:
    """As the store's snapshot holds it."""
    return _ENCODER.encode(state).decode()


def decode(text: str) -> State:
    """A snapshot's state."""
    return _DECODER.decode(text)

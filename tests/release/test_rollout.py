"""The state machine, over drawn histories: weights, order of steps, aborts, replay, clocks that jump."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.release import events, rollout
from ingot.release.rollout import Refused, State, advance, decode, duties, encode, phase
from ingot.release.slots import weights
from ingot.release.spec import WHOLE, Rollout, parse

HEAD = """
model: digits
stable: v1
candidates: [v2]
versions:
  v1: {endpoints: [{url: 'http://h:1'}]}
  v2: {endpoints: [{url: 'http://h:2'}]}
metrics: {errors: {kind: errorRate}, slow: {kind: latency}, dry: {kind: errorRate, dryRun: true}}
"""
STEPS = """
steps:
- {setWeight: 5}
- {analysis: {metrics: [errors, slow], duration: 30s}}
- {pause: {duration: 10s}}
- {setMirrorRoute: {percentage: 10}}
- {setWeight: 50}
- {pause: {}}
"""


def spec(extra: str = STEPS, head: str = HEAD) -> Rollout:
    return parse(head + extra)


def fold(history: list[tuple[events.Event, float]]) -> State:
    state: State | None = None
    for event, now in history:
        state, _ = advance(state, event, now)
    assert state is not None
    return state


def started(extra: str = STEPS, head: str = HEAD) -> State:
    found = spec(extra, head)
    state, _ = advance(None, events.Applied(found), 0.0)
    for version in found.candidates:
        state, _ = advance(state, events.Ready(version), 1.0)
    return state


def judged(state: State, metric: str, outcome: events.Outcome, version: str = "v2") -> State:
    run = next(a.run for a in state.analyses if metric in a.metrics)
    return advance(state, events.Judged(run, metric, version, outcome, "because"), state.time + 1)[0]


# -- properties -------------------------------------------------------------------------------------------------------
OUTCOMES = st.sampled_from(["Successful", "Failed", "Inconclusive", "Error"])
EVENTS = st.one_of(
    st.builds(events.Promote, full=st.booleans()),
    st.sampled_from([events.Pause(), events.Resume(), events.Abort(), events.Retry(), events.Undo()]),
    st.builds(events.SetWeight, st.dictionaries(st.sampled_from(["v2", "v3", "v9"]), st.floats(-10, 130).map(round))),
    st.just(events.Tick()),
    st.builds(events.Ready, st.sampled_from(["v1", "v2", "v3"])),
    st.builds(events.NotReady, st.sampled_from(["v2", "v3"]), st.just("hangs")),
    st.builds(events.Unloaded, st.sampled_from(["v1", "v2"])),
    st.builds(
        events.Judged, st.integers(0, 5), st.sampled_from(["errors", "slow", "dry"]), st.sampled_from(["v2", "v3"]),
        OUTCOMES, st.just("drawn"),
    ),
    st.builds(events.Breached, st.sampled_from(["v2", "v3"]), st.just("p99"), st.just("drawn")),
    st.sampled_from([True, False]).map(lambda passed: events.CapacityChecked(passed, "drawn", {})),
)  # fmt: skip
SPECS = [
    spec(),
    spec(STEPS + "guards: {p99: 1s}\nwatch: 20s\nanalysis: {metrics: [errors, dry], startingStep: 1}\n"),
    spec(STEPS + "capacity: {}\n"),
    spec(
        "steps: [{setWeights: {v2: 10, v3: 20}}, {pause: {duration: 5s}}, {setWeights: {v2: 40, v3: 20}}]\nguards: {}",
        HEAD.replace("[v2]", "[v2, v3]").replace("metrics:", "  v3: {endpoints: [{url: 'http://h:3'}]}\nmetrics:"),
    ),
]


def drawn_history(specification: Rollout, drawn: list[tuple[events.Event, float]]) -> list[tuple[events.Event, float]]:
    """The drawn events that are legal, after the application; a capacity check answers what was asked."""
    now, history = 0.0, [(events.Applied(specification), 0.0)]
    state = fold(history)
    for event, passed in drawn:
        now += passed  # also backwards: the clock jumps
        if isinstance(event, events.CapacityChecked):
            event = events.CapacityChecked(event.passed, event.reason, state.wanted or {})
        try:
            state, _ = advance(state, event, now)
        except Refused:
            continue
        history.append((event, now))
    return history


HISTORIES = st.builds(
    drawn_history, st.sampled_from(SPECS), st.lists(st.tuples(EVENTS, st.floats(-50, 100)), max_size=40)
)


@settings(max_examples=150, deadline=None)
@given(HISTORIES)
def test_weights_always_sum_to_100(history: list[tuple[events.Event, float]]) -> None:
    state = None
    for event, now in history:
        state, _ = advance(state, event, now)
        assert sum(weights(state.assignment).values()) == WHOLE
        assert [run.start for run in state.assignment[1:]] == [run.stop for run in state.assignment[:-1]]


@settings(max_examples=150, deadline=None)
@given(HISTORIES)
def test_no_step_is_skipped(history: list[tuple[events.Event, float]]) -> None:
    """Only a command may leave steps out; what else happens goes from each to the next, and never past a held one."""
    state = None
    for event, now in history:
        before = state
        state, _ = advance(state, event, now)
        if before is None or isinstance(event, events.Applied | events.Retry | events.Promote):
            continue
        assert state.step >= before.step
        passed = range(before.step + 1, min(state.step, len(state.spec.steps)))
        instant = [state.spec.steps[i].pause is None and state.spec.steps[i].analysis is None for i in passed]
        assert all(instant), "a step that takes time was passed over"


@settings(max_examples=150, deadline=None)
@given(HISTORIES)
def test_an_abort_from_any_state_ends_at_stable(history: list[tuple[events.Event, float]]) -> None:
    state = fold(history)
    stable = state.stable
    state, _ = advance(state, events.Abort(), 1e6)
    assert weights(state.assignment) == {stable: WHOLE} and state.stable == stable
    assert phase(state) in ("Degraded", "Healthy")
    assert state.mirror is None and state.header_routes == () and state.analyses == ()


@settings(max_examples=150, deadline=None)
@given(HISTORIES)
def test_replaying_the_log_gives_the_same_state(history: list[tuple[events.Event, float]]) -> None:
    once = fold(history)
    again = fold([(events.decode(events.encode(event)), now) for event, now in history])
    assert once == again == decode(encode(once))
    assert duties(once) == duties(again)


@settings(max_examples=100, deadline=None)
@given(HISTORIES)
def test_time_never_goes_back(history: list[tuple[events.Event, float]]) -> None:
    state, latest = None, 0.0
    for event, now in history:
        state, _ = advance(state, event, now)
        assert state.time >= latest
        latest = state.time


@settings(max_examples=100, deadline=None)
@given(HISTORIES, st.floats(0, 1e6))
def test_a_command_repeated_after_a_kill_does_no_harm(history: list[tuple[events.Event, float]], now: float) -> None:
    """A finding whose event was written before the kill may come twice: the second changes nothing."""
    event, when = history[-1]
    if isinstance(event, events.Judged | events.Breached | events.Ready | events.Unloaded | events.CapacityChecked):
        state = fold(history)
        assert advance(state, event, when)[0].assignment == state.assignment


# -- the ordinary course ----------------------------------------------------------------------------------------------
def test_a_rollout_goes_through_its_steps_and_promotes_itself() -> None:
    """KServe #3085: promotion without somebody's hand."""
    state = started(STEPS.replace("- {pause: {}}", ""))
    assert weights(state.assignment) == {"v2": 500, "v1": 9500} and phase(state) == "Progressing"
    state = judged(judged(state, "errors", "Successful"), "slow", "Successful")
    assert phase(state) == "Paused" and state.step == 2
    state, _ = advance(state, events.Tick(), state.time + 9)
    assert state.step == 2
    state, _ = advance(state, events.Tick(), state.time + 20)
    assert phase(state) == "Healthy" and state.stable == "v2" and weights(state.assignment) == {"v2": WHOLE}
    assert state.previous == "v1"


def test_no_traffic_before_the_warm_up() -> None:
    state, owed = advance(None, events.Applied(spec()), 0.0)
    assert weights(state.assignment) == {"v1": WHOLE}
    assert [duty.kind for duty in owed] == ["prepare"]
    state, _ = advance(state, events.NotReady("v2", "hangs"), 1.0)
    assert phase(state) == "Paused" and "hangs" in state.hold.reason
    state, owed = advance(state, events.Resume(), 2.0)
    assert [duty.subject for duty in owed] == ["v2"]


def test_a_manual_gate_waits() -> None:
    state = judged(judged(started(), "errors", "Successful"), "slow", "Successful")
    state, _ = advance(state, events.Tick(), 100.0)
    assert state.step == 5 and phase(state) == "Paused"
    later, _ = advance(state, events.Tick(), 1e9)
    assert later == state
    promoted, _ = advance(state, events.Promote(), 200.0)
    assert promoted.stable == "v2"


def test_a_failed_metric_goes_back_to_stable() -> None:
    state = judged(started(), "errors", "Failed")
    assert phase(state) == "Degraded" and weights(state.assignment) == {"v1": WHOLE}
    assert state.message == "errors of v2: because"


@pytest.mark.parametrize(("outcome", "kind"), [("Inconclusive", "inconclusive"), ("Error", "error")])
def test_what_cannot_be_judged_pauses(outcome: events.Outcome, kind: str) -> None:
    state = judged(started(), "errors", outcome)
    assert phase(state) == "Paused" and state.hold.kind == kind and weights(state.assignment)["v2"] == 500
    again, _ = advance(state, events.Resume(), state.time + 60)
    assert again.analyses[0].since == state.time + 60 and again.analyses[0].run != state.analyses[0].run


def test_a_breach_while_paused_is_not_ignored() -> None:
    """flagger #1801"""
    state = started(STEPS + "guards: {p99: 1s}\n")
    state, _ = advance(state, events.Pause(), 2.0)
    assert [duty.kind for duty in duties(state)] == ["analyse", "guard"]
    state, _ = advance(state, events.Breached("v2", "p99", "2 s"), 3.0)
    assert phase(state) == "Degraded" and weights(state.assignment) == {"v1": WHOLE}


def test_a_failed_verdict_while_paused_rolls_back() -> None:
    state, _ = advance(started(), events.Pause(), 2.0)
    assert phase(judged(state, "slow", "Failed")) == "Degraded"


def test_a_failed_run_stops() -> None:
    """argo #1411: nothing of it is judged any more, and a late success changes nothing."""
    state = started()
    failed = judged(state, "errors", "Failed")
    assert "analyse" not in [duty.kind for duty in duties(failed)]
    late, _ = advance(failed, events.Judged(state.analyses[0].run, "slow", "v2", "Successful", "late"), 50.0)
    assert late == failed


def test_dry_run_metrics_decide_nothing() -> None:
    state = started("steps: [{setWeight: 5}, {analysis: {metrics: [dry], duration: 9s}}, {pause: {}}]")
    state = judged(state, "dry", "Failed")
    assert phase(state) == "Paused" and state.step == 2 and state.notes[0].outcome == "Failed"


def test_analysis_in_the_background_of_several_steps() -> None:
    state = started("steps: [{setWeight: 5}, {pause: {duration: 5s}}, {setWeight: 20}, {pause: {}}]\n"
                    "analysis: {metrics: [errors], startingStep: 1}")  # fmt: skip
    state, _ = advance(state, events.Tick(), 60.0)
    assert state.step == 3 and len(state.analyses) == 1
    assert phase(judged(state, "errors", "Failed")) == "Degraded"


def test_capacity_is_checked_before_promotion() -> None:
    """flagger #381, #1600: too little capacity holds the rollout; an operator may overrule."""
    state = started("steps: [{pause: {}}]\ncapacity: {headroom: 0.8}")
    state, owed = advance(state, events.Promote(full=True), 2.0)
    assert [duty.kind for duty in owed] == ["capacity"] and weights(state.assignment) == {"v1": WHOLE}
    held, _ = advance(state, events.CapacityChecked(False, "too small", state.wanted), 3.0)
    assert phase(held) == "Paused" and weights(held.assignment) == {"v1": WHOLE}
    assert weights(advance(held, events.Promote(), 4.0)[0].assignment) == {"v2": WHOLE}
    assert weights(advance(state, events.CapacityChecked(True, "", state.wanted), 3.0)[0].assignment) == {"v2": WHOLE}


def test_the_watch_after_promotion_can_still_roll_back() -> None:
    state = started("steps: []\nwatch: 30s\nguards: {p99: 1s}")
    assert state.stage == "watching" and state.stable == "v1"
    back, _ = advance(state, events.Breached("v2", "p99", "2 s"), 10.0)
    assert weights(back.assignment) == {"v1": WHOLE}
    over, _ = advance(state, events.Tick(), 31.0)
    assert over.stable == "v2" and phase(over) == "Healthy"


def test_undo_returns_only_to_a_version_that_is_ready() -> None:
    state = started("steps: []")
    undoing, owed = advance(state, events.Undo(), 5.0)
    assert weights(undoing.assignment) == {"v2": WHOLE} and [duty.subject for duty in owed] == ["v1"]
    undone, _ = advance(undoing, events.Ready("v1"), 6.0)
    assert undone.stable == "v1" and weights(undone.assignment) == {"v1": WHOLE} and phase(undone) == "Healthy"


def test_retry_begins_at_the_first_step() -> None:
    state, _ = advance(judged(started(), "errors", "Failed"), events.Retry(), 50.0)
    assert state.stage == "preparing" and state.step == -1 and state.runs > 0


def test_more_than_two_versions() -> None:
    """kserve #1324: each has its weight; who wins is said by name."""
    head = HEAD.replace("[v2]", "[v2, v3]").replace("metrics:", "  v3: {endpoints: [{url: 'http://h:3'}]}\nmetrics:")
    state = started("steps: [{setWeights: {v2: 10, v3: 20}}, {analysis: {metrics: [errors], duration: 5s}}]", head)
    assert weights(state.assignment) == {"v2": 1000, "v3": 2000, "v1": 7000}
    state = judged(state, "errors", "Successful", "v2")
    assert state.step == 1
    state = judged(state, "errors", "Successful", "v3")
    assert phase(state) == "Paused" and state.hold.kind == "choice"
    with pytest.raises(Refused, match="--version"):
        advance(state, events.Promote(full=True), 99.0)
    done, _ = advance(state, events.Promote(full=True, version="v3"), 99.0)
    assert done.stable == "v3" and weights(done.assignment) == {"v3": WHOLE}


def test_blue_green_has_nobody_and_then_everybody() -> None:
    state = started("steps: [{setHeaderRoute: {name: preview, header: x-preview, version: v2}}, {pause: {}}, "
                    "{setWeight: 100}]\nwatch: 60s")  # fmt: skip
    assert weights(state.assignment) == {"v1": WHOLE} and state.header_routes[0].version == "v2"
    state, _ = advance(state, events.Promote(), 5.0)
    assert weights(state.assignment) == {"v2": WHOLE} and state.stage == "watching" and state.stable == "v1"
    assert weights(advance(state, events.Abort(), 6.0)[0].assignment) == {"v1": WHOLE}


def test_a_pause_by_hand_keeps_the_steps_own() -> None:
    state = started("steps: [{pause: {duration: 60s}}]")
    state, _ = advance(state, events.Pause(), 2.0)
    held, _ = advance(state, events.Tick(), 500.0)
    assert held == state
    resumed, _ = advance(state, events.Resume(), 3.0)
    assert resumed.hold.kind == "step" and resumed.stage == "steps"


def test_managed_versions_are_unloaded_when_superfluous() -> None:
    state = started("steps: []", HEAD.replace("v1: {", "v1: {managed: true, "))
    assert [(duty.kind, duty.subject) for duty in duties(state)] == [("unload", "v1")]
    state, _ = advance(state, events.Unloaded("v1"), 3.0)
    assert duties(state) == ()


# -- bad input --------------------------------------------------------------------------------------------------------
def test_two_rollouts_on_one_model_are_refused() -> None:
    with pytest.raises(Refused, match="two at once"):
        advance(started(), events.Applied(spec(STEPS + "watch: 1s")), 5.0)
    again, owed = advance(started(), events.Applied(spec()), 5.0)
    assert again == started() and owed == ()


def test_a_rollout_from_another_stable_is_refused() -> None:
    state = started("steps: []")
    with pytest.raises(Refused, match="'v2' serves"):
        advance(state, events.Applied(spec()), 5.0)


@pytest.mark.parametrize(
    ("given_weights", "message"),
    [({"v2": 101}, "between 0 and 100"), ({"v9": 5}, "no candidate"), ({"v2": 0.001}, "hundredth")],
)
def test_weights_over_100_and_unknown_versions_are_refused(given_weights: dict[str, float], message: str) -> None:
    with pytest.raises(Refused, match=message):
        advance(started(), events.SetWeight(given_weights), 5.0)


@pytest.mark.parametrize("event", [events.Promote(), events.Pause(), events.Resume(), events.Retry()])
def test_commands_where_they_make_no_sense_are_refused(event: events.Event) -> None:
    with pytest.raises(Refused):
        advance(started("steps: []"), event, 5.0)


def test_a_clock_that_jumps_back_ends_no_pause_and_keeps_none_for_ever() -> None:
    state = started("steps: [{pause: {duration: 60s}}]")
    assert advance(state, events.Tick(), -1e6)[0] == state
    assert advance(state, events.Tick(), 61.0)[0].stage == "idle"


def test_the_module_is_pure() -> None:
    assert not {"time", "datetime", "random", "os", "asyncio"} & set(vars(rollout))

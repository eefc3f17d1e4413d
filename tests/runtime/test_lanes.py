"""Steps side by side: whatever order lanes and waits leave open, results are those of one step after the other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ingot
from ingot.engine import plan_bytes
from ingot.plan.memory import in_lanes
from ingot.runtime.lanes import Turn, Use, arranged, sharing, uses
from tests.runtime import test_cuda as driven
from tests.runtime.fake_cuda import FakeDriver

PLACES = st.frozensets(st.integers(0, 5), max_size=3)
STEPS = st.lists(st.builds(Use, reads=PLACES, writes=PLACES), max_size=14)


def run(steps: Sequence[Use], order: Sequence[int]) -> dict[int, object]:
    """What lies where after the steps in that order: each writes something of its own that tells what it read."""
    memory: dict[int, object] = {}
    for k in order:
        found = hash((k, tuple(memory.get(place) for place in sorted(steps[k].reads | steps[k].writes))))
        memory |= dict.fromkeys(steps[k].writes, found)
    return memory


def any_order(turns: Sequence[Turn], seed: int) -> list[int]:
    """An order in which each step comes behind the one before it in its lane, and behind what it waits for."""
    before = [{*turn.waits, *[k for k in range(step) if turns[k].lane == turn.lane]} for step, turn in enumerate(turns)]
    order: list[int] = []
    draw = random.Random(seed)
    while len(order) < len(turns):
        ready = [k for k in range(len(turns)) if k not in order and before[k] <= set(order)]
        order.append(draw.choice(ready))
    return order


@given(steps=STEPS, lanes=st.integers(1, 5), seed=st.integers(0, 99))
def test_any_order_that_lanes_leave_open_gives_the_same(steps: list[Use], lanes: int, seed: int) -> None:
    launched = [step for step in steps if step.reads | step.writes]
    turns = arranged(launched, lanes)
    assert {turn.lane for turn in turns} <= set(range(lanes))
    assert all(wait < step for step, turn in enumerate(turns) for wait in turn.waits)
    assert run(launched, any_order(turns, seed)) == run(launched, range(len(launched)))


def test_two_branches_go_side_by_side_and_a_chain_stays_in_its_lane() -> None:
    chain = [Use({0}, {1}), Use({1}, {2}), Use({1}, {3}), Use({3}, {4}), Use({2, 4}, {5})]
    turns = arranged([*chain[:2], Use(set(), set()), *chain[2:]], 4)
    assert [turn.lane for turn in turns] == [0, 0, 0, 1, 1, 1], "the third has no launches; the longer branch goes on"
    assert [turn.waits for turn in turns] == [(), (), (), (0,), (), (1,)]


def test_what_is_known_to_have_ended_is_not_waited_for() -> None:
    steps = [Use({0}, {1}), Use({0}, {2}), Use({1, 2}, {3}), Use({2, 3}, {4})]
    assert [turn.waits for turn in arranged(steps, 2)] == [(), (), (1,), ()]


@given(ranges=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda r: (r[0], r[0] + r[1])), max_size=9))
def test_who_shares_memory_with_whom(ranges: list[tuple[int, int]]) -> None:
    def common(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return max(a[0], b[0]) < min(a[1], b[1])

    assert sharing(ranges) == [{k for k, b in enumerate(ranges) if common(a, b)} for a in ranges]


@pytest.mark.parametrize(("lanes", "apart"), [(2, 0), (8, None)])
def test_a_model_in_lanes(monkeypatch: pytest.MonkeyPatch, lanes: int, apart: int | None) -> None:
    """What it computes is the same; its memory may be used twice, or not."""
    driver = FakeDriver()
    driven.use(monkeypatch, driver)
    engine = driven.digits()
    variant = engine.variants[0]
    plan = in_lanes(variant.plan, lanes, apart)
    made = replace(engine, variants=(replace(variant, plan_json=plan_bytes(plan)),))
    feeds = {"image": driven.images(3)}
    with ingot.Session(made, device="cuda") as session, ingot.Session(engine, device="cuda") as plain:
        np.testing.assert_array_equal(session.run(feeds)["scores"], plain.run(feeds)["scores"])
    assert driver.calls["cuStreamCreate"] == 1 + lanes
    offsets = [o for o in plan.memory[0].offsets if o is not None]
    assert (len(set(offsets)) == len(offsets)) is (apart is None)


def test_small_storages_may_be_kept_apart() -> None:
    plan = driven.build(driven.DIGITS, ingot.Profile(image=(2, 1, 8, 8))).variants[0].plan
    sizes = [s.bytes for s in plan.storages]
    most = sorted(s.bytes for s in plan.storages if s.place == "arena")[1]  # type: ignore[type-var]
    assert isinstance(most, int)
    made = in_lanes(plan, 2, most)
    end = len(plan.segments[0].steps)  # type: ignore[union-attr]
    for k, (before, after) in enumerate(zip(plan.storages, made.storages, strict=True)):
        small = before.place == "arena" and sizes[k] <= most  # type: ignore[operator]
        assert (after.first, after.last) == ((0, end) if small else (before.first, before.last))


def test_each_step_of_a_plan_is_known_by_what_it_touches() -> None:
    plan = driven.digits().variants[0].plan
    (segment,) = plan.segments
    found = uses(plan, segment, [{k} for k in range(len(plan.storages))])  # type: ignore[arg-type]
    for step, use in zip(segment.steps, found, strict=True):  # type: ignore[union-attr]
        assert {plan.values[v].storage for v in step.outputs} <= use.writes
        assert {plan.values[v].storage for v in step.inputs if v is not None} == use.reads
        assert all(plan.storages[k].place != "weight" for k in use.reads | use.writes)

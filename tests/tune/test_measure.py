"""What the child does: candidates compiled and timed; weights drawn there; hopeless ones given up early."""

from __future__ import annotations

import pickle  # noqa: TID251  what travels to a child
from typing import Any

import numpy as np
import pytest

from ingot.errors import BuildError
from ingot.kernels import Candidate, candidates
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.standalone import native_isa
from ingot.kernels.node import Node, Port
from ingot.tune import measure
from ingot.tune.measure import compile_candidate, describe, time_candidates, without_weights
from tests.tune.support import node

ISA = native_isa()
pytestmark = pytest.mark.skipif(ISA is None, reason="needs AVX2")


def linear(rows: int = 8, inner: int = 64, columns: int = 96) -> Node:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((inner, columns), np.float32)
    return node("Linear", (rows, inner), (inner, columns), (rows, columns), weight=weight)


def isa() -> Isa:
    assert ISA is not None
    return ISA


def some(made: Node, count: int = 3) -> list[Candidate]:
    return list(candidates(made, "cpu", isa()))[:count]


def timed(made: Node, chosen: list[Candidate], budget: float = 0.01) -> list[float]:
    ready = [(describe(c), compile_candidate(made, describe(c), isa().name)) for c in chosen]
    return time_candidates(made, ready, isa().name, budget, 0.0)


def test_every_candidate_is_timed() -> None:
    made = linear()
    times = timed(made, some(made))
    assert len(times) == 3 and all(0 < t < 1e6 for t in times)


def test_more_work_takes_longer() -> None:
    small, large = linear(4, 64, 64), linear(256, 512, 512)
    assert timed(small, some(small, 1))[0] * 10 < timed(large, some(large, 1))[0]


def test_large_weights_stay_at_home_and_small_ones_travel() -> None:
    light = without_weights(linear())
    small = without_weights(linear(8, 4, 4))
    assert len(pickle.dumps(light)) < 2000 < linear().input(1).constant.nbytes  # type: ignore[union-attr]
    assert light.input(1).shape == (64, 96)
    assert np.array_equal(small.input(1).constant, linear(8, 4, 4).input(1).constant)  # type: ignore[arg-type]


def test_code_does_not_depend_on_the_weights_drawn() -> None:
    made, light = linear(), without_weights(linear())
    for candidate in some(made):
        there = compile_candidate(light, describe(candidate), isa().name)
        assert there == compile_candidate(made, describe(candidate), isa().name)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "uint16"])
def test_drawn_integers_are_legal_indices(dtype: str) -> None:
    assert not measure.draw(Port(dtype, (5,))).any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16", "uint8", "int8", "bool"])
def test_drawn_numbers_are_tame(dtype: str) -> None:
    drawn = measure.draw(Port(dtype, (50,))).astype(np.float64)
    assert (drawn >= 0).all() and (drawn <= 1).all() and drawn.any()


def test_a_kernel_nobody_can_import_is_named() -> None:
    with pytest.raises(BuildError, match=r"importing json registers no kernel linear_nowhere for Linear"):
        compile_candidate(linear(), ("json", "linear_nowhere", {}, some(linear())[0].ports), isa().name)


class Clock:
    """A time that passes only where a runner says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def thread_time(self) -> float:
        return self.now

    perf_counter = thread_time


def fake_runners(monkeypatch: pytest.MonkeyPatch, costs: list[float], layouts: list[str]) -> list[Any]:
    """Runners that take so many seconds each on a clock of their own."""
    clock, made, counts = Clock(), iter(zip(costs, layouts, strict=True)), [0] * len(costs)

    class Alone:
        def __init__(self, number: int, cost: float) -> None:
            self.number, self.cost = number, cost

        def warm_inputs(self) -> None: ...

        def run(self) -> None:
            counts[self.number] += 1
            clock.now += self.cost

    def runner(*_: Any) -> measure._Runner:
        cost, layout = next(made)
        number = costs.index(cost)
        return measure._Runner(Alone(number, cost), measure.Ports((layout,), ()), False)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "_runner", runner)
    monkeypatch.setattr(measure.cold, "sweep", lambda: None)
    return counts


def test_those_far_behind_in_their_layout_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, layouts = [1e-3, 1.05e-3, 2e-3, 9e-3], ["", "", "", "blocked"]
    counts = fake_runners(monkeypatch, costs, layouts)
    ready: Any = [((), None)] * 4
    times = time_candidates(linear(), ready, isa().name, 0.2, 0.0)
    assert times == pytest.approx([c * 1e6 for c in costs])
    assert counts[2] == measure._FEWEST_ROUNDS and counts[0] == counts[1] == counts[3] > measure._FEWEST_ROUNDS


def test_the_budget_and_the_number_of_rounds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = fake_runners(monkeypatch, [1e-6], [""])
    time_candidates(linear(), [((), None)], isa().name, 10.0, 0.0)  # type: ignore[list-item]
    assert counts == [measure._MOST_ROUNDS]
    counts = fake_runners(monkeypatch, [1.0], [""])
    time_candidates(linear(), [((), None)], isa().name, 0.5, 0.0)  # type: ignore[list-item]
    assert counts == [measure._FEWEST_ROUNDS]


def test_interruptions_do_not_count() -> None:
    runner = measure._Runner(None, measure.Ports((), ()), False, [1.0, 1.01, 1.02, 5.0, 1.0, 9.0, 1.01, 7.0])  # type: ignore[arg-type]
    assert runner.typical == 1.01


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_weights_come_from_memory_where_the_form_that_a_candidate_gives_them_does_not_stay(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, evicted = linear(), list[int]()
    (chosen,) = some(made, 1)
    ready = [(describe(chosen), compile_candidate(made, describe(chosen), isa().name))]
    packed = sum(array.nbytes for array in measure.Standalone(made, chosen, isa()).constants)
    monkeypatch.setattr(measure.cold, "CACHED", packed)
    monkeypatch.setattr(measure.cold, "evict", lambda arrays: evicted.append(sum(a.nbytes for a in arrays)))
    time_candidates(made, ready, isa().name, 0.01, share)
    assert set(evicted) == ({packed} if share > 1 else set())

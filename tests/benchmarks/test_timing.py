"""Paired timing takes turns fairly and compares turn by turn."""

import os

import pytest

from benchmarks.timing import Timing, paired, pinned


def test_ratio_is_the_median_over_turns() -> None:
    ours, theirs = Timing((1.0, 2.0, 4.0)), Timing((2.0, 4.0, 40.0))
    assert ours.ratio(theirs) == 2.0
    assert ours.median == 2.0


def test_every_runtime_takes_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.PAUSE", 0)
    monkeypatch.setattr("benchmarks.timing.SLICE", 0)
    order: list[str] = []
    timings = paired({name: lambda name=name: order.append(name) for name in ("a", "b", "c")}, rounds=3)
    assert [len(timing.turns) for timing in timings.values()] == [3, 3, 3]
    firsts = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    assert firsts == ["a", "b", "c", "a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_pinned_gives_the_cores_back() -> None:
    before = os.sched_getaffinity(0)
    with pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before

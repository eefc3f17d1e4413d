"""Lanes, and which kernels begin early: settled by the graph's time, the same again from the timing cache."""

from __future__ import annotations

from pathlib import Path

import pytest

import ingot
from ingot.engine import Variant
from ingot.kernels.cuda.architecture import architecture
from ingot.plan.plan import GraphSegment
from ingot.runtime import cubins
from ingot.runtime.cuda_executor import CudaFrame
from ingot.tune import beginnings
from tests.runtime import test_cuda as driven
from tests.runtime.fake_cuda import FakeDriver

MEASURE = beginnings._measure
TARGET = architecture("sm_90")


@pytest.fixture
def variant(monkeypatch: pytest.MonkeyPatch) -> Variant:
    driven.use(monkeypatch, FakeDriver())
    monkeypatch.setattr(beginnings, "_measure", MEASURE)
    return driven.digits().variants[0]


def begun(variant: Variant) -> list[bool]:
    return [code.overlaps for code in cubins.unpack(variant.code).values()]


def settle(variant: Variant, cache: Path | None, **options: object) -> Variant:
    config = ingot.BuildConfig(target="cuda:sm_90", timing_cache=cache, **options)  # type: ignore[arg-type]
    return beginnings.settled(variant, TARGET, {}, config)


def test_what_makes_the_graph_faster_stays(variant: Variant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As built 100 µs; without the first 90; without the second too 89.9, which is noise; then slower."""
    count = sum(begun(variant))
    assert count > 2
    times = iter([100.0, 90.0, 89.9, *[95.0] * (count - 2)])
    monkeypatch.setattr(beginnings, "_time", lambda frame: next(times))
    made = settle(variant, tmp_path / "times")
    assert begun(made) == [False, *begun(variant)[1:]]
    assert settle(variant, tmp_path / "times", timing_cache_only=True).code == made.code
    assert next(times, None) is None, "the second time nothing is measured"


def test_each_trial_captures_its_graph_anew(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[bool]] = []

    def time(frame: CudaFrame) -> float:
        assert not frame._graphs
        seen.append([code.overlaps for code in frame.loaded.kernels._codes.values()])
        return 100.0

    monkeypatch.setattr(beginnings, "_time", time)
    assert settle(variant, None) is variant
    early = [k for k, overlaps in enumerate(begun(variant)) if overlaps]
    assert seen[0] == begun(variant)
    assert [[k for k, now in enumerate(row) if now != seen[0][k]] for row in seen[1:]] == [[k] for k in early]


def test_a_graph_is_timed_in_rows(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row captures, and does not count."""
    launched: list[int] = []
    times = iter([0.02] * beginnings._ROWS)
    monkeypatch.setattr(CudaFrame, "launch", lambda frame, number: launched.append(number))
    monkeypatch.setattr(FakeDriver, "_cuEventElapsedTime", lambda driver, start, end: next(times))
    found: dict[str, float] = {}
    monkeypatch.setattr(beginnings, "_LONGEST", 1.0)  # too long for more
    MEASURE(variant, {}, ["a kernel"], found.__setitem__)
    assert list(found) == ["as built"] and found["as built"] == pytest.approx(2.0)
    assert len(launched) == beginnings._RUNS * (beginnings._ROWS + 1)


def test_nothing_is_settled_without_times(variant: Variant) -> None:
    assert settle(variant, None, level=0) is variant


def lanes_of(variant: Variant) -> list[int]:
    return [segment.lanes for segment in variant.plan.segments if isinstance(segment, GraphSegment)]


@pytest.mark.parametrize(
    ("times", "lanes"), [((100.0, 99.9, 90.0), 8), ((100.0, 80.0, 90.0), 2), ((100.0, 101.0, 99.8), 1)]
)
def test_steps_go_side_by_side_where_that_is_faster(
    variant: Variant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: tuple[float, ...], lanes: int
) -> None:
    left = iter(times)
    monkeypatch.setattr(beginnings, "_LANES", ((2, 0), (8, None)))
    monkeypatch.setattr(beginnings, "_measure", lambda *_: None)
    monkeypatch.setattr(beginnings, "_time", lambda frame: next(left))
    made = settle(variant, tmp_path / "times")
    assert lanes_of(made) == [lanes]
    assert settle(variant, tmp_path / "times", timing_cache_only=True).plan == made.plan
    assert next(left, None) is None, "the second time nothing is measured"


def test_what_would_take_much_memory_is_not_tried(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginnings, "_LANES", ((2, 0), (8, None)))
    monkeypatch.setattr(beginnings, "_MOST_MEMORY", 100)
    monkeypatch.setattr(beginnings, "_measure", lambda *_: None)
    monkeypatch.setattr(beginnings, "_time", lambda frame: pytest.fail("timed"))
    assert settle(variant, None) is variant

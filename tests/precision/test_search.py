"""The search over layers, with engines that are formulas: noise and time add up, conversions cost."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.precision.search import Point, Search, front, never_slower
from ingot.precision.sensitivity import Sensitivity
from ingot.precision.trials import FLOAT32, Choice

WIDE = 1000.0


def layers(noises: list[float], gains: list[float]) -> list[Sensitivity]:
    found = [Sensitivity(f"layer{i}", "int8", n, g) for i, (n, g) in enumerate(zip(noises, gains, strict=True))]
    return sorted(found, key=lambda s: (s.price, s.noise))


def search(ranked: list[Sensitivity], budget: float, forced: Mapping[str, str] | None = None,
           conversion: float = 0.0) -> list[Point]:  # fmt: skip
    known = {s.node: s for s in ranked}

    def judge(choice: Choice) -> Point:
        noise = sum(known[node].noise for node in choice.nodes if node in known)
        return Point(choice, -noise, 0.0, noise <= budget)

    def microseconds(choice: Choice) -> float:
        return WIDE - sum(known[n].gain for n in choice.nodes if n in known) + conversion * bool(choice.nodes)

    return Search(judge, microseconds, lambda stage, share: None, forced or {}).run(ranked)


def chosen(points: list[Point]) -> set[str]:
    return set(never_slower(points)[0].choice.nodes)


def test_without_a_limit_everything_that_gains_is_narrow() -> None:
    ranked = layers([1, 2, 3], [10, 20, -5])
    assert chosen(search(ranked, float("inf"))) == {"layer0", "layer1"}


def test_the_layer_that_breaks_the_budget_stays_wide() -> None:
    ranked = layers([0.1, 50.0, 0.1, 0.1], [10, 11, 12, 13])
    assert chosen(search(ranked, 1.0)) == {"layer0", "layer2", "layer3"}


def test_larger_budgets_are_never_slower() -> None:
    ranked = layers([0.1 * 1.5**i for i in range(12)], [5 + 7 * i % 11 for i in range(12)])
    times = [never_slower(search(ranked, budget))[0].microseconds for budget in (0.05, 0.5, 1.0, 5.0, 100.0)]
    assert times == sorted(times, reverse=True) and len(set(times)) == len(times)


def test_what_is_slower_with_its_conversions_is_not_taken() -> None:
    ranked = layers([0.1, 0.1], [10, 20])
    points = search(ranked, 1.0, conversion=100.0)
    assert chosen(points) == set() and any(p.choice.nodes and p.within for p in points)


def test_forced_layers_are_narrow_in_every_choice() -> None:
    points = search(layers([0.1, 0.2], [10, 20]), 5.0, {"layer9": "int8"})
    assert all(p.choice.nodes.get("layer9") == "int8" for p in points) and FLOAT32 not in [p.choice for p in points]


@given(st.lists(st.tuples(st.floats(0.001, 10), st.floats(-5, 50)), min_size=1, max_size=16), st.floats(0, 20))
def test_any_choice_is_within_the_budget_and_not_slower(drawn: list[tuple[float, float]], budget: float) -> None:
    ranked = layers([n for n, _ in drawn], [g for _, g in drawn])
    points = search(ranked, budget)
    best = never_slower(points)[0]
    assert best.within and -best.score <= budget
    assert best.microseconds is not None and best.microseconds <= WIDE
    assert len(points) <= 32


def test_a_narrower_choice_has_to_be_clearly_faster() -> None:
    wide = Point(Choice({"a": "int8"}), 1.0, 0.0, True, 100.0)
    equal = Point(Choice({"a": "int8", "b": "int8"}), 0.9, 0.0, True, 99.5)
    faster = Point(Choice({"a": "int8", "b": "int8", "c": "int8"}), 0.8, 0.0, True, 90.0)
    assert never_slower([wide, equal]) == [wide]
    assert never_slower([wide, equal, faster]) == [faster, wide]


def test_the_front_is_what_nothing_beats() -> None:
    points = [Point(Choice({str(i): "int8"}), score, 0.0, True, time)
              for i, (time, score) in enumerate([(10.0, 0.5), (20.0, 0.9), (15.0, 0.4), (30.0, 0.9)])]  # fmt: skip
    assert [p.microseconds for p in front(points)] == [10.0, 20.0]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_ties_of_price_do_not_stop_the_search(count: int) -> None:
    ranked = layers([0.0] * count, [50.0] * count)
    assert len(chosen(search(ranked, 0.0))) == count

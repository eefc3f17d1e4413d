"""Choosing: the sum of prices and conversions, never worse than what anybody would take without thinking."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.kernels import Candidate
from ingot.kernels.cpu.isa import AVX2
from ingot.plan.lower import Module, Tensor, Work
from ingot.tune.choose import Choice, choose
from tests.tune.support import candidate, module, tensor, work

LAYOUTS = ("", "blocked")
Prices = dict[tuple[str, str], float]


def conversion(t: Tensor) -> float:
    """What the module under test says: a fixed microsecond, and the bytes read and written."""
    size = t.port().bytes
    assert isinstance(size, int)
    return 1 + 2 * size / 6000


def layout_of(layouts: tuple[str, ...], index: int) -> str:
    return (layouts[index] if index < len(layouts) else "") or "plain"


def total(graph: Module, chosen: dict[Work, Candidate], prices: Prices) -> float:
    """Prices and reorders, counted by walking the graph as it would be assembled."""
    home: dict[Tensor, str] = {}
    made: set[tuple[Tensor, str]] = set()
    spent = 0.0

    def want(t: Tensor, layout: str) -> float:
        cost = want(t.root, "plain") if t.alias is not None else 0.0
        if layout == home.get(t, "plain") or (t, layout) in made:
            return cost
        made.add((t, layout))
        return cost + conversion(t)

    for w in graph.works:
        ports = chosen[w].ports if w in chosen else None
        for index, t in enumerate(w.inputs):
            assert t is not None
            spent += want(t, layout_of(ports.inputs, index) if ports else "plain")
        for index, t in enumerate(w.outputs):
            home[t] = layout_of(ports.outputs, index) if ports else "plain"
        spent += prices[w.name, chosen[w].kernel.name] if w in chosen else 0.0
    return spent + sum(want(t, "plain") for t in graph.outputs)


@st.composite
def graphs(draw: st.DrawFn, most: int = 7) -> tuple[Module, Prices]:
    """Works that read one or two earlier tensors, some of them views; some are host steps."""
    prices: Prices = {}
    tensors = [tensor("x")]
    works: list[Work] = []
    for number in range(draw(st.integers(1, most))):
        name = f"w{number}"
        read = [draw(st.sampled_from(tensors)) for _ in range(draw(st.integers(1, 2)))]
        written = tensor(f"t{number}", (1, draw(st.sampled_from([16, 64, 1024])), 8, 8))
        kinds = draw(st.lists(st.sampled_from(list(itertools.product(LAYOUTS, LAYOUTS))), max_size=4))
        choices = [candidate(f"k{i}", [a] * len(read), [b]) for i, (a, b) in enumerate([("", ""), *kinds])]
        works.append(work(name, read, [written], choices if draw(st.integers(0, 5)) else []))
        prices |= {(name, c.kernel.name): draw(st.integers(1, 400)) / 4 for c in choices}
        tensors.append(written)
        if draw(st.integers(0, 3)) == 0:
            tensors.append(tensor(f"v{number}", (1, 8, 8, written.shape[1]), alias=written))  # type: ignore[index]
    outputs = draw(st.lists(st.sampled_from(tensors[1:]), min_size=1, max_size=2, unique=True))
    return module(tensors[:1], outputs, works), prices


def chosen_of(graph: Module, prices: Prices) -> Choice:
    return choose(graph, lambda w, c: prices[w.name, c.kernel.name], {}, AVX2.pace)


def native(graph: Module) -> list[Work]:
    return [w for w in graph.works if w.kind == "native"]


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_it_says_what_it_costs(drawn: tuple[Module, Prices]) -> None:
    graph, prices = drawn
    choice = chosen_of(graph, prices)
    assert set(choice.candidates) == set(native(graph))
    assert all(c in w.choices for w, c in choice.candidates.items())
    assert choice.microseconds == pytest.approx(total(graph, choice.candidates, prices))


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_never_worse_than_all_plain_nor_than_the_cheapest_each(drawn: tuple[Module, Prices]) -> None:
    graph, prices = drawn

    def cheapest(w: Work, among: tuple[Candidate, ...]) -> Candidate:
        return min(among, key=lambda c: prices[w.name, c.kernel.name])

    def plain_ones(w: Work) -> tuple[Candidate, ...]:
        return tuple(c for c in w.choices if not any((*c.ports.inputs, *c.ports.outputs)))

    plain = {w: cheapest(w, plain_ones(w)) for w in native(graph)}
    each = {w: cheapest(w, w.choices) for w in native(graph)}
    cost = chosen_of(graph, prices).microseconds
    assert cost <= total(graph, plain, prices) + 1e-6 and cost <= total(graph, each, prices) + 1e-6


@settings(max_examples=100, deadline=None, derandomize=True)  # of 4,000 random graphs 11 were not at their best
@given(graphs(most=5))
def test_nearly_as_good_as_trying_everything(drawn: tuple[Module, Prices]) -> None:
    graph, prices = drawn
    works = native(graph)
    selections = (dict(zip(works, picks, strict=True)) for picks in itertools.product(*(w.choices for w in works)))
    best = min(total(graph, selection, prices) for selection in selections)
    assert best - 1e-6 <= chosen_of(graph, prices).microseconds <= 1.25 * best + 1e-6


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_what_failed_is_not_taken(drawn: tuple[Module, Prices]) -> None:
    graph, prices = drawn
    last = {(w.name, w.choices[-1].kernel.name): math.inf for w in native(graph) if len(w.choices) > 1}
    choice = chosen_of(graph, prices | last)
    assert not [w.name for w, c in choice.candidates.items() if (w.name, c.kernel.name) in last]
    assert math.isfinite(choice.microseconds)


def chain(length: int, bodies: tuple[Module, ...] = ()) -> Module:
    """Works in a row, each plain or blocked."""
    tensors = [tensor(f"t{i}", (1, 64, 32, 32)) for i in range(length + 1)]
    options = [candidate("plain", [""], [""]), candidate("blocked", ["blocked"], ["blocked"])]
    works = [work(f"w{i}", [tensors[i]], [tensors[i + 1]], options) for i in range(length)]
    works[0].bodies = bodies
    return module(tensors[:1], tensors[-1:], works)


def test_a_layout_worth_two_conversions_is_kept_through_a_network() -> None:
    """Blocked pays at both ends only; those between are dearer blocked, but less than converting would be."""
    graph = chain(6)
    prices = {(w.name, "plain"): 10.0 for w in graph.works} | {(w.name, "blocked"): 14.0 for w in graph.works}
    prices |= {("w0", "plain"): 500.0, ("w5", "plain"): 500.0}
    assert {c.kernel.name for c in chosen_of(graph, prices).candidates.values()} == {"blocked"}


def test_a_gain_below_the_conversions_is_left() -> None:
    graph = chain(1)
    prices = {("w0", "plain"): 20.0, ("w0", "blocked"): 19.0}
    assert [c.kernel.name for c in chosen_of(graph, prices).candidates.values()] == ["plain"]


def test_several_inputs_change_their_layout_together() -> None:
    """Found on a GPU: attention took its heads from three copies, because no single copy less would have paid."""
    shape = (1, 64, 32, 32)
    x, y, *between = (tensor(name, shape) for name in ("x", "y", "query", "key", "value"))
    writers = [work(t.name, [x], [t], [candidate("copied", [""], [""]), candidate("seen", [""], ["blocked"])])
               for t in between]  # fmt: skip
    reader = work("reader", between, [y], [candidate("plain", ["", "", ""], [""]),
                                           candidate("partly", ["", "", ""], ["blocked"]),
                                           candidate("heads", ["blocked"] * 3, [""])])  # fmt: skip
    prices = {**{(t.name, "copied"): 20.0 for t in between}, **{(t.name, "seen"): 0.0 for t in between},
              ("reader", "plain"): 47.0, ("reader", "partly"): 47.1, ("reader", "heads"): 48.0}  # fmt: skip
    choice = chosen_of(module([x], [y], [*writers, reader]), prices)
    assert choice.candidates[reader].kernel.name == "heads" and choice.microseconds == pytest.approx(48)


def test_a_tie_goes_to_the_layout_at_hand() -> None:
    graph = chain(3)
    prices = {(w.name, kind): 10.0 for w in graph.works for kind in ("plain", "blocked")}
    assert {c.kernel.name for c in chosen_of(graph, prices).candidates.values()} == {"plain"}


def test_bodies_of_control_steps_are_chosen_too() -> None:
    inner = chain(2)
    prices = {(f"w{i}", kind): 10.0 for i in range(2) for kind in ("plain", "blocked")}
    choice = chosen_of(chain(2, (inner,)), prices)
    assert set(choice.candidates) >= set(inner.works) and choice.microseconds == pytest.approx(40.0)

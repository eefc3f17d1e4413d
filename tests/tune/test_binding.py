"""Binding symbols: a node as it will typically be run, with nothing symbolic left."""

from hypothesis import given
from hypothesis import strategies as st

from ingot.tune.binding import DEFAULT_EXTENT, bind
from tests.tune.support import node

EXTENTS = st.one_of(st.integers(1, 9), st.sampled_from(["N", "S", "N*3", "(S+1)//2"]))


@given(st.lists(EXTENTS, max_size=4), st.integers(1, 50), st.integers(1, 50))
def test_every_extent_becomes_a_number(shape: list[int | str], n: int, s: int) -> None:
    bound = bind(node("Pointwise", tuple(shape), tuple(shape)), {"N": n, "S": s})
    expected = tuple({"N": n, "S": s, "N*3": n * 3, "(S+1)//2": (s + 1) // 2}.get(d, d) for d in shape)  # type: ignore[arg-type]
    assert bound.output.shape == bound.input(0).shape == expected


def test_symbols_nobody_bound_get_a_default() -> None:
    assert bind(node("Pointwise", ("N", "Q"), ("N", "Q")), {"N": 3}).output.shape == (3, DEFAULT_EXTENT)


def test_extents_among_the_attributes_are_bound_and_names_are_not() -> None:
    view = bind(node("View", ("N", 4), ("N*2", 2), shape=("N*2", "2")), {"N": 5})
    assert view.attributes["shape"] == (10, 2)
    pool = bind(node("Pool", (1, 4, "N", 8), (1, 4, "N", 8), kind="max", kernel=(1, 1)), {"N": 5, "max": 7})
    assert pool.attributes["kind"] == "max"


def test_a_static_node_keeps_its_ports() -> None:
    static = node("Pointwise", (2, 3), (2, 3))
    assert bind(static, {"N": 5}).inputs[0] is static.inputs[0]

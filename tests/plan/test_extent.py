"""Size expressions: evaluation, products, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.errors import EngineError
from ingot.plan.extent import add, ceil_div, evaluate, product, symbols_of

EXTENTS = st.one_of(st.integers(0, 50), st.sampled_from(["N", "N+1", "(H+1)//2", "min(N, H)", "H*3"]))
BOUND = {"N": 5, "H": 7}


@given(st.lists(EXTENTS, max_size=5))
def test_product_means_multiplication(extents: list[int | str]) -> None:
    expected = 1
    for extent in extents:
        expected *= evaluate(extent, BOUND)
    assert evaluate(product(extents), BOUND) == expected


@given(EXTENTS, EXTENTS)
def test_add_means_addition(a: int | str, b: int | str) -> None:
    assert evaluate(add(a, b), BOUND) == evaluate(a, BOUND) + evaluate(b, BOUND)


@given(EXTENTS, st.integers(1, 16))
def test_ceil_div_covers(extent: int | str, block: int) -> None:
    blocks, size = evaluate(ceil_div(extent, block), BOUND), evaluate(extent, BOUND)
    assert blocks * block >= size > (blocks - 1) * block or size == blocks == 0


def test_symbols_do_not_count_functions() -> None:
    assert symbols_of("max(N, 2)*H + 1") == {"N", "H"}


@pytest.mark.parametrize(
    "text", ["__import__('os')", "N.x", "[1]", "N if N else 1", "1 +", "2**3", "'a'", "min()", "N" * 3000]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(EngineError):
        evaluate(text, BOUND)


def test_an_unbound_symbol_is_named() -> None:
    with pytest.raises(KeyError, match="Q"):
        evaluate("Q+1", BOUND)

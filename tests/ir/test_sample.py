"""Sample's meaning: weights are powers of two, every share is right, what truncation leaves is what it says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ingot.errors import GraphError
from ingot.ir.ops import TensorType, infer, meaning
from ingot.ir.ops_sample import (
    DRAW,
    LANES,
    REACH,
    UNIT,
    Draw,
    adjusted,
    at_places,
    distances,
    draw_of,
    edits_of,
    mixed,
    number,
    sampled,
    start_of,
    state_of,
    weights,
)

LIKELY = 1e-4  # a wrong share is seen long before


def drawn(logits: Any, draws: int, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
          min_p: float = 0.0) -> np.ndarray[Any, Any]:  # fmt: skip
    """How often each token comes, of so many draws with fixed seeds."""
    logits = np.asarray(logits, np.float32)
    rows = [draw_of(state_of(start_of(seed), seed % 7), temperature, top_k, top_p, min_p) for seed in range(draws)]
    return np.bincount([sampled(logits, row) for row in rows], minlength=len(logits))


def kept(logits: Any, temperature: float, top_k: int | None, top_p: float, min_p: float) -> np.ndarray[Any, Any]:
    """Probabilities of what is left, by floating-point numbers and a full sort."""
    powers = np.exp((np.asarray(logits, np.float64) - np.max(logits)) / temperature)
    order = np.argsort(-powers, kind="stable")
    left = powers[order]
    fine = np.arange(len(left)) < (top_k or len(left))
    total = left[fine].sum()
    fine &= (np.cumsum(left) - left < top_p * total) & (left >= min_p)
    fine[0] = True
    shares = np.zeros(len(left))
    shares[order[fine]] = left[fine] / left[fine].sum()
    return shares


def test_weights_are_powers_of_two() -> None:
    far = np.arange(0, REACH + 1, 1999, dtype=np.int32)
    found, exact = weights(far).astype(np.float64), 2.0 ** (40 - far / UNIT)
    near = far < 12 * UNIT
    np.testing.assert_allclose(found[near], exact[near], rtol=1.3e-7)
    assert (np.abs(found - exact) <= 1 + 1.3e-7 * exact).all() and not weights(np.array([REACH], np.int32)).any()
    assert (np.diff(weights(np.arange(3 * UNIT - 900, 3 * UNIT + 900, dtype=np.int32)).astype(np.int64)) <= 0).all()
    edges = np.array([0.0, -np.inf, -1e30], np.float32)
    assert distances(edges, np.float32(0), np.float32(1e30)).tolist() == [0, REACH, REACH]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), [
    (1.0, None, 1.0, 0.0), (0.6, None, 1.0, 0.0), (2.0, 7, 1.0, 0.0), (0.7, None, 0.9, 0.0), (1.0, None, 0.5, 0.0),
    (1.0, None, 1.0, 0.1), (1.3, None, 0.95, 0.02), (1.0, 20, 0.8, 0.0), (1.0, 12, 0.9, 0.05),
])  # fmt: skip
def test_shares(temperature: float, top_k: int | None, top_p: float, min_p: float) -> None:
    """Chi-square over fixed seeds, more tokens than there are lanes."""
    logits = np.full(LANES + 500, -60.0, np.float32)
    places = np.random.default_rng(1).permutation(len(logits))[:40]
    logits[places] = np.random.default_rng(2).standard_normal(40) * 1.5
    shares, draws = kept(logits, temperature, top_k, top_p, min_p), 6000
    counts = drawn(logits, draws, temperature, top_k, top_p, min_p)
    assert not counts[shares == 0].any()
    there = shares > 1e-9
    found, expected = counts[there], shares[there] / shares[there].sum() * draws
    assert stats.chisquare(found, expected).pvalue > LIKELY if there.sum() > 1 else found[0] == draws


def test_equal_ones_stay_together() -> None:
    logits = np.array([1.0, 5.0, 5.0, 5.0, 0.0], np.float32)
    assert (drawn(logits, 300, top_k=2) > 0).tolist() == [False, True, True, True, False]
    assert (drawn(logits, 300, top_p=0.1) > 0).tolist() == [False, True, True, True, False]
    assert drawn(logits, 50, top_k=1)[1] == 50 and drawn(logits, 50, temperature=0)[1] == 50, "the likeliest: the first"


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.floats(0.01, 1.0), st.floats(0.0, 0.9), st.floats(0.2, 3.0), st.integers(0, 1 << 30))
def test_what_is_left(top_k: int, top_p: float, min_p: float, temperature: float, seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal(300).astype(np.float32) * 2
    shares = kept(logits, temperature, top_k, min(top_p + 1e-6, 1.0), min_p * (1 - 1e-6))
    for place in range(20):
        row = draw_of(state_of(start_of(seed), place), temperature, top_k, top_p, min_p)
        assert shares[sampled(logits, row)] > 0


def test_numbers() -> None:
    numbers = np.array([number(state_of(start_of(seed), place), turn)
                        for seed in range(30) for place in range(30) for turn in range(4)], np.uint64)  # fmt: skip
    assert len(set(numbers.tolist())) == len(numbers)
    bits = np.unpackbits(numbers.view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 0.05 and stats.kstest(numbers / 2.0**64, "uniform").pvalue > LIKELY
    assert start_of(-1) == start_of((1 << 64) - 1)
    assert mixed(1) == 0x5692161D100B05E5 and mixed(0) == 0, "SplitMix64's finisher"


@settings(deadline=None, max_examples=30)
@given(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 20), st.integers(2, 1 << 31), st.floats(1e-6, 1), st.data())
def test_rows_hold_draws(seed: int, place: int, top_k: int, top_p: float, data: st.DataObject) -> None:
    wanted = draw_of(state_of(start_of(seed), place), data.draw(st.floats(1e-9, 50)), top_k, top_p, 0.3)
    assert Draw.read(wanted.packed()) == wanted
    begun = Draw(start_of(seed), wanted.pace, wanted.top_k, wanted.top_p, wanted.least).packed()
    assert (at_places(begun[None], np.array([place]))[0] == wanted.packed()).all()


def test_rows_are_drawn_alone() -> None:
    """The operator is its rows: other rows change nothing, nor does one that is no number."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((5, 700)).astype(np.float32) * 3
    logits[2, 9], logits[4] = np.nan, -np.inf
    parameters = [(0, None, 1, 0), (1, 5, 0.9, 0), (1, None, 1, 0), (0.5, None, 0.7, 0.1), (1, 9, 1, 0)]
    rows = np.stack([draw_of(state_of(start_of(8), n), *each).packed() for n, each in enumerate(parameters)])
    (together,) = meaning("Sample")(logits, rows)
    assert together.dtype == np.int32 and together[[2, 4]].tolist() == [-1, -1] and (together[[0, 1, 3]] >= 0).all()
    assert together.tolist() == [int(meaning("Sample")(logits[n : n + 1], rows[n : n + 1])[0][0]) for n in range(5)]


def test_types() -> None:
    logits, draws = TensorType("float32", ("R", 100)), TensorType("int32", ("R", DRAW))
    assert infer("Sample", [logits, draws], {}) == (TensorType("int32", ("R",)),)
    with pytest.raises(GraphError, match="a draw is 9 int32"):
        infer("Sample", [logits, TensorType("float32", ("R", DRAW))], {})
    half = draw_of(0, 1.0, None, 0.5, 0.5)
    assert (half.top_p, half.least) == (1 << 31, UNIT) and math.isclose(half.pace * math.log(2), UNIT, rel_tol=1e-7)


def test_edits_and_masks() -> None:
    logits = np.array([1.0, -1.0, 2.0, 3.0, 0.5], np.float32)
    edits = edits_of(np.array([1, 3, 0]), np.array([0.5, 0, 7]), np.array([2, 2, 1]), np.array([0, 1, np.inf]))
    assert adjusted(logits, edits).tolist() == [-np.inf, -1.0, 2.0, 0.5, 0.5] and logits[1] == -1
    mask = np.packbits([1, 0, 0, 1, 1] + [0] * 27, bitorder="little").view(np.int32)
    assert adjusted(logits, edits, mask).tolist() == [-np.inf, -np.inf, -np.inf, 0.5, 0.5]
    rows = np.stack(
        [replace(Draw(0, 0.0), edits=span, mask=m).packed() for span, m in (((0, 3), 1), ((2, 3), 0), ((0, 0), 2))]
    )
    masks = np.stack([mask, np.zeros(1, np.int32)])
    assert meaning("Sample")(np.stack([logits] * 3), rows, edits, masks)[0].tolist() == [3, 3, -1]

"""Likely's meaning: log-probabilities of the model, and its first tokens in order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.errors import GraphError
from ingot.ir.ops import TensorType, infer
from ingot.ir.ops_likely import LIKELY, MOST, likely, log_probabilities, tokens_of


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5000), st.sampled_from([0.1, 1.0, 8.0]), st.booleans(), st.integers(0, 1 << 30))
def test_log_probabilities(width: int, spread: float, equal: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((2, width)) * spread).astype(np.float32)
    logits = np.round(logits) if equal else logits
    logits[1, width // 2 + 1 :] = -np.inf
    chosen, told = rng.integers(0, width, 2).astype(np.int32), np.array([1, 0], np.int32)
    words = likely(logits, chosen, told)
    owns, others = log_probabilities(words)
    for place, row in enumerate(told):
        exact = logits[row].astype(np.float64)
        exact = exact - exact.max() - math.log(np.exp(exact - exact.max()).sum())
        assert owns[place] == pytest.approx(exact[chosen[row]], abs=3e-7) and others[place, 0] <= 0
        order = [int(token) for token in np.lexsort((np.arange(width), -exact)) if exact[token] > -np.inf][:MOST]
        assert tokens_of(words)[place].tolist() == order + [-1] * (MOST - len(order))
        np.testing.assert_allclose(others[place, : len(order)], exact[order], atol=3e-7)


def test_rows_without_an_answer() -> None:
    """A row -1, one without a token, those that are no numbers; others are told as if alone."""
    logits = np.zeros((5, 7), np.float32)
    logits[1, 3], logits[2, 3], logits[3] = np.nan, np.inf, -np.inf
    chosen, told = np.array([-1, 0, 0, 0, 2], np.int32), np.array([0, 1, 2, 3, -1, 4], np.int32)
    words = likely(logits, chosen, told)
    assert not words[:5].any() and (words[5] == likely(logits, chosen, told[5:])[0]).all()
    own, others = log_probabilities(words)
    assert np.isnan(own[:5]).all() and np.isnan(others[:5]).all()
    assert own[5] == pytest.approx(-math.log(7)) and tokens_of(words)[5, :8].tolist() == [*range(7), -1]


def test_types() -> None:
    logits, rows, told = TensorType("float32", ("R", 9)), TensorType("int32", ("R",)), TensorType("int32", ("L",))
    assert infer("Likely", [logits, rows, told], {}) == (TensorType("int32", ("L", LIKELY)),)
    with pytest.raises(GraphError, match="told is a row of int32"):
        infer("Likely", [logits, rows, TensorType("int64", ("L",))], {})

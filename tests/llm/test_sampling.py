"""Tokens from logits: what each parameter leaves, that draws are the request's own, and that their shares are right."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.errors import InputError
from ingot.llm.request import Sampling
from ingot.llm.sampling import Drawing, draw, logprobs_after

LOGITS = np.array([0.0, 3.0, 1.0, 2.0, -1.0], np.float32)
PROBABILITIES = np.exp(LOGITS - 3.0) / np.exp(LOGITS - 3.0).sum()


def drawing(seed: int = 0, prompt: tuple[int, ...] = (), ends: frozenset[int] = frozenset(), **asked: Any) -> Drawing:
    return Drawing(Sampling(**asked), seed, np.array(prompt, np.int64), ends)


def token(logits: Any, one: Drawing, mask: Any = None) -> int | None:
    return draw(np.asarray(logits, np.float32)[None], [(one, mask)])[0].token


def shares(count: int = 4000, **asked: Any) -> np.ndarray:
    """How often each token is drawn."""
    found = [token(LOGITS, drawing(seed, **asked)) for seed in range(count)]
    return np.bincount(np.array(found, np.int64), minlength=5) / count


def test_greedy() -> None:
    assert token(LOGITS, drawing(temperature=0)) == 1
    assert token([2.0, 5.0, 5.0], drawing(temperature=0)) == 1, "the first of equal ones"


def test_shares_are_the_probabilities() -> None:
    np.testing.assert_allclose(shares(), PROBABILITIES, atol=0.03)
    cooler = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    np.testing.assert_allclose(shares(temperature=0.5), cooler, atol=0.03)


def test_truncation() -> None:
    np.testing.assert_allclose(shares(top_k=2), [0, 0.731, 0, 0.269, 0], atol=0.03)
    assert (shares(400, top_p=0.7) > 0).tolist() == [False, True, False, True, False], "0.64 is not enough, 0.88 is"
    assert (shares(400, min_p=0.2) > 0).tolist() == [False, True, False, True, False]
    assert token(LOGITS, drawing(top_p=1e-9)) == 1 and token(LOGITS, drawing(min_p=1.0)) == 1
    assert token(LOGITS, drawing(temperature=1e-9)) == 1, "no overflow at a temperature of almost nothing"


def test_penalties_and_bias() -> None:
    one = drawing(temperature=0, frequency_penalty=1.5)
    found = []
    for _ in range(4):
        found.append(token(LOGITS, one))
        one.accept(found[-1] or 0)
    assert found == [1, 3, 1, 2]
    assert token(LOGITS, drawing(temperature=0, prompt=(1,), repetition_penalty=2.0)) == 3
    assert token([-1.0, -1.5], drawing(temperature=0, prompt=(0,), repetition_penalty=2.0)) == 1
    assert token(LOGITS, drawing(temperature=0, logit_bias={0: 50, 1: -100})) == 0


def test_min_tokens_keeps_ends_away() -> None:
    one = drawing(temperature=0, min_tokens=1, ends=frozenset({1}))
    assert token(LOGITS, one) == 3
    one.accept(3)
    assert token(LOGITS, one) == 1


def test_masks() -> None:
    mask = np.packbits([1, 0, 1, 0, 0] + [0] * 27, bitorder="little").view(np.int32)
    assert token(LOGITS, drawing(temperature=0), mask) == 2
    assert token(LOGITS, drawing(temperature=0), np.zeros(1, np.int32)) is None, "nothing is allowed"


def test_rows_that_are_no_numbers_fail_alone() -> None:
    rows = np.stack([LOGITS, LOGITS * np.float32("nan"), LOGITS, np.full(5, np.inf, np.float32)])
    drawn = draw(rows, [(drawing(temperature=0, logprobs=0), None)] * 4)
    assert [each.token for each in drawn] == [1, None, 1, None] and drawn[1].logprob is None
    assert draw(np.zeros((0, 5), np.float32), []) == []


def test_logprobs_are_those_of_the_model() -> None:
    found = draw(LOGITS[None], [(drawing(temperature=0, logprobs=2, logit_bias={0: 50}), None)])[0].logprob
    assert found is not None and found.token == 0
    np.testing.assert_allclose(found.logprob, np.log(PROBABILITIES[0]), rtol=1e-5)
    assert [each for each, _ in found.top] == [1, 3]
    assert logprobs_after(LOGITS[None], [1], 0)[0].top == ()


asked = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0, 0.3, 1.0, 2.0]),
        "top_k": st.none() | st.integers(1, 40),
        "top_p": st.sampled_from([0.2, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
    }
)


@settings(deadline=None, max_examples=50)
@given(st.lists(asked, min_size=2, max_size=6), st.integers(0, 1 << 30))
def test_a_request_draws_the_same_alone_and_among_others(requests: list[dict[str, Any]], seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((len(requests), 600)).astype(np.float32) * 3
    rows = [(drawing(seed + number, **each), None) for number, each in enumerate(requests)]
    together = draw(logits, rows)
    alone = [draw(logits[number : number + 1], rows[number : number + 1])[0] for number in range(len(rows))]
    assert together == alone


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.floats(0.01, 1.0), st.floats(0.0, 0.5), st.integers(0, 1 << 30))
def test_candidates_are_those_of_a_full_sort(top_k: int, top_p: float, min_p: float, seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal(300).astype(np.float32)
    order = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp(logits[order].astype(np.float64) - logits.max())
    kept = ((np.cumsum(weights) - weights) < top_p * weights.sum()) & (weights >= min_p)
    kept[0] = True
    for number in range(20):
        found = token(logits, drawing(seed + number, top_k=top_k, top_p=top_p, min_p=min_p))
        assert found in order[kept]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temperature": -1}, "temperature must be 0 to 100, it is -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0}, "top_p and repetition_penalty must be greater than 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"n": 3, "best_of": 2}, "best_of must be at least n"),
        ({"stop": ("",)}, "a stop string has 1 to"),
        ({"stop": ("a",) * 1000}, "at most 64 stop strings, there are 1000"),
        ({"logit_bias": {1: 1000}}, "logit_bias must be"),
        ({"max_tokens": -1}, "max_tokens must be at least 0"),
    ],
)
def test_what_cannot_be_asked(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**asked)

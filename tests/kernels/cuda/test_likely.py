"""Likely in Triton's interpreter gives the very words of its meaning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.ir.ops import meaning
from ingot.kernels.node import Node, Port
from tests.kernels.cuda.harness import check

Array = np.ndarray[Any, Any]


def same(logits: Array, chosen: list[int], told: list[int]) -> None:
    """Of a symbolic number of rows and of told ones."""
    inputs = [logits, np.array(chosen, np.int32), np.array(told, np.int32)]
    (words,) = meaning("Likely")(*inputs)
    ports = (Port("float32", ("R", logits.shape[1])), Port("int32", ("R",)), Port("int32", ("L",)))
    node = Node("Likely", ports, (Port("int32", ("L", words.shape[1])),), {}, name="under_test")
    check(node, inputs, [words], 0, 0, limit=2, symbols={"R": len(logits), "L": len(told)})


@settings(deadline=None, max_examples=4)
@given(st.integers(1, 4), st.sampled_from([1, 5, 20, 300, 2048, 5000]), st.sampled_from([0.1, 1.0, 6.0]),
       st.integers(0, 1 << 30))  # fmt: skip
def test_the_meaning_s_words(rows: int, width: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((rows, width)) * spread).astype(np.float32)
    if seed % 2:
        logits = np.round(logits)  # equal ones, zeros of both signs
    if seed % 3 == 0:
        logits[:, width // 2 + 1 :] = -np.inf
    told = rng.integers(-1, rows, 3).tolist()
    same(logits, rng.integers(-1, width, rows).tolist(), told)


@pytest.mark.parametrize("told", [12, 130])
def test_many_rows(told: int) -> None:
    """Each range of sizes; most rows are told nothing of, which is quick."""
    logits = np.random.default_rng(told).standard_normal((told, 2100)).astype(np.float32) * 3
    rows = [place if place % (told // 3) == 2 else -1 for place in range(told)]
    same(logits, list(range(told)), rows[::-1])


def test_rows_that_are_no_numbers() -> None:
    logits = np.random.default_rng(1).standard_normal((4, 300)).astype(np.float32)
    logits[0, 7], logits[1, 5], logits[2] = np.nan, np.inf, -np.inf
    same(logits, [1, 1, 1, 1], [0, 1, 2, 3])


def test_a_vocabulary() -> None:
    logits = np.random.default_rng(5).standard_normal((2, 70000)).astype(np.float32)
    logits[1, 3::2048] += 9  # all of the first ones in one lane
    same(logits, [69999, 0], [1, 0])

"""Sample in Triton's interpreter draws the very tokens that its meaning draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.dtypes import numpy_dtype
from ingot.ir.ops import meaning
from ingot.ir.ops_sample import DRAW, draw_of, edits_of, start_of, state_of
from ingot.kernels.node import Node, Port
from tests.kernels.cuda.test_paged import checked

Array = np.ndarray[Any, Any]
draws = st.tuples(
    st.sampled_from([0.0, 1e-9, 0.3, 0.7, 1.0, 5.0]), st.none() | st.integers(1, 3000),
    st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)  # fmt: skip


def rows_of(parameters: list[Any], seed: int) -> Array:
    return np.stack([draw_of(state_of(start_of(seed), n), *each).packed() for n, each in enumerate(parameters)])


@settings(deadline=None, max_examples=12)
@given(st.lists(draws, min_size=1, max_size=5), st.sampled_from([5, 300, 2048, 5000]), st.sampled_from([0.1, 1.0, 6.0]),
       st.integers(0, 1 << 30))  # fmt: skip
def test_the_meaning_s_tokens(parameters: list[Any], width: int, spread: float, seed: int) -> None:
    logits = (np.random.default_rng(seed).standard_normal((len(parameters), width)) * spread).astype(np.float32)
    if seed % 2:
        logits = np.round(logits)  # equal ones
    if seed % 3 == 0:
        logits[:, width // 2 :] = -np.inf
    checked("Sample", [logits, rows_of(parameters, seed)], {}, {0: "T", 1: "T"}, within=0)


@pytest.mark.parametrize(("rows", "width", "edited"), [(3, 300, True), (12, 2100, True), (3, 5000, False)])
def test_edits_and_masks(rows: int, width: int, edited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are as they were when the tokens are there."""
    rng = np.random.default_rng(rows * width)
    logits = rng.standard_normal((rows, width)).astype(np.float32) * 2
    draws_RD, many = rows_of([(0.8, 20, 0.9, 0.0), (0.0, None, 1.0, 0.0), (1.0, None, 1.0, 0.0)] * rows, 3)[:rows], 299
    masks = np.packbits(rng.random((2, -(-width // 32) * 32)) < 0.5, axis=1, bitorder="little").view(np.int32)
    draws_RD[:, 8] = np.arange(rows) % 3
    edits = []
    for row in range(0 if edited else rows, rows):
        count = many if row == 1 else 3 * (row % 2)
        taken = np.where(rng.random(count) < 0.2, np.inf, rng.standard_normal(count))
        parts = rng.permutation(width)[:count], rng.standard_normal(count) * 3, rng.uniform(0.5, 2, count), taken
        draws_RD[row, 6:8] = sum(map(len, edits)), sum(map(len, edits)) + count
        edits.append(edits_of(*parts))
    given = [logits, draws_RD, np.concatenate(edits) if edits else None, masks]
    unmasked = [*given[:3]] if rows == 12 else given
    if rows == 12:
        draws_RD[:, 8] = 0
    from tests.kernels.cuda import harness

    held, copy = list[Array](), harness._copy
    monkeypatch.setattr(harness, "_copy", lambda x: held.append(copy(x)) or held[-1])  # type: ignore[func-returns-value]
    checked("Sample", unmasked, {}, {0: "T", 1: "T"}, within=0)
    assert (held[0] == logits).all()


@pytest.mark.parametrize("rows", [3, 130])
def test_rows_that_are_no_numbers(rows: int) -> None:
    logits = np.random.default_rng(rows).integers(-40, 40, (rows, 300)).astype(np.float32)
    logits[0, 7], logits[1, 5], logits[2] = np.nan, np.inf, -np.inf
    parameters = [(0.7, 40, 0.9, 0.0) if n % 20 == 3 else (0.0, None, 1.0, 0.0) for n in range(rows)]
    checked("Sample", [logits, rows_of(parameters, rows)], {}, {0: "T", 1: "T"}, within=0)


def test_a_vocabulary() -> None:
    """Many tokens of a lane; top_k in lanes that are looked at some at a time; several attempts."""
    logits = np.random.default_rng(5).standard_normal((2, 70000)).astype(np.float32)
    rows = rows_of([(1.0, 900, 0.3, 0.0), (1.0, None, 0.2, 0.01)], 5)
    checked("Sample", [logits, rows], {}, {0: "T", 1: "T"}, within=0)


def undrawn(logits: Array, draws: Array | None = None) -> None:
    """As an engine has it: as many draws as rows, or none at all."""
    from tests.kernels.cuda.harness import check

    draws = np.zeros((0, DRAW), np.int32) if draws is None else draws
    expected = meaning("Sample")(logits, draws)
    ports = Port(logits.dtype.name, ("R", logits.shape[1])), Port("int32", ("Q", DRAW))
    node = Node("Sample", ports, (Port("int32", ("R",)),), name="under_test")
    check(node, [logits, draws], expected, 0, 0, symbols={"R": len(logits), "Q": len(draws)})


@settings(deadline=None, max_examples=12)
@given(st.sampled_from([1, 2, 8, 9, 130]), st.sampled_from([1, 5, 300, 2048, 2049, 6000]), st.integers(0, 1 << 30))
def test_without_draws_the_likeliest(rows: int, width: int, seed: int) -> None:
    """Of equal ones the first, zeros of both signs being equal; no token where the first is no number."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((rows, width)) * 3).astype(np.float32)
    if seed % 2:
        logits = np.copysign(np.floor(np.maximum(logits, 0) * (seed % 4 > 1)), -rng.random(logits.shape))
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        logits[rng.random(logits.shape) < 0.1 / width] = value
    if seed % 3 == 0:
        logits[-1] = -np.inf
    undrawn(logits.astype(np.float32))
    undrawn(logits.astype(np.float32), rows_of([(0.0, None, 1.0, 0.0)] * rows, seed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_likeliest_of_a_vocabulary(dtype: str) -> None:
    """In each of many blocks, the first of two that are equal."""
    logits = np.random.default_rng(5).standard_normal((4, 33000)).astype(numpy_dtype(dtype))
    for row, places in enumerate(((32999, 32998), (2047, 2048), (0, 32999), (16384, 20000))):
        logits[row, list(places)] = 9
    undrawn(logits)

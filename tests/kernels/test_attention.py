"""Attention kernels against numpy: shared heads, masks of every shape, causal, softcap, dtypes, run-time extents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.ir.ops import meaning
from ingot.kernels import candidates
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node, Port
from tests.kernels.harness import check, isas, node_of
from tests.kernels.test_linear import FEW, drawn, tolerance

Array = np.ndarray[Any, Any]


def operands(heads: tuple[int, int], queries: int, keys: int, depth: int, width: int, dtype: str = "float32",
             batch: int = 2) -> list[Array]:  # fmt: skip
    query = drawn(1, (batch, heads[0], queries, depth), dtype)
    return [query, drawn(2, (batch, heads[1], keys, depth), dtype), drawn(3, (batch, heads[1], keys, width), dtype)]


def run(inputs: list[Array], limit: int = 2, **attributes: Any) -> None:
    given = {"scale": 0.3, "causal": 0, "softcap": 0.0, **attributes}
    node, expected = node_of("Attention", inputs, given)
    allowed = tolerance(expected[0].dtype.name)
    check(node, inputs, expected, rtol=allowed, atol=allowed, limit=limit)


def drawn_mask(shape: tuple[int, ...], dtype: str) -> Array:
    rng = np.random.default_rng(5)
    if dtype == "bool":
        return np.asarray(rng.random(shape) < 0.7)
    mask = drawn(6, shape, dtype)
    mask[rng.random(shape) < 0.3] = -np.inf
    return mask


@FEW
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_float32(queries: int, keys: int, depth: int, width: int, causal: bool) -> None:
    run(operands((2, 2), queries, keys, depth, width), limit=3, causal=int(causal))


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (6, 2)])
@pytest.mark.parametrize("queries", [1, 7, 20])
@pytest.mark.parametrize("causal", [0, 1])
def test_shared_heads(heads: tuple[int, int], queries: int, causal: int) -> None:
    run(operands(heads, queries, 23, 16, 16), causal=causal)


@pytest.mark.parametrize("keys", [300, 517])
@pytest.mark.parametrize("causal", [0, 1])
def test_keys_in_blocks(keys: int, causal: int) -> None:
    run(operands((2, 1), 37, keys, 24, 40), limit=3, causal=causal)


@pytest.mark.parametrize("queries, keys", [(5, 3), (300, 40)])
def test_causal_queries_that_see_nothing(queries: int, keys: int) -> None:
    run(operands((2, 2), queries, keys, 8, 8), causal=1)


MASKS = [(1, 1, 1, 21), (2, 1, 1, 21), (2, 4, 1, 21), (1, 1, 18, 21), (2, 1, 18, 21), (2, 4, 18, 21), (18, 21), (21,),
         (2, 4, 18, 1), (1, 1, 1, 1)]  # fmt: skip


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_masks(shape: tuple[int, ...], dtype: str) -> None:
    for groups in (4, 2):
        run([*operands((4, groups), 18, 21, 12, 16), drawn_mask(shape, dtype)], limit=1)


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_mask_with_blocks_and_causal(dtype: str) -> None:
    run([*operands((2, 2), 50, 300, 12, 16), drawn_mask((2, 2, 50, 300), dtype)], causal=1)
    run([*operands((2, 1), 50, 300, 12, 16), drawn_mask((2, 1, 1, 300), dtype)], softcap=2.5)


def test_rows_masked_completely_are_zero() -> None:
    mask = np.ones((1, 1, 9, 30), bool)
    mask[..., 4, :] = False
    run([*operands((2, 2), 9, 30, 8, 8), mask])
    run([*operands((2, 2), 9, 30, 8, 8), np.where(mask, 0, -np.inf).astype(np.float32)])


def test_large_scores_do_not_overflow() -> None:
    query, key, value = operands((1, 1), 20, 200, 8, 8)
    run([query * 100, key * 100, value], scale=1.0)
    run([query * 100, key * 100, value], scale=1.0, softcap=30.0)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("causal", [0, 1])
def test_dtypes(dtype: str, causal: int) -> None:
    run([*operands((4, 2), 19, 21, 20, 17, dtype), drawn_mask((1, 1, 19, 21), dtype)], causal=causal)
    run([*operands((4, 2), 19, 150, 20, 17, dtype), drawn_mask((1, 1, 1, 150), "bool")], causal=causal)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_extents(sizes: tuple[int, int, int]) -> None:
    batch, queries, keys = sizes
    run(operands((2, 1), queries, keys, 8, 8, batch=batch))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 40), (1, 3, 13), (2, 20, 20), (1, 33, 300), (1, 5, 0)])
@pytest.mark.parametrize("causal", [0, 1])
def test_extents_known_at_run_time(sizes: tuple[int, int, int], causal: int) -> None:
    batch, queries, keys = sizes
    inputs = [*operands((4, 2), queries, keys, 16, 16, batch=batch), drawn_mask((batch, 1, 1, keys), "float32")]
    attributes = {"scale": 0.25, "causal": causal, "softcap": 0.0}
    (expected,) = meaning("Attention")(*inputs, **attributes)
    shapes = (("B", 4, "S", 16), ("B", 2, "T", 16), ("B", 2, "T", 16), ("B", 1, 1, "T"))
    ports = tuple(Port("float32", shape) for shape in shapes)
    node = Node("Attention", ports, (Port("float32", ("B", 4, "S", 16)),), attributes)
    for isa in isas():
        for candidate in [*candidates(node, "cpu", isa)][::2]:
            alone = Standalone(node, candidate, isa, dict(zip("BST", sizes, strict=True)), level=1)
            np.testing.assert_allclose(alone(*inputs, chunks=2)[0], expected, rtol=1e-4, atol=1e-5)

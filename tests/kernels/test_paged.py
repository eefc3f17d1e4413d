"""CacheUpdate and PagedAttention against their meanings: drawn heads, groups, sizes, lengths, windows, paddings."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.ir.ops import meaning
from ingot.ir.ops_paged import line_of
from ingot.kernels import candidates
from ingot.kernels.cpu.isa import AVX2
from ingot.kernels.cpu.standalone import Standalone
from tests.kernels.harness import check, isas, node_of

Array = np.ndarray[Any, Any]
BLOCK = 16
FORMATS = {"float32": (np.float32, 1e-4), "bfloat16": (ml_dtypes.bfloat16, 2e-2)}


def drawn(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def pool_of(rng: np.random.Generator, blocks: int, groups: int, depth: int, dtype: Any) -> Array:
    return drawn(rng, blocks, 2, groups, BLOCK * depth).astype(dtype)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31), st.sampled_from([(1, 1), (4, 2), (6, 1)]), st.sampled_from([8, 24, 64]), st.integers(0, 6),
    st.booleans(), st.booleans(), st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_cache_update(seed: int, heads: tuple[int, int], depth: int, tokens: int, turned: bool, normalised: bool,
                      kept: str) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    count, groups = heads
    dtype, tolerance = FORMATS[kept]
    half = depth // 2 if seed % 2 else depth // 4
    angles = rng.random((20, half)).astype(np.float32)
    places = rng.permutation(5 * BLOCK)[:tokens].astype(np.int32)
    positions = rng.integers(-1, 20, tokens).astype(np.int32)
    inputs = [
        pool_of(rng, 5, groups, depth, dtype), drawn(rng, tokens, (count + 2 * groups) * depth), positions, places,
        np.cos(angles) if turned else None, np.sin(angles) if turned else None,
        drawn(rng, depth) if normalised else None, drawn(rng, depth) if normalised else None,
    ]  # fmt: skip
    node, expected = node_of("CacheUpdate", inputs, {"heads": count, "groups": groups, "epsilon": 1e-6}, constants=(4,))
    check(node, inputs, expected, rtol=tolerance, atol=tolerance)


def sequences(rng: np.random.Generator, lengths: list[tuple[int, int]]) -> tuple[Array, Array, Array]:
    """positions, owners and tables of sequences of (context, tokens in this step); one padding token at the end."""
    positions = [np.arange(context - tokens, context) for context, tokens in lengths]
    owners = [np.full(tokens, number) for number, (_, tokens) in enumerate(lengths)]
    width = max(-(-context // BLOCK) for context, _ in lengths)
    blocks = rng.permutation(len(lengths) * width).reshape(len(lengths), width)
    whole = np.concatenate([*positions, [-1]]), np.concatenate([*owners, [0]]), blocks
    return tuple(x.astype(np.int32) for x in whole)  # type: ignore[return-value]


@settings(max_examples=14, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31), st.sampled_from([(1, 1), (4, 2), (3, 1), (20, 1)]), st.sampled_from([8, 24, 64, 80]),
    st.lists(st.sampled_from([(1, 1), (16, 1), (17, 5), (40, 40), (300, 1), (150, 18)]), min_size=1, max_size=4),
    st.sampled_from([0, 1, 20, 200]), st.sampled_from([0.0, 5.0]), st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_paged_attention(seed: int, heads: tuple[int, int], depth: int, lengths: list[tuple[int, int]], window: int,
                         softcap: float, kept: str) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    positions, owners, tables = sequences(rng, lengths)
    pool = pool_of(rng, tables.size, heads[1], depth, FORMATS[kept][0])
    forget_what_is_not_there(pool, lengths, tables, depth, window)
    query = drawn(rng, len(positions), heads[0], depth)
    inputs = [query, pool, positions, owners, tables]
    attributes = {"scale": depth**-0.5, "window": window, "softcap": softcap}
    node, expected = node_of("PagedAttention", inputs, attributes)
    assert np.isfinite(expected[0]).all() and not expected[0][-1].any()
    if depth % 16 == 0 or kept == "float32":
        check(node, inputs, expected, rtol=1e-3, atol=1e-4)


def forget_what_is_not_there(pool: Array, lengths: list[tuple[int, int]], tables: Array, depth: int,
                             window: int = 0) -> None:  # fmt: skip
    """NaN where no token has been, and in blocks that have left the window, which may be another's by now: a kernel
    that reads it there is found out."""
    used = np.zeros((len(pool), BLOCK), bool)
    for number, (context, tokens) in enumerate(lengths):
        gone = max(context - tokens + 1 - window, 0) // BLOCK * BLOCK if window else 0
        places = np.arange(gone, context)
        used[tables[number][places // BLOCK], places % BLOCK] = True
    groups = pool.shape[2]
    keys, values = pool[:, 0].reshape(-1, groups, depth, BLOCK), pool[:, 1].reshape(-1, groups, BLOCK, depth)
    pool[:, 0] = np.where(used[:, None, None, :], keys, np.nan).reshape(pool[:, 0].shape)
    pool[:, 1] = np.where(used[:, None, :, None], values, np.nan).reshape(pool[:, 1].shape)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from([8, 16, 64, 80]),
    st.lists(st.sampled_from([(1, 1), (17, 17), (40, 40), (150, 150)]), min_size=1, max_size=3),
    st.sampled_from([0, 20]), st.booleans(),
)  # fmt: skip
def test_a_cache_of_integers(seed: int, heads: tuple[int, int], depth: int, lengths: list[tuple[int, int]], window: int,
                             turned: bool) -> None:  # fmt: skip
    """Written by the kernel near what the meaning writes, read as the meaning reads it, and near the same in floats."""
    rng = np.random.default_rng(seed)
    positions, owners, tables = sequences(rng, lengths)
    slots = np.where(positions < 0, -1, tables[owners, positions // BLOCK] * BLOCK + positions % BLOCK)
    angles = rng.random((200, depth // 2)).astype(np.float32)
    tables_of_angles = [np.cos(angles), np.sin(angles)] if turned else [None, None]
    projected = drawn(rng, len(positions), (heads[0] + 2 * heads[1]) * depth)
    projected[0] = 0
    shape = tables.size, 2, heads[1]
    pools = np.zeros((*shape, line_of(BLOCK, depth, "int8")), np.int8), np.zeros((*shape, BLOCK * depth), np.float32)
    attributes = {"heads": heads[0], "groups": heads[1], "epsilon": 1e-6}
    reading = {"scale": depth**-0.5, "window": window, "softcap": 0.0}
    given = [projected, positions, slots.astype(np.int32), *tables_of_angles]
    update, expected = node_of("CacheUpdate", [pools[0], *given], attributes)
    floats, query = meaning("CacheUpdate")(pools[1], *given, None, None, **attributes)
    wanted = meaning("PagedAttention")(query, floats, positions, owners, tables, **reading)
    for isa in isas():
        if isa is AVX2 and depth % 8:
            continue
        (writer, *_), (reader, *_) = (
            [*candidates(node, "cpu", isa)]
            for node in (update, node_of("PagedAttention", [query, expected[0], positions, owners, tables], reading)[0])
        )
        written = Standalone(update, writer, isa, level=1)(pools[0], *(x for x in given if x is not None))[0]
        assert np.abs(written[..., : BLOCK * depth].astype(int) - expected[0][..., : BLOCK * depth]).max() <= 1
        scales = [np.ascontiguousarray(x[..., BLOCK * depth :]).view(np.float32) for x in (written, expected[0])]
        assert np.allclose(*scales, rtol=1e-5, atol=0)
        node, meant = node_of("PagedAttention", [query, written, positions, owners, tables], reading)
        found = Standalone(node, reader, isa, level=1)(query, written, positions, owners, tables)[0]
        assert np.allclose(found, meant[0], rtol=1e-3, atol=1e-4)
        assert np.abs(found - wanted).max() < 0.06


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("heads, window", [((8, 2), 0), ((8, 2), 20), ((20, 1), 0), ((2, 2), 0)])
def test_a_row_does_not_depend_on_its_company(kept: str, heads: tuple[int, int], window: int) -> None:
    """Bit for bit: a prompt in one piece, in chunks, token by token, and beside other sequences."""
    rng = np.random.default_rng(3)
    lengths = [(350, 350), (33, 1), (20, 20)]
    positions, owners, tables = sequences(rng, lengths)
    pool, query = kept_pool(rng, tables.size, heads[1], kept), drawn(rng, len(positions), heads[0], 64)

    def run(rows: slice) -> Array:
        inputs = [np.ascontiguousarray(x[rows]) for x in (query, positions, owners)]
        feeds = [inputs[0], pool, inputs[1], inputs[2], tables]
        node, _ = node_of("PagedAttention", feeds, {"scale": 0.125, "window": window})
        candidate = next(candidates(node, "cpu", isas()[0]))
        return Standalone(node, candidate, isas()[0], level=1)(*feeds)[0]

    together = run(slice(0, len(positions)))
    for begin, end in ((0, 1), (349, 350), (37, 90), (300, 350), (350, 351), (351, 371), (345, 360)):
        assert np.array_equal(together[begin:end], run(slice(begin, end))), (begin, end)


def kept_pool(rng: np.random.Generator, blocks: int, groups: int, kept: str, depth: int = 64) -> Array:
    """A pool of a type; bytes have scales that differ."""
    if kept != "int8":
        return pool_of(rng, blocks, groups, depth, FORMATS[kept][0])
    pool = rng.integers(-127, 128, (blocks, 2, groups, line_of(BLOCK, depth, kept))).astype(np.int8)
    scales = np.ascontiguousarray(rng.uniform(0.005, 0.02, (*pool.shape[:3], BLOCK)), np.float32)
    pool[..., BLOCK * depth :] = scales.view(np.int8)
    return pool


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_tiles_and_vectors_agree(kept: str) -> None:
    """Scores up to 80, of which most weigh nothing, and one that is no number. Tiles keep 16 bits of queries: scores
    are within 2^-16 of the magnitudes multiplied, some 100."""
    if not isas()[0].has("amx_bf16"):
        pytest.skip("this machine has no tile registers")
    rng = np.random.default_rng(5)
    positions, owners, tables = sequences(rng, [(270, 270), (5, 5)])
    pool, query = kept_pool(rng, tables.size, 2, kept), 20 * drawn(rng, len(positions), 8, 64)
    query[7, 3, 11] = np.nan
    feeds = [query, pool, positions, owners, tables]
    node, expected = node_of("PagedAttention", feeds, {"scale": 0.125})
    found = []
    for isa, name in ((isas()[0], "paged_attention_tiles"), (AVX2, "paged_attention")):
        (candidate,) = candidates(node, "cpu", isa)
        assert candidate.kernel.name == name
        found.append(Standalone(node, candidate, isa, level=1)(*feeds)[0])
        assert np.isnan(found[-1][7, 3]).all() and np.isfinite(np.delete(found[-1], 7, axis=0)).all()
        assert np.isfinite(np.delete(found[-1][7], 3, axis=0)).all()
    for result, most in zip(found, (100 * 2**-16, 1e-4), strict=True):
        assert np.allclose(result, expected[0], rtol=0, atol=2 * most, equal_nan=True)

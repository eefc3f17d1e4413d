"""CachedAttention: one token in one launch, more as CacheUpdate and PagedAttention have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.dtypes import numpy_dtype
from ingot.ir.ops import meaning
from ingot.kernels import candidates
from ingot.kernels.cpu.workers import WorkerPool
from ingot.kernels.cuda import cached_attention as cached
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.build import Call, CudaBuilder
from ingot.kernels.cuda.compile import Cubin, beside
from ingot.kernels.cuda.paged_attention import attend
from ingot.kernels.cuda.paged_update import cache_update
from ingot.kernels.node import Node, Port
from ingot.plan.extent import evaluate
from tests.kernels.cuda import harness
from tests.kernels.cuda.test_paged import BLOCK, TABLE, batch, spoil

Array = np.ndarray[Any, Any]
GROUPS, TOKEN, SYMBOLIC = 2, 1, (1, 2, 3, 4)
CASES = [("float32", 4, 32, 16, 0, 0.0), ("bfloat16", 6, 24, 8, 70, 5.0), ("bfloat16", 4, 16, 0, 0, 0.0),
         ("float16", 2, 80, 40, 33, 0.0), ("float32", 2, 256, 128, 20, 0.0)]  # fmt: skip


def drawn(rng: np.random.Generator, dtype: str, heads: int, depth: int, half: int, window: int,
          before: list[tuple[int, int]]) -> list[Array | None]:  # fmt: skip
    """Inputs; the pool has what earlier steps left and is still seen, and no number elsewhere."""
    kind = numpy_dtype(dtype)
    positions, owners, tables = batch(rng, before, 0)
    slots = tables[owners, positions // BLOCK] * BLOCK + positions % BLOCK
    projected = rng.standard_normal((len(positions), (heads + 2 * GROUPS) * depth)).astype(kind)
    cache = rng.standard_normal((tables.size, 2, GROUPS, BLOCK * depth)).astype(kind)
    for owner in range(len(tables)):
        first = int(positions[owners == owner].min())
        last = np.arange(max(first - 1, 0), first)
        spoil(cache, last, np.zeros_like(last), tables[owner : owner + 1], depth, window)
    angles = [rng.standard_normal((TABLE * BLOCK, half)).astype(np.float32) if half else None for _ in range(2)]
    return [cache, projected, positions, slots.astype(np.int32), owners, tables, *angles]


def stated(heads: int, depth: int, window: int = 0, softcap: float = 0.0) -> dict[str, Any]:
    """Attributes."""
    return {"heads": heads, "groups": GROUPS, "epsilon": 1e-5, "scale": depth**-0.5, "window": window,
            "softcap": softcap, "early": 1}  # fmt: skip


def node_of(inputs: list[Array | None], results: tuple[Array, Array], attributes: dict[str, Any],
            tokens: str | int = "T") -> Node:  # fmt: skip
    """Of so many tokens."""
    ports = tuple(None if x is None else Port(x.dtype.name, (tokens if k in SYMBOLIC else x.shape[0], *x.shape[1:]),
                                              x if k > 5 else None) for k, x in enumerate(inputs))  # fmt: skip
    pool, seen = results
    outputs = (Port(pool.dtype.name, pool.shape), Port(seen.dtype.name, (tokens, *seen.shape[1:])))
    return Node("CachedAttention", ports, outputs, attributes, name="under_test")


def made(node: Node, name: str = "sm_90") -> CudaBuilder:
    """Its launches, by the only kernel that there is."""
    target = architecture(name)
    (candidate,) = candidates(node, "cuda", target)
    build = CudaBuilder(node, target)
    candidate.kernel.generate(build, node)
    return build


def compared(node: Node, inputs: list[Array | None], results: tuple[Array, Array], within: float) -> None:
    """Beside the meaning."""
    pool, seen = results
    held, found = harness.interpreted(made(node), inputs, {"T": len(seen)})
    np.testing.assert_allclose(found.astype(np.float64), seen.astype(np.float64), rtol=within, atol=within)
    assert np.array_equal(np.isnan(held), np.isnan(pool))
    np.testing.assert_allclose(held.astype(np.float64), pool.astype(np.float64), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("before", [[(0, 1)], [(37, 1)], [(63, 1)], [(64, 1)], [(7 * BLOCK + 9, 1)], [(5, 1), (70, 3)],
                                    [(0, 1), (40, 1)]])  # fmt: skip
@pytest.mark.parametrize(("dtype", "heads", "depth", "half", "window", "softcap"), CASES)
def test_it_is_update_and_attention(dtype: str, heads: int, depth: int, half: int, window: int, softcap: float,
                                    before: list[tuple[int, int]]) -> None:  # fmt: skip
    inputs = drawn(np.random.default_rng(len(before) + depth), dtype, heads, depth, half, window, before)
    attributes = stated(heads, depth, window, softcap)
    results = meaning("CachedAttention")(*inputs, **attributes)
    compared(node_of(inputs, results, attributes), inputs, results, 1e-4 if dtype == "float32" else 3e-2)


@pytest.mark.parametrize(("parts", "sums"), [(1, 1), (2, 1), (2, 512)])
@pytest.mark.parametrize("before", [7 * BLOCK + 9, 64, 63, 65])
@pytest.mark.parametrize(("dtype", "heads", "depth", "half", "window", "softcap"), CASES[:2])
def test_parts_of_several_steps(dtype: str, heads: int, depth: int, half: int, window: int, softcap: float, before: int,
                                parts: int, sums: int, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(cached, "_PARTS", parts)
    monkeypatch.setattr(cached, "_SUMS", sums)
    test_it_is_update_and_attention(dtype, heads, depth, half, window, softcap, [(before, 1)])


@pytest.mark.parametrize("part", ["slot", "position"])
def test_a_token_that_goes_nowhere(part: str) -> None:
    """Whose slot is none writes nothing; padding sees nothing either, and gives 0."""
    inputs = drawn(np.random.default_rng(3), "float32", 4, 32, 16, 0, [(37, 1)])
    attributes = stated(4, 32)
    if part == "position":
        inputs[2] = np.array([-1], np.int32)
    else:
        pool, _ = meaning("CachedAttention")(*inputs, **attributes)
        inputs[0], inputs[3] = pool, np.array([-1], np.int32)
    pool, seen = meaning("CachedAttention")(*inputs, **attributes)
    assert np.array_equal(pool, inputs[0], equal_nan=True) and seen.any() == (part == "slot")
    compared(node_of(inputs, (pool, seen), attributes, 1), inputs, (pool, seen), 1e-4)


def test_more_tokens_have_the_launches_of_both() -> None:
    """Text by text; a step of one token has one launch, which lets the launch behind begin at once."""
    inputs = drawn(np.random.default_rng(0), "bfloat16", 4, 16, 8, 0, [(3, 1)])
    results = meaning("CachedAttention")(*inputs, **stated(4, 16))
    node = node_of(inputs, results, stated(4, 16))
    update, attention = cached._halves(node)
    apart = [CudaBuilder(half, architecture("sm_90")) for half in (update, attention)]
    cache_update(apart[0], update)
    attend(apart[1], attention, 2)
    first, *rest = made(node).launches
    wanted = [call for build in apart for call in build.launches]
    assert [_named(call) for call in rest] == [_named(call) for call in wanted]
    assert first.unit.beside and len(rest) == 5
    assert len(made(node_of(inputs, results, stated(4, 16), 1)).launches) == 1
    assert [0 in [evaluate(e, {"T": 1}) for e in call.grid] for call in [first, *rest]] == [False, *[True] * len(rest)]
    assert 0 in [evaluate(e, {"T": 2}) for e in first.grid]


def _named(call: Call) -> str:
    """The text, its operands by their places."""
    text = call.unit.text
    for number, handle in enumerate(call.handles):
        text = text.replace(handle.name, f"operand_{number}")
    return text


@pytest.mark.parametrize(("dtype", "size"), [("float8_e4m3fn", BLOCK), ("int8", BLOCK), ("bfloat16", 64)])
def test_other_pools_have_no_launch(dtype: str, size: int) -> None:
    """Of eight bits, or blocks of more keys than a step has."""
    inputs = drawn(np.random.default_rng(0), "bfloat16", 4, 16, 8, 0, [(3, 1)])
    node = node_of(inputs, meaning("CachedAttention")(*inputs, **stated(4, 16)), stated(4, 16))
    assert list(candidates(node, "cuda", architecture("sm_90")))
    pool = Port(dtype, (8, 2, GROUPS, size * 16))
    other = replace(node, inputs=(pool, *node.inputs[1:]), outputs=(pool, node.outputs[1]))
    assert not list(candidates(other, "cuda", architecture("sm_90")))


def compiled(dtype: str, heads: int, groups: int, depth: int, name: str) -> tuple[Call, Cubin]:
    """The launch for one token, in a child: what interprets here would not compile."""
    cache, facts = Port(dtype, ("P", 2, groups, BLOCK * depth)), Port("int32", (1,))
    angles = Port("float32", (64, depth // 2), np.zeros((64, depth // 2), np.float32))
    ports = (cache, Port(dtype, (1, (heads + 2 * groups) * depth)), facts, facts, facts, Port("int32", ("S", "W")))
    node = Node("CachedAttention", (*ports, angles, angles), (cache, Port(dtype, (1, heads, depth))),
                stated(heads, depth) | {"groups": groups}, name="under_test")  # fmt: skip
    (call,) = made(node, name).launches
    with WorkerPool(1) as pool:
        return call, pool.submit("ingot.kernels.cuda.compile:compile_unit", call.unit, name).result()


@pytest.mark.parametrize(("heads", "depth"), [(32, 64), (32, 128), (64, 128)])
def test_there_is_room_for_a_ring_beside_it(heads: int, depth: int, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The largest has 512 threads of 64 registers, and leaves 104 KB of shared memory."""
    monkeypatch.setenv("INGOT_CACHE", str(tmp_path))
    call, found = compiled("bfloat16", heads, 8, depth, "sm_90")
    assert beside(call.unit, 90)
    assert found.spilled == 0 and found.shared <= (12 << 10 if heads == 32 else 16 << 10)
    assert found.threads * found.registers + 512 * 64 <= 1 << 16


@pytest.mark.parametrize(("dtype", "heads", "groups", "depth"), [
    ("bfloat16", 8, 1, 256), ("bfloat16", 128, 8, 128), ("float32", 16, 8, 256), ("float32", 32, 8, 128),
])  # fmt: skip
def test_deep_and_many_heads_fit(dtype: str, heads: int, groups: int, depth: int, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The shared memory of every kind of GPU, and registers but for some hundred bytes of the largest."""
    monkeypatch.setenv("INGOT_CACHE", str(tmp_path))
    _, found = compiled(dtype, heads, groups, depth, "sm_120")
    assert found.shared <= architecture("sm_120").shared and found.spilled < 1 << 10

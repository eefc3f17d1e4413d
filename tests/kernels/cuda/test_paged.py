"""Projection, CacheUpdate and PagedAttention as language models have them: sizes that only a run knows, mixtures of
prompts and answers, blocks in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ingot.dtypes import numpy_dtype
from ingot.ir.expression import parse
from ingot.ir.ops import meaning
from ingot.kernels.node import Node, Port

Array = np.ndarray[Any, Any]
BLOCK, TABLE = 16, 8
GATED = "Sigmoid %0 -> float32; Mul $0 %0 -> float32; Mul $1 %1 -> float32; Mul $2 %2 -> float32"
JOINED = "Cast %1 -> float32; Add %0 $0 -> float32; Cast $1 -> bfloat16"


def checked(op: str, inputs: Sequence[Array | None], attributes: Mapping[str, Any], symbolic: Mapping[int, str],
            constants: Sequence[int] = (), within: float = 1e-4,
            meant: Sequence[Array | None] | None = None) -> None:  # fmt: skip
    """The kernel, made for a first axis called T where `symbolic` says so, against the operator's meaning (of `meant`
    in the place of the inputs)."""
    from tests.kernels.cuda.harness import check

    expected = [np.asarray(y) for y in meaning(op)(*(meant or inputs), **attributes)]
    ports = [None if x is None else Port(x.dtype.name, (symbolic.get(i, x.shape[0]), *x.shape[1:]),
                                         x if i in constants else None) for i, x in enumerate(inputs)]  # fmt: skip
    tokens = inputs[1].shape[0] if op == "CacheUpdate" and inputs[1] is not None else len(expected[0])
    outputs = [Port(y.dtype.name, ("T" if len(y) == tokens and symbolic else len(y), *y.shape[1:])) for y in expected]
    text = attributes.get("expression", "")
    node = Node(op, tuple(ports), tuple(outputs), dict(attributes), parse(text), name="under_test")
    check(node, inputs, expected, within, within, limit=2, symbols={"T": tokens})


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(("kept", "dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"),
                                             ("float8_e4m3fn", "bfloat16"), ("float8_e4m3fn", "float32"),
                                             ("bfloat16", "float32"), ("float16", "float16")])  # fmt: skip
def test_gated_projection(rows: int, kept: str, dtype: str) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 96)).astype(numpy_dtype(dtype))
    weight = (rng.standard_normal((96, 2 * 40)) * 0.1).astype(numpy_dtype(kept))
    norm, scale = (rng.standard_normal(n).astype(np.float32) for n in (96, 40))
    attributes = {"parts": 2, "epsilon": 1e-5, "expression": GATED}
    within, meant = 1e-4 if dtype == kept == "float32" else 3e-2, None
    if kept == "float8_e4m3fn" and rows > 1:
        meant, within = [_rounded(x.astype(np.float32), norm), weight, None, scale], 0.1
    checked("Projection", [x, weight, norm, scale], attributes, {0: "T"}, (1, 2, 3), within, meant)


def _rounded(x: Array, norm: Array) -> Array:
    """Normalised, and to eight bits and back."""
    x = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * norm
    size = np.abs(x).max(1, keepdims=True) / 448
    return (x / size).astype(numpy_dtype("float8_e4m3fn")).astype(np.float32) * size


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_projection_onto_a_stream(rows: int) -> None:
    """A depth that is no multiple of a step, the depth shared among blocks, a residual."""
    rng = np.random.default_rng(rows)
    x, stream = (rng.standard_normal((rows, n)).astype(numpy_dtype("bfloat16")) for n in (1100, 48))
    weight = (rng.standard_normal((1100, 48)) * 0.05).astype(numpy_dtype("bfloat16"))
    attributes = {"parts": 1, "epsilon": 1e-5, "expression": JOINED}
    checked("Projection", [x, weight, None, stream], attributes, {0: "T", 3: "T"}, (1,), 3e-2)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("kept", ["bfloat16", "float8_e4m3fn", "int8"])
def test_a_row_that_is_no_number_gives_none(kept: str, normed: bool, rows: int) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 96)).astype(numpy_dtype("bfloat16"))
    weight, norm = rng.integers(-9, 10, (96, 8)).astype(numpy_dtype(kept)), np.ones(96, np.float32)
    x[rows // 2, 5] = np.nan
    attributes = {"parts": 1, "epsilon": 1e-5, "expression": "Mul %0 0.01 -> float32"}
    inputs = [x, weight, norm if normed else None]
    checked("Projection", inputs, attributes, {0: "T"}, (1, 2), 3e-2 if kept == "bfloat16" else 0.1)


@pytest.mark.parametrize("kept", ["float8_e4m3fn", "int8"])
def test_rows_of_eight_bits_that_no_sum_holds(kept: str) -> None:
    """Some of the largest numbers there are, which products make small again; infinities, whose row is no number."""
    x = np.ones((3, 96), numpy_dtype("bfloat16"))
    x[0, :4], x[2, 3] = 3e38, np.inf
    weight = np.eye(96, 16).astype(numpy_dtype(kept))
    attributes = {"parts": 1, "epsilon": 1e-5, "expression": "Mul %0 0.5 -> float32"}
    meant = x.astype(np.float32)
    meant[0, 4:], meant[2] = 0, np.nan
    checked("Projection", [x, weight], attributes, {0: "T"}, (1,), 1e-2, [meant, weight])


@pytest.mark.parametrize(("kept", "dtype"), [("float8_e4m3fn", "bfloat16"), ("bfloat16", "bfloat16")])
def test_every_stream_of_one_row(kept: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A depth beyond what is asked for at once, with an end that fills no step."""
    from tests.kernels.cuda import harness, picking

    tried, picked = list[str](), picking.picked

    def all_picked(*given: Any) -> Any:
        found = picked(*given[:2], 20)
        tried.extend(candidate.tactic["stream"] for candidate in found)
        return found

    monkeypatch.setattr(harness, "picked", all_picked)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 5136)).astype(numpy_dtype(dtype))
    weight = (rng.standard_normal((5136, 2 * 5)) * 0.02).astype(numpy_dtype(kept))
    norm, scale = (rng.standard_normal(n).astype(np.float32) for n in (5136, 5))
    attributes = {"parts": 2, "epsilon": 1e-5, "expression": GATED}
    checked("Projection", [x, weight, norm, scale], attributes, {0: "T"}, (1, 2, 3), 3e-2)
    assert len(set(tried)) >= 3


def test_eighths_lie_where_kernels_look_for_them() -> None:
    from ingot.kernels.cuda.words import order_of, source_of

    order = order_of(64, "float8_e4m3fn")
    assert order is not None and order_of(64, "bfloat16") is None
    assert [eval(source_of("k"), {"k": k}) for k in range(64)] == order.tolist()
    assert sorted(order.tolist()) == list(range(64))


def batch(rng: np.random.Generator, parts: Sequence[tuple[int, int]], padding: int) -> tuple[Array, ...]:
    """(positions, owners, tables) of sequences of (tokens before, tokens now)."""
    blocks = rng.permutation(len(parts) * TABLE).reshape(len(parts), TABLE)
    positions = [np.arange(before, before + now) for before, now in parts]
    owners = [np.full(now, number) for number, (_, now) in enumerate(parts)]
    filled = (np.concatenate([*some, np.full(padding, rest)]) for some, rest in ((positions, -1), (owners, 0)))
    return (*(x.astype(np.int32) for x in filled), blocks.astype(np.int32))


BATCHES = {
    "one token": ([(37, 1)], 0),
    "first token": ([(0, 1)], 0),
    "last of a block": ([(31, 1)], 0),
    "first of a block": ([(64, 1)], 0),
    "many blocks": ([(7 * BLOCK + 9, 1)], 0),
    "no token": ([(0, 0)], 1),
    "answers": ([(5, 1), (127, 1), (0, 1), (64, 1)], 2),
    "prompt": ([(0, 50)], 0),
    "chunk": ([(70, 40)], 3),
    "mixture": ([(3, 1), (10, 30), (100, 1), (0, 7), (20, 2)], 5),
    "many answers": ([(n, 1) for n in range(35)], 0),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("dtype", "kept", "heads", "depth", "window", "softcap"),
                         [("float32", "float32", 4, 32, 0, 0.0), ("bfloat16", "bfloat16", 6, 24, 20, 0.0),
                          ("float32", "float32", 2, 16, 0, 5.0), ("bfloat16", "float8_e4m3fn", 4, 32, 0, 0.0),
                          ("bfloat16", "float8_e4m3fn", 6, 24, 20, 5.0)])  # fmt: skip
def test_paged_attention(name: str, dtype: str, kept: str, heads: int, depth: int, window: int,
                         softcap: float) -> None:  # fmt: skip
    rng = np.random.default_rng(len(name))
    positions, owners, tables = batch(rng, *BATCHES[name])
    query = rng.standard_normal((len(positions), heads, depth)).astype(numpy_dtype(dtype))
    cache = rng.standard_normal((tables.size, 2, 2, BLOCK * depth)).astype(numpy_dtype(kept))
    spoil(cache, positions, owners, tables, depth, window)
    attributes = {"scale": depth**-0.5, "window": window, "softcap": softcap}
    symbolic = {0: "T", 2: "T", 3: "T"}
    within = 1e-4 if dtype == "float32" else 3e-2
    checked("PagedAttention", [query, cache, positions, owners, tables], attributes, symbolic, (), within)


@pytest.mark.parametrize("name", ["mixture", "answers"])
def test_paged_attention_of_deep_heads(name: str) -> None:
    """Whose tiles in float32 have fewer queries: a product has three parts of each number."""
    test_paged_attention(name, "float32", "float32", 2, 80, 20, 0.0)


def spoil(cache: Array, positions: Array, owners: Array, tables: Array, depth: int, window: int) -> None:
    """What no token may see is no number, nor what lies in blocks that have left the window."""
    for owner, table in enumerate(tables):
        count = int(positions[owners == owner].max(initial=-1)) + 1
        first = int(positions[(owners == owner) & (positions >= 0)].min(initial=0 if count == 0 else count - 1))
        gone = max(first + 1 - window, 0) // BLOCK if window else 0
        cache[table[:gone]] = np.nan
        for place, block in enumerate(table):
            offset = max(min(count - place * BLOCK, BLOCK), 0)
            cache[block, 0].reshape(-1, depth, BLOCK)[:, :, offset:] = np.nan
            cache[block, 1].reshape(-1, BLOCK, depth)[:, offset:] = np.nan


@pytest.mark.parametrize(("dtype", "turned", "scaled"), [("float32", 8, True), ("bfloat16", 12, False),
                                                         ("float32", 0, False), ("float32", 4, True)])  # fmt: skip
def test_cache_update(dtype: str, turned: int, scaled: bool) -> None:
    rng, kind, depth, heads, groups = np.random.default_rng(turned), numpy_dtype(dtype), 24, 6, 2
    projected = rng.standard_normal((7, (heads + 2 * groups) * depth)).astype(kind)
    cache = rng.standard_normal((5, 2, groups, BLOCK * depth)).astype(kind)
    positions = np.array([3, 4, 0, 19, -1, 20, 7], np.int32)
    slots = np.array([17, 18, 79, 3, -1, 4, -1], np.int32)
    angles = [rng.standard_normal((32, turned)).astype(np.float32) if turned else None for _ in range(2)]
    scales = [rng.standard_normal(depth).astype(np.float32) if scaled else None for _ in range(2)]
    attributes = {"heads": heads, "groups": groups, "epsilon": 1e-5}
    inputs = [cache, projected, positions, slots, *angles, *scales]
    constants = tuple(range(4, 8))
    within = 1e-4 if dtype == "float32" else 3e-2
    checked("CacheUpdate", inputs, attributes, {1: "T", 2: "T", 3: "T"}, constants, within)


def test_launches_for_other_sizes_have_no_blocks() -> None:
    """Of a ladder, exactly the launches of a size are in its graph."""
    from ingot.kernels.cuda.architecture import architecture
    from ingot.kernels.cuda.standalone import generate
    from ingot.plan.extent import evaluate
    from tests.kernels.cuda.picking import picked

    weight = np.zeros((512, 512), numpy_dtype("bfloat16"))
    ports = (Port("bfloat16", ("T", 512)), Port("bfloat16", (512, 512), weight))
    node = Node("Projection", ports, (Port("float32", ("T", 512)),), {"parts": 1, "epsilon": 1e-5})
    target = architecture("sm_90")
    build = generate(node, picked(node, target, 1)[0], target)
    for size in (1, 2, 16, 17, 33, 64, 65, 129, 512, 513, 8192):
        taken = [c for c in build.launches if evaluate(c.grid[0], {"T": size})]
        assert len(taken) == 1, (size, [c.grid for c in taken])
        known = replace(node, inputs=(Port("bfloat16", (size, 512)), ports[1]), outputs=(Port("float32", (size, 512)),))
        assert len(generate(known, picked(known, target, 1)[0], target).launches) == 1

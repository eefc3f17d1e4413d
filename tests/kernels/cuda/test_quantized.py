"""Projections with weights of four and eight bits against their meaning: one row, few and many, groups and zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.dtypes import numpy_dtype
from ingot.ir.expression import parse
from ingot.kernels.cpu.workers import WorkerPool
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.projection_integers import packed_words, place_of, run_of
from ingot.kernels.cuda.standalone import generate
from ingot.kernels.node import Node, Port
from ingot.runtime.cpu import usable_threads
from tests.kernels.cuda.test_compile import cheapest
from tests.kernels.cuda.test_paged import GATED, JOINED, Array, checked


def drawn(rng: np.random.Generator, depth: int, width: int, bits: int, group: int, zeros: str) -> list[Array | None]:
    """(weights, scales, zeros): "signed" as our own formats, "middle" and "varied" as checkpoints have them."""
    most, groups = 1 << bits, -(-depth // group)
    whole = rng.integers(0, most, (depth, width)).astype(np.uint8)
    scale = rng.uniform(0.5, 1.5, (groups, width)).astype(np.float16).astype(np.float32) * np.float32(0.25 / most)
    if zeros == "signed":
        return [(whole.astype(np.int16) - most // 2).astype(np.int8), scale, None]
    middle = np.full((groups, width), most // 2, np.uint8)
    drawn = rng.integers(0, most, (groups, width)).astype(np.uint8)
    return [whole, scale, middle if zeros == "middle" else drawn]


@pytest.mark.parametrize("rows", [1, 3, 70, 300])
@pytest.mark.parametrize(("bits", "group", "zeros", "dtype"), [
    (4, 32, "signed", "bfloat16"), (4, 64, "varied", "float16"), (4, 1000, "middle", "float32"),
    (8, 16, "signed", "bfloat16"), (8, 128, "varied", "bfloat16"), (8, 96, "middle", "float32"),
])  # fmt: skip
def test_gated(rows: int, bits: int, group: int, zeros: str, dtype: str) -> None:
    """With a norm; a depth that fills no run of numbers, columns that fill no block."""
    rng, depth, width = np.random.default_rng(rows), 232, 40
    x = rng.standard_normal((rows, depth)).astype(numpy_dtype(dtype))
    weight, scale, zero = drawn(rng, depth, 2 * width, bits, group, zeros)
    norm, size = (rng.standard_normal(n).astype(np.float32) for n in (depth, width))
    attributes = {"parts": 2, "epsilon": 1e-5, "expression": GATED, "bits": bits, "group": group}
    inputs = [x, weight, norm, scale, zero, size]
    checked("QuantizedProjection", inputs, attributes, {0: "T"}, (1, 2, 3, 4, 5), 1e-3 if dtype == "float32" else 4e-2)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bits", [4, 8])
def test_onto_a_stream(rows: int, bits: int) -> None:
    """Without a norm, the depth shared among blocks, a residual."""
    rng = np.random.default_rng(rows)
    x, stream = (rng.standard_normal((rows, n)).astype(numpy_dtype("bfloat16")) for n in (1120, 48))
    weight, scale, _ = drawn(rng, 1120, 48, bits, 32, "signed")
    attributes = {"parts": 1, "epsilon": 1e-5, "expression": JOINED, "bits": bits, "group": 32}
    inputs = [x, weight, None, scale, None, stream]
    checked("QuantizedProjection", inputs, attributes, {0: "T", 5: "T"}, (1, 3), 3e-2)


@pytest.mark.parametrize("rows", [1, 4, 150])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_and_weights_of_eight_bits(rows: int, dtype: str) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 104)).astype(numpy_dtype(dtype))
    weight = rng.integers(-127, 128, (104, 2 * 40)).astype(np.int8)
    norm = rng.standard_normal(104).astype(np.float32)
    size = rng.uniform(0.5e-3, 2e-3, 40).astype(np.float32)
    scaled = "Mul %0 %2 -> float32; Mul %1 %2 -> float32; Sigmoid $0 -> float32; Mul $2 $1 -> float32"
    attributes = {"parts": 2, "epsilon": 1e-5, "expression": scaled}
    meant: list[Array | None] | None = None
    if rows > 1:
        meant = [rounded(x.astype(np.float32), norm), weight, None, size]
    checked("Projection", [x, weight, norm, size], attributes, {0: "T"}, (1, 2, 3), 2e-3, meant)


def rounded(x: Array, norm: Array) -> Array:
    """Normalised, and to eight bits and back."""
    x = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * norm
    size = np.abs(x).max(1, keepdims=True) / 127
    return np.asarray(np.rint(x / size) * size)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_stream_of_one_row(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A depth of several steps, with an end that fills none."""
    from tests.kernels.cuda import harness, picking

    tried, picked = list[str](), picking.picked

    def all_picked(*given: Any) -> Any:
        found = picked(given[0], given[1], 20)
        tried.extend(candidate.tactic["stream"] for candidate in found)
        return found

    monkeypatch.setattr(harness, "picked", all_picked)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 9280)).astype(numpy_dtype("bfloat16"))
    weight, scale, zero = drawn(rng, 9280, 6, bits, 64, "varied")
    attributes = {"parts": 1, "epsilon": 1e-5, "expression": "", "bits": bits, "group": 64}
    norm = rng.standard_normal(9280).astype(np.float32)
    checked("QuantizedProjection", [x, weight, norm, scale, zero], attributes, {0: "T"}, (1, 2, 3, 4), 1e-2)
    assert len(set(tried)) >= 4


def test_a_row_that_is_no_number_gives_none() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    x[1, 7] = np.nan
    weight, scale, _ = drawn(rng, 64, 8, 4, 32, "signed")
    for rows in (x, x[1:2]):
        attributes = {"parts": 1, "epsilon": 1e-5, "expression": "", "bits": 4, "group": 32}
        checked("QuantizedProjection", [rows, weight, None, scale], attributes, {0: "T"}, (1, 3), 1e-3)


@pytest.mark.parametrize(("bits", "parts"), [(8, 1), (4, 2)])
def test_small_products_compile(bits: int, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found on a GPU: Triton made layouts that do not exist of tiles whose numbers were only reshaped at their end."""
    rng, depth, width = np.random.default_rng(bits), 64, 80
    weight, scale, _ = drawn(rng, depth, parts * width, bits, depth, "signed")
    assert weight is not None and scale is not None
    x, out = Port("bfloat16", ("T", depth)), Port("bfloat16", ("T", width))
    inputs = (x, Port("int8", weight.shape, weight), None, Port("float32", scale.shape, scale), None, out)
    text = parse(JOINED if parts == 1 else "Mul %0 %1 -> float32; Cast $0 -> bfloat16")
    stated = {"parts": parts, "epsilon": 1e-5, "bits": bits, "group": depth}
    target = architecture("sm_90")
    node = Node("QuantizedProjection", inputs[: 6 if parts == 1 else 5], (out,), stated, text)
    build = generate(node, cheapest(node, target), target)
    monkeypatch.setenv("INGOT_CACHE", str(tmp_path))
    with WorkerPool(usable_threads()) as pool:
        jobs = [pool.submit("ingot.kernels.cuda.compile:compile_unit", call.unit, "sm_90") for call in build.launches]
        assert [job.result().spilled for job in jobs] == [0] * len(jobs)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_numbers_where_kernels_look_for_them(bits: int) -> None:
    depth = 3 * run_of(bits)
    places = eval(place_of(bits, "k"), {"k": np.arange(depth)})
    assert sorted(places.tolist()) == list(range(depth))
    whole = np.random.default_rng(bits).integers(0, 1 << bits, (depth - 8, 5)).astype(np.uint8)
    words = packed_words(whole, bits)
    mask, each = (1 << bits) - 1, 32 // bits
    found = (words.view(np.uint32)[:, :, None] >> (np.arange(each) * bits).astype(np.uint32)) & mask
    meant = np.zeros((5, depth), np.uint8)
    meant[:, : depth - 8] = whole.T if bits == 4 else (whole.T.astype(np.int16) - 128) % 256
    assert np.array_equal(found.reshape(5, depth), meant[:, places])

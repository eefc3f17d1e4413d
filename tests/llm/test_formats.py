"""Weights in fewer bits: what is kept, how far it is from the checkpoint's, and engines made of it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ingot.errors import ConfigError
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.decoder import Matrix
from ingot.llm.formats import FORMATS, format_of, integers, joined
from ingot.llm.rounding import rounded
from ingot.llm.runner import EngineRunner
from tests.llm.checkpoints import LOGITS, TOKENS, drawn, families, write, write_family
from tests.llm.test_families import batch_of


@pytest.mark.parametrize(("bits", "group", "within"), [(8, 128, 0.52), (8, 32, 0.52), (4, 32, 2.6), (4, 16, 2.6)])
def test_integers_are_near(bits: int, group: int, within: float) -> None:
    """Within half a step; with four bits the scale may be a fifth too small, and one side has an integer less."""
    rows = np.random.default_rng(0).standard_normal((50, 172)).astype(np.float32)
    rows[3] = 0
    whole, scales = rounded(rows, bits, group)
    assert whole.min() >= -(1 << (bits - 1)) and whole.max() < 1 << (bits - 1)
    assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32))
    steps = np.repeat(scales, group, 1)[:, :172]
    assert (np.abs(whole * steps - rows) <= np.abs(steps) * within).all()
    assert not (whole[3] * steps[3]).any()


def test_matrices_side_by_side() -> None:
    rng = np.random.default_rng(1)
    parts = tuple(rng.standard_normal((n, 64)).astype(np.float32) for n in (130, 7))
    whole, scales = integers(Matrix(parts), 8, 32)
    assert whole.shape == (64, 137) and scales.shape == (2, 137)
    expected = np.concatenate(parts).T
    assert np.abs(whole * np.repeat(scales, 32, 0) - expected).max() < 0.02
    turned, _ = integers(Matrix(tuple(part.T for part in parts), transposed=True), 8, 32)
    assert np.array_equal(turned, whole)
    assert np.array_equal(joined(Matrix(parts), np.dtype(np.float32)), expected)
    narrow = parts[0].astype(ml_dtypes.bfloat16)
    assert np.shares_memory(joined(Matrix((narrow,)), narrow.dtype), narrow)


@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", "w8a8", "int4"])
def test_routers_are_not_rounded_to_fewer_bits(name: str) -> None:
    router = np.random.default_rng(2).standard_normal((4, 32)).astype(ml_dtypes.bfloat16)
    kept, matrix = format_of(name), Matrix((router,))
    op, weights, _ = kept.linear(matrix, "router")
    weight = weights["weight"]
    assert weight is not None and np.array_equal(weight, router.T)
    assert op == "Linear" and not kept.narrows(matrix, "router")


def test_experts_in_eighths_have_a_scale_for_each_column() -> None:
    experts = [np.random.default_rng(n).standard_normal((6, 32)).astype(np.float32) for n in range(3)]
    stack, scales = format_of("fp8").stack(experts)
    assert stack.shape == (3, 32, 6) and stack.dtype == ml_dtypes.float8_e4m3fn and scales is not None
    found = stack.astype(np.float32) * scales[:, None]
    assert np.abs(found - np.stack([w.T for w in experts])).max() <= 2.0**-4 * max(np.abs(w).max() for w in experts)


@pytest.mark.parametrize("name", ["int8", "w8a8"])
def test_what_is_no_number_stays_none(name: str, tmp_path: Path) -> None:
    """In the rows that it is in, whatever is rounded; tokens of nothing but zeros are numbers."""
    family = families()["llama"]
    tensors = {key: drawn(key, shape) for key, shape in family["shapes"].items()}
    tensors["model.embed_tokens.weight"][[5, 6]] = np.array([[np.nan], [0]], np.float32)
    folder = write(tmp_path, family["config"], tensors)
    options = BuildOptions(precision=name, context=64, token_budget=8, sequence_budget=3, level=0, verify=False)
    runner = EngineRunner(build_llm(folder, options), threads=1)
    found = runner.step(batch_of(runner, [(0, 0, np.array([4, 9])), (1, 0, np.array([5])), (2, 0, np.array([6]))]))
    assert np.isfinite(found).all(-1).tolist() == [True, True, False, True]
    runner.close()


@pytest.mark.parametrize(("name", "within"), [("bf16", 0.06), ("int8", 0.06), ("w8a8", 0.06), ("int4", 0.4)])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])  # heads of whole vectors: AVX2 cannot mask bfloat16
def test_engines_of_fewer_bits(name: str, within: float, family: str, tmp_path: Path) -> None:
    """Relative to the spread of the logits. Few rows keep more bits than many: where two experts are nearly as likely
    the one may choose otherwise than the other, as int8 does beside float32 for two of these tokens (0.29)."""
    folder, alike = write_family(tmp_path, family), 0.4 if family == "qwen3_moe" else 0.1
    options = BuildOptions(precision=name, context=64, token_budget=48, sequence_budget=2, level=0)
    runner = EngineRunner(build_llm(folder, options), threads=1)
    with np.load(LOGITS) as known:
        expected = known[family]
    found = runner.step(batch_of(runner, [(0, 0, TOKENS)]))
    assert np.sqrt(np.mean((found - expected) ** 2)) < within * expected.std()
    for place, token in enumerate(TOKENS[:4]):
        one = runner.step(batch_of(runner, [(1, place, TOKENS[place : place + 1])]))
        assert np.abs(one - found[place]).max() < alike * expected.std(), token
    runner.close()


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="int3"):
        format_of("int3")
    assert {"fp32", "bf16", "int8", "int4"} <= FORMATS.keys()

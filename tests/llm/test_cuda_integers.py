"""Weights of four and eight bits on a GPU, by Triton's interpreter: what our own formats and checkpoints of others give
is near the floats that they stand for, of prompts and of single tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.errors import BuildError
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.formats import FORMATS
from ingot.llm.models import decoder_of
from ingot.llm.reference import logits_of
from ingot.llm.runner import EngineRunner
from ingot.llm.weights import open_checkpoint
from tests.llm import interpreted
from tests.llm.checkpoints import TOKENS, write_family
from tests.llm.packers import Packing, write_packed
from tests.llm.test_families import batch_of

OPTIONS = BuildOptions(target="cuda:sm_90", context=64, token_budget=48, sequence_budget=4, level=0, calibration="none")


def distance(folder: Path, plain: Path, options: BuildOptions, monkeypatch: Any) -> float:
    """Of a prompt's logits and the next token's alone, of the reference's spread, as the build's evidence counts it."""
    interpreted.use(monkeypatch)
    expected = logits_of(decoder_of(open_checkpoint(plain), 64), TOKENS)
    runner = EngineRunner(build_llm(folder, options))
    prompt = runner.step(batch_of(runner, [(1, 0, TOKENS[:2])]))
    found = np.concatenate([prompt, runner.step(batch_of(runner, [(1, 2, TOKENS[2:3])]))])
    runner.close()
    return float(np.sqrt(np.mean((found - expected[:3]) ** 2)) / expected.std())


@pytest.mark.parametrize("precision", ["int4", "w8a8"])
def test_own_formats(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_family(tmp_path, "qwen3")
    found = distance(folder, folder, replace(OPTIONS, precision=precision), monkeypatch)
    assert 1e-4 < found < FORMATS[precision].within


@pytest.mark.parametrize(("kind", "precision", "within"), [
    (Packing("awq", group=-1), "fp32", 1e-3), (Packing(group=32, symmetric=True, ordered=True), "bf16", 0.05),
])  # fmt: skip
def test_checkpoints_of_others(
    kind: Packing, precision: str, within: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = write_packed(tmp_path, "qwen3", kind)
    assert distance(folder, plain, replace(OPTIONS, precision=precision), monkeypatch) < within


def test_groups_that_no_kernel_takes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted.use(monkeypatch)
    folder, _ = write_packed(tmp_path, "qwen3", Packing(group=16))
    with pytest.raises(BuildError) as caught:
        build_llm(folder, OPTIONS)
    assert "layers.0.attention.projection" in str(caught.value)
    assert "groups of 16 numbers" in str(caught.value) and "multiple of 32" in str(caught.value)

"""Language models on a GPU, by Triton's interpreter: the same tokens as the CPU's engines give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.runner import EngineRunner
from tests.llm import interpreted
from tests.llm.checkpoints import LOGITS, TOKENS, write_family
from tests.llm.test_families import batch_of

OPTIONS = BuildOptions(target="cuda:sm_90", context=64, token_budget=48, sequence_budget=4, level=0)
WITHIN = {"fp32": 5e-4, "bf16": 0.2, "fp8": 0.6}  # of logits, whose spread is about 3


@pytest.mark.parametrize(("family", "precision"), [
    ("llama", "fp32"), ("gemma2", "bf16"), ("qwen3", "fp8"),
])  # fmt: skip
def test_a_family_gives_its_logits(
    family: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted.use(monkeypatch)
    runner = EngineRunner(build_llm(write_family(tmp_path, family), replace(OPTIONS, precision=precision)))
    with np.load(LOGITS) as known:
        expected = known[family]
    prompt = runner.step(batch_of(runner, [(2, 0, TOKENS[:7])]))
    mixed = runner.step(batch_of(runner, [(1, 0, TOKENS[:1]), (2, 7, TOKENS[7:10])]))[1:]
    batch = batch_of(runner, [(2, 10, TOKENS[10:11])])
    alone, chosen = runner.step(batch), runner.choose(batch)
    assert chosen.tolist() == alone.argmax(-1).tolist()
    found = np.concatenate([prompt, mixed, alone])
    assert np.abs(found - expected[:11]).max() < WITHIN[precision]

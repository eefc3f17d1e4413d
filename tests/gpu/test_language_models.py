"""Language models on the GPU: every precision near transformers' logits, of prompts, chunks and tokens alone; builds
that time their kernels; what layers gave back behind their windows is not read."""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from examples.tiny_llm import FOLDER
from examples.tiny_llm.corpus import conversation
from ingot.engine import Engine as File
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.engine import Engine
from ingot.llm.formats import FORMATS
from ingot.llm.request import Event, Request, Sampling
from ingot.llm.runner import EngineRunner
from ingot.report import last_log
from tests.llm.checkpoints import LOGITS, TOKENS, write_family
from tests.llm.test_families import batch_of

pytestmark = pytest.mark.gpu
OPTIONS = BuildOptions(target="cuda", context=64, token_budget=48, sequence_budget=4, level=0, verify=False,
                       calibration="none")  # fmt: skip
LONG = replace(OPTIONS, context=240, token_budget=32, sequence_budget=3)
PROMPT = np.random.default_rng(8).integers(3, 64, 200).tolist()
ANSWER = Sampling(temperature=1.0, seed=5, max_tokens=25, ignore_eos=True)


@pytest.mark.parametrize(("family", "precision"), [
    ("llama", "fp32"), ("gpt2", "fp32"), ("mistral", "bf16"), ("gemma2", "bf16"), ("gemma3_text", "fp8_cache"),
    ("qwen3", "fp8"), ("qwen3", "int4"), ("qwen3", "int8"), ("qwen3", "w8a8"), ("qwen3_moe", "bf16"),
    ("mixtral", "fp8"),
])  # fmt: skip
def test_a_family_gives_its_logits(family: str, precision: str, tmp_path: Path) -> None:
    made = build_llm(write_family(tmp_path, family), replace(OPTIONS, precision=precision))
    with np.load(LOGITS) as known:
        expected = known[family]
    with closing(EngineRunner(made, alike=True)) as runner:
        whole = runner.step(batch_of(runner, [(0, 0, TOKENS)]))
        alone = [runner.step(batch_of(runner, [(1, n, TOKENS[n : n + 1])])) for n in range(len(TOKENS))]
        beside = [(0, 5, TOKENS[5:8]), (3, 0, TOKENS[:1])]
        chunks = [runner.step(batch_of(runner, [(2, n, TOKENS[n : n + 8]), *beside]))[:8] for n in range(0, 40, 8)]
    for found in (whole, np.concatenate(alone), np.concatenate(chunks)):
        gap = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
        assert gap < FORMATS[precision].within and (precision != "fp32" or np.abs(found - expected).max() < 5e-4)


@pytest.mark.parametrize("precision", ["int4", "int8", "w8a8", "fp8"])
def test_a_build_that_times_its_kernels(precision: str, tmp_path: Path) -> None:
    """No candidate is wrong, and the text is as likely as it was."""
    draw, text = random.Random(7), tmp_path / "text.txt"
    turns = [turn for _ in range(20) for turn in conversation(draw)]
    text.write_text("".join(f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in turns))
    _, likely = build_llm(FOLDER, BuildOptions(precision, "cuda", text=str(text))).details["evidence"]
    assert not [notice for notice in last_log().notices if notice.kind == "dropped tactic"]
    assert abs(likely["after"] - likely["before"]) < 0.05


def spoil(engine: Engine, runner: EngineRunner) -> None:
    """What nobody owns holds no numbers, in any format."""
    context, pools = runner.session.context, runner._pools
    context.activate()
    context.call("cuCtxSynchronize")
    for memory, kind in zip(pools._pools, pools._kinds, strict=True):  # type: ignore[attr-defined]
        for block in engine.scheduler.cache.pools[kind]._empty:
            size = pools._block  # type: ignore[attr-defined]
            context.call("cuMemsetD8", memory.address + block * size, 0xFF, size)
    context.call("cuCtxSynchronize")


def answers(made: File, spoilt: bool, ahead: bool = True) -> list[list[int]]:
    """Of prompts of several windows, no prefix known; each look at the clock is a millisecond later."""
    runner, ticks, told = EngineRunner(made), count(), [list[Event]() for _ in range(3)]
    runner.ahead &= ahead
    engine = Engine(runner, clock=lambda: next(ticks) / 1e3)
    for events, end in zip(told, (150, 187, 9), strict=True):
        engine.submit(Request(PROMPT[:end], ANSWER), events.append)
    while engine.step() or engine._posted:
        for pool in engine.scheduler.cache.pools:
            pool.forget()
        if spoilt:
            spoil(engine, runner)
        engine.scheduler.check_integrity()
    engine.close()
    return [[token for event in events for token in event.tokens] for events in told]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8_cache"])
def test_what_left_a_window_is_not_read(precision: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path, "gemma3_text", sliding_window=24, max_position_embeddings=256)
    options = replace(LONG, precision=precision)
    made = build_llm(folder, options)
    for ahead in (True, False):
        found = answers(made, spoilt=False, ahead=ahead)
        assert found == answers(made, spoilt=True, ahead=ahead) and [len(answer) for answer in found] == [25] * 3
        if precision == "fp32":
            assert found == answers(build_llm(folder, replace(options, target="cpu")), spoilt=False)

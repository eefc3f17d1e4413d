"""Blocks that have left the window of every layer are given back; the tokens stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.engine import Engine
from ingot.llm.request import Request, Sampling
from ingot.llm.runner import EngineRunner
from tests.llm.checkpoints import TOKENS, write_family
from tests.llm.test_engine import run, tokens

OPTIONS = BuildOptions(context=96, token_budget=48, sequence_budget=4, level=0, verify=False)


def test_an_engine_with_a_window(tmp_path: Path) -> None:
    made = build_llm(write_family(tmp_path, "mistral"), OPTIONS)
    requests = [Request(TOKENS[at : at + 20].tolist(), Sampling(temperature=0.0, max_tokens=70, ignore_eos=True))
                for at in range(0, 12, 4)]  # fmt: skip
    told = []
    for blocks, window in ((24, 0), (9, 7)):
        runner = EngineRunner(made, threads=1, blocks=blocks)
        assert runner.window == 7
        engine = Engine(runner)
        engine.scheduler.cache.window = window
        told.append([tokens(events) for events in run(engine, *requests)])
        assert not engine.scheduler.preemptions, "three answers of six blocks each, two at a time are in the window"
        engine.close()
    assert told[0] == told[1] and all(len(answer) == 70 for answer in told[0])


@pytest.mark.parametrize(("family", "window"), [("gemma2", 0), ("qwen2_sliding", 0), ("phi3", 11), ("llama", 0)])
def test_a_layer_that_sees_all_keeps_all(family: str, window: int, tmp_path: Path) -> None:
    engine = build_llm(write_family(tmp_path, family), OPTIONS)
    assert engine.details["llm"]["window"] == window

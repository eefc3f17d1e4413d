"""The runner on a tiny Llama: an answer is the same alone, in company and in chunks; what does not fit is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.engine import Engine
from ingot.errors import ConfigError, EngineError, InputError
from ingot.llm.batch import Batch
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.runner import EngineRunner, open_runner
from tests.llm.checkpoints import TOKENS, write_family
from tests.llm.test_families import batch_of

TOKENIZER = '{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_family(tmp_path_factory.mktemp("checkpoint"), "llama")
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    path = folder / "model.engine"
    build_llm(folder, BuildOptions(context=96, token_budget=64, sequence_budget=6, level=0)).save(path)
    return path


@pytest.fixture
def runner(engine: Path) -> Iterator[EngineRunner]:
    made = open_runner(engine, threads=2)
    yield made
    made.close()


def greedy(runner: EngineRunner, prompts: list[Any], count: int, chunk: int = 64) -> list[list[int]]:
    """`count` tokens after each prompt, all sequences in one batch, prompts in chunks."""
    texts = [list(map(int, prompt)) for prompt in prompts]
    done = [0] * len(texts)
    while any(len(text) < len(prompt) + count for text, prompt in zip(texts, prompts, strict=True)):
        parts = [(n, done[n], np.asarray(text[done[n] : done[n] + chunk])) for n, text in enumerate(texts)]
        logits = runner.step(batch_of(runner, parts))
        ends = np.cumsum([len(tokens) for _, _, tokens in parts]) - 1
        for n, (_, first, tokens) in enumerate(parts):
            done[n] = first + len(tokens)
            if done[n] == len(texts[n]):
                texts[n].append(int(logits[ends[n]].argmax()))
    return [text[len(prompt) : len(prompt) + count] for text, prompt in zip(texts, prompts, strict=True)]


def test_batched_is_single_is_chunked(runner: EngineRunner) -> None:
    prompts = [TOKENS[:1], TOKENS[:7], TOKENS[3:20], TOKENS[10:12]]
    alone = [greedy(runner, [prompt], 20)[0] for prompt in prompts]
    assert greedy(runner, prompts, 20) == alone
    assert [greedy(runner, [prompt], 20, chunk=3)[0] for prompt in prompts] == alone
    assert greedy(runner, prompts, 20, chunk=2) == alone
    assert len({tuple(answer) for answer in alone}) > 1


def test_blocks_are_copied_and_shared(runner: EngineRunner) -> None:
    """A sequence whose first block another one computed, and one that continues in a copy."""
    whole = runner.step(batch_of(runner, [(0, 0, TOKENS[:24])]))
    runner.copy_blocks([(0, 0, 30), (0, 1, 31)])
    batch = batch_of(runner, [(0, 20, TOKENS[20:24])])
    tables = np.array([[0, 31, 7, 7, 7, 7]], np.int32)  # the first block is shared, the second a copy
    slots = (31 * 16 + np.arange(4, 8)).astype(np.int32)
    assert np.abs(runner.step(replace(batch, tables=tables, slots=slots)) - whole[20:24]).max() < 1e-4


def test_facts_and_files(runner: EngineRunner) -> None:
    assert (runner.vocabulary, runner.context, runner.block_size, runner.bos) == (64, 96, 16, 1)
    assert runner.eos == {2, 5}
    assert runner.files["tokenizer.json"].decode() == TOKENIZER
    assert set(runner.memory) == {"weights", "activations", "cache"} and all(runner.memory.values())
    assert runner.blocks == 6 * 6


def test_a_pool_has_the_size_asked_for(engine: Path) -> None:
    """Also beyond what all sequences fill at once: prefixes stay in the rest."""
    with contextlib.closing(open_runner(engine, blocks=50)) as runner:
        batch = batch_of(runner, [(0, 0, TOKENS[:2])])
        elsewhere = replace(batch, slots=batch.slots + 49 * 16, tables=np.array([[49]], np.int32))
        assert np.array_equal(runner.step(elsewhere), runner.step(batch))


def test_any_number_of_rows_is_given(runner: EngineRunner) -> None:
    batch = batch_of(runner, [(0, 0, TOKENS[:9])])
    whole = runner.step(batch)
    assert np.abs(runner.step(replace(batch, rows=np.array([8, 2], np.int32))) - whole[[8, 2]]).max() < 1e-5
    assert runner.step(replace(batch, rows=np.zeros(0, np.int32))).shape == (0, 64)
    nothing = np.zeros(0, np.int32)
    empty = Batch(nothing, nothing, nothing, np.zeros(1, np.int32), nothing, np.zeros((0, 6), np.int32), nothing)
    assert runner.step(empty).shape == (0, 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_ids": [64]}, "token_ids must be within 0 and 63"),
        ({"token_ids": [-1]}, "token_ids must be within"),
        ({"positions": [96]}, "positions must be within 0 and 95"),
        ({"slots": [36 * 16]}, "slots must be within"),
        ({"rows": [1]}, "rows must be within 0 and 0"),
        ({"tables": [[0] * 7]}, "context is 6 blocks"),
        ({"tables": [[36]]}, "tables must be within 0 and 35"),
        ({"starts": [0, 2]}, "do not part 1 tokens"),
    ],
)
def test_what_would_be_read_outside_is_refused(runner: EngineRunner, change: dict[str, Any], reason: str) -> None:
    batch = batch_of(runner, [(0, 0, TOKENS[:1])])
    with pytest.raises(InputError, match=reason):
        runner.step(replace(batch, **{name: np.array(value, np.int32) for name, value in change.items()}))


def test_too_large_a_step_is_refused(runner: EngineRunner) -> None:
    with pytest.raises(InputError, match="takes 64 tokens of 6 sequences"):
        runner.step(batch_of(runner, [(0, 0, np.zeros(65, np.int32))]))


def test_no_blocks_are_refused(engine: Path) -> None:
    for blocks in (0, -3):
        with pytest.raises(ConfigError, match=f"must be at least 1, not {blocks}"):
            open_runner(engine, blocks=blocks)


def test_another_engine_is_refused(engine: Path) -> None:
    loaded = Engine.load(engine)
    with pytest.raises(EngineError, match="no language model"):
        EngineRunner(replace(loaded, details={}))

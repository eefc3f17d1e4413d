"""Every family gives the logits of transformers on a tiny random configuration (make_families.py wrote them)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.llm.batch import Batch
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.runner import EngineRunner
from tests.llm.checkpoints import LOGITS, TOKENS, families, write_family

Array = np.ndarray[Any, Any]
OPTIONS = BuildOptions(context=96, token_budget=48, sequence_budget=4, level=0)
WITHIN = 2e-4


def batch_of(runner: EngineRunner, parts: Sequence[tuple[int, int, Array]]) -> Batch:
    """A step of (sequence, first position, tokens); a sequence's blocks are its own; all rows are wanted."""
    width = runner.width
    positions = [np.arange(first, first + len(tokens)) for _, first, tokens in parts]
    slots = [number * width * runner.block_size + place for (number, _, _), place in zip(parts, positions, strict=True)]
    tables = [np.arange(number * width, (number + 1) * width) for number, _, _ in parts]
    starts = np.cumsum([0, *(len(tokens) for _, _, tokens in parts)])
    lengths = [first + len(tokens) for _, first, tokens in parts]
    arrays = [np.concatenate([tokens for _, _, tokens in parts]), np.concatenate(positions), np.concatenate(slots),
              starts, lengths, tables, np.arange(starts[-1])]  # fmt: skip
    return Batch(*(np.asarray(array, np.int32) for array in arrays))


@pytest.mark.parametrize("name", families())
def test_a_family_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    runner = EngineRunner(build_llm(write_family(tmp_path, name), OPTIONS), threads=1, alike=True)
    with np.load(LOGITS) as known:
        expected = known[name]
    whole = runner.step(batch_of(runner, [(0, 0, TOKENS)]))
    assert np.abs(whole - expected).max() < WITHIN
    company = runner.step(batch_of(runner, [(1, 0, TOKENS[:5]), (2, 0, TOKENS[:17]), (3, 0, TOKENS[:9])]))
    pieces = [company[5:22]]
    for first, last in ((17, 18), (18, 31), (31, 32), (32, 40)):
        parts = [(2, first, TOKENS[first:last]), (3, 9 + first - 17, TOKENS[9 + first - 17 : 10 + first - 17])]
        pieces.append(runner.step(batch_of(runner, parts))[: last - first])
    assert np.abs(np.concatenate(pieces) - expected).max() < WITHIN  # in chunks, beside others
    runner.close()

"""Rounding that goes by what weights are multiplied with, and the text it is learnt from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.errors import ConfigError
from ingot.llm import rounding
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.calibration import drawn, lines_of, observed
from ingot.llm.decoder import Decoder, Matrix
from ingot.llm.formats import FORMATS
from ingot.llm.models import decoder_of
from ingot.llm.reference import logits_of
from ingot.llm.rounding import compensated, rounded, successors_of
from ingot.llm.shards import shard
from ingot.llm.weights import open_checkpoint
from tests.llm.checkpoints import TOKENS, write_family

SMALL = BuildOptions(precision="int4", context=64, token_budget=16, sequence_budget=2, level=0)
RNG = np.random.default_rng(0)


def restored(whole: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    return np.asarray(whole * np.repeat(scales, group, 1)[:, : whole.shape[1]])


@settings(max_examples=15, deadline=None)
@given(
    outputs=st.integers(16, 40), inputs=st.integers(24, 90), group=st.sampled_from([16, 32]), seed=st.integers(0, 99)
)
def test_errors_are_taken_over(outputs: int, inputs: int, group: int, seed: int) -> None:
    """What comes out is nearer than with every weight the nearest integer, where inputs go together."""
    rng = np.random.default_rng(seed)
    seen = (rng.standard_normal((400, 8)) @ rng.standard_normal((8, inputs))).astype(np.float32)
    rows = rng.standard_normal((outputs, inputs)).astype(np.float32)
    whole, scales = compensated(rows, successors_of(seen), 4, group)
    assert whole.dtype == np.int8 and whole.min() >= -8 and whole.max() <= 7
    assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32))
    errors = [np.square(seen @ (restored(*found, group) - rows).T).sum()
              for found in ((whole, scales), rounded(rows, 4, group))]  # fmt: skip
    assert errors[0] < errors[1]


def test_inputs_that_tell_nothing_change_nothing() -> None:
    rows = RNG.standard_normal((20, 70)).astype(np.float32)
    for seen in (np.zeros((5, 70), np.float32), 3 * np.eye(70, dtype=np.float32)):
        found, nearest = compensated(rows, successors_of(seen), 4, 32), rounded(rows, 4, 32)
        assert all(np.array_equal(a, b) for a, b in zip(found, nearest, strict=True))


def test_spans_are_compensated_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_SPAN", 32)
    rows, seen = RNG.standard_normal((6, 80)).astype(np.float32), RNG.standard_normal((200, 80)).astype(np.float32)
    whole, scales = compensated(rows, successors_of(seen), 4, 16)
    alone = compensated(rows[:, 32:64], successors_of(seen[:, 32:64]), 4, 16)
    assert np.array_equal(whole[:, 32:64], alone[0]) and np.array_equal(scales[:, 2:4], alone[1])


def decoder(folder: Path, family: str = "qwen3") -> Decoder:
    return decoder_of(open_checkpoint(write_family(folder, family)), 64)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "phi3", "qwen3_moe"])
def test_what_is_multiplied_is_remembered(family: str, tmp_path: Path) -> None:
    plain = decoder(tmp_path, family)
    watched = observed(plain, [TOKENS, TOKENS[:7]])
    layer = watched.layers[0]
    for matrix in (layer.projection, layer.output, layer.up, layer.gate, layer.down):
        if matrix is not None:
            depth = matrix.weights[0].shape[0 if matrix.transposed else 1]
            assert matrix.inputs is not None and [x.shape for x in matrix.inputs] == [(len(TOKENS), depth), (7, depth)]
    assert plain.layers[0].projection.inputs is None
    part = shard(watched, 1, 2).layers[0].output
    assert part.inputs is not None and part.inputs[0].shape[1] == part.weights[0].shape[0 if part.transposed else 1]


def test_the_model_writes_its_own_text(tmp_path: Path) -> None:
    """Likelier than chance, and the same each time."""
    model = decoder(tmp_path)
    lines = drawn(model, 1)
    assert all(line[0] == 1 and len(line) == 64 for line in lines)
    assert all(np.array_equal(a, b) for a, b in zip(lines, drawn(model, 1), strict=True))
    logits = np.concatenate([logits_of(model, line[:-1]) for line in lines])
    of_line = logits[np.arange(len(logits)), np.concatenate([line[1:] for line in lines])]
    assert of_line.mean() > logits.mean() + 0.3 * logits.std()
    assert [len(line) for line in lines_of(np.arange(150), 64)] == [64, 64, 22]


def test_engines_go_by_a_text(tmp_path: Path) -> None:
    """One that is given, or the model's, or none; keys and values have eight bits."""
    folder = write_family(tmp_path / "model", "qwen3")
    np.save(tmp_path / "text.npy", TOKENS)
    built = [build_llm(folder, replace(SMALL, calibration=kind, verify=kind == "drawn"))
             for kind in ("drawn", "none", str(tmp_path / "text.npy"))]  # fmt: skip
    weights = {bytes(engine.variants[0].weights) for engine in built}
    assert len(weights) == 3
    with pytest.raises(ConfigError, match="does not hold two or more tokens"):
        np.save(tmp_path / "bad.npy", TOKENS + 10**6)
        build_llm(folder, replace(SMALL, calibration=str(tmp_path / "bad.npy")))
    kept, matrix = FORMATS["int4"], Matrix((RNG.standard_normal((8, 64)).astype(np.float32),))
    assert kept.linear(matrix, "keys")[2]["bits"] == 8 and kept.linear(matrix)[2]["bits"] == 4

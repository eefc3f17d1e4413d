"""The reference is right, and an engine that is far from it, or makes a text too unlikely, is not made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.tiny_llm import FOLDER
from ingot.errors import ConfigError, ImportFailure, VerificationFailed
from ingot.llm import evidence
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.commands import main
from ingot.llm.formats import FORMATS
from ingot.llm.models import decoder_of
from ingot.llm.reference import logits_of
from ingot.llm.weights import open_checkpoint
from tests.llm.checkpoints import LOGITS, TOKENS, families, write_family

SMALL = BuildOptions(context=64, token_budget=16, sequence_budget=2, level=0)


@pytest.mark.parametrize("name", families())
def test_the_reference_is_transformers(name: str, tmp_path: Path) -> None:
    decoder = decoder_of(open_checkpoint(write_family(tmp_path, name)), 96)
    with np.load(LOGITS) as known:
        assert np.abs(logits_of(decoder, TOKENS) - known[name]).max() < 1e-5


def test_evidence_is_in_the_file(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", "qwen3")
    np.save(tmp_path / "text.npy", TOKENS)
    engine = build_llm(folder, replace(SMALL, text=str(tmp_path / "text.npy"), precision="int8"))
    near, likely = engine.details["evidence"]
    assert near["output"] == "logits" and 0 < near["distance"] < 0.1
    assert likely["tokens"] == 39 and abs(likely["after"] - likely["before"]) < 0.05
    with np.load(LOGITS) as known:
        assert likely["before"] == pytest.approx(evidence.mean_nll(known["qwen3"][:-1], TOKENS[1:]), abs=1e-3)


def test_what_is_too_coarse_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_family(tmp_path / "model", "qwen3")
    np.save(tmp_path / "text.npy", TOKENS)
    words = ["build", str(folder), "-o", str(tmp_path / "x.engine"), "--quiet", "--level", "0", "--context", "64"]
    with pytest.raises(VerificationFailed, match=r"rises from .* more than --max-rise -1"):
        main([*words, "--precision", "int4", "--text", str(tmp_path / "text.npy"), "--max-rise", "-1"])
    assert not (tmp_path / "x.engine").exists()
    assert main(words) == 0 and "verified logits of 12 tokens" in capsys.readouterr().out


def test_a_wrong_engine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "bf16", replace(FORMATS["bf16"], within=1e-6))
    with pytest.raises(VerificationFailed, match=r"bf16 allows 1e-06"):
        build_llm(write_family(tmp_path, "qwen3"), replace(SMALL, precision="bf16"))


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    path = write_family(tmp_path, "llama") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(VerificationFailed, match=r"tensor '.*' holds NaN or infinity"):
        build_llm(tmp_path, SMALL)


def test_a_tokenizer_of_another_model_is_refused_before_the_build(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "llama")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ImportFailure, match="no tokenizer"):
        build_llm(folder, SMALL)


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"no tokenizer.json"):
        evidence.tokens_of(tmp_path / "text.txt", {}, 64)
    np.save(tmp_path / "text.npy", np.array([1, 64]))
    with pytest.raises(ConfigError, match="of the 64 there are"):
        evidence.tokens_of(tmp_path / "text.npy", {}, 64)


def test_texts_that_are_none(tmp_path: Path) -> None:
    """Bytes that are no letters, files that are no arrays, numbers that are no tokens."""
    binary, fake, floats = tmp_path / "a.txt", tmp_path / "a.npy", tmp_path / "b.npy"
    binary.write_bytes(b"\xd0\x00\xff")
    fake.write_text("hi")
    np.save(floats, np.ones(30))
    tokenizer = {"tokenizer.json": (FOLDER / "tokenizer.json").read_bytes()}
    for path, reason in ((binary, "is no text in UTF-8"), (fake, "is no array of numpy"), (floats, "whole numbers")):
        with pytest.raises(ConfigError, match=reason):
            evidence.tokens_of(path, tokenizer, 64)

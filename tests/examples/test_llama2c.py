"""examples/llama2c: a drawn model in llama2.c's form computes, converted and built, what its formulas say."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.runner import EngineRunner
from tests.llm.test_families import batch_of

Array = np.ndarray[Any, Any]
SCRIPT = Path(__file__).parents[2] / "examples" / "llama2c" / "convert.py"
WIDTH, INNER, LAYERS, HEADS, GROUPS, VOCABULARY, CONTEXT = 24, 40, 2, 4, 2, 270, 32
DEPTH = WIDTH // HEADS
SHAPES = {
    "embedding": (VOCABULARY, WIDTH), "attention_norm": (LAYERS, WIDTH), "q": (LAYERS, WIDTH, WIDTH),
    "k": (LAYERS, GROUPS * DEPTH, WIDTH), "v": (LAYERS, GROUPS * DEPTH, WIDTH), "o": (LAYERS, WIDTH, WIDTH),
    "network_norm": (LAYERS, WIDTH), "gate": (LAYERS, INNER, WIDTH), "down": (LAYERS, WIDTH, INNER),
    "up": (LAYERS, INNER, WIDTH), "norm": (WIDTH,), "angles": (2, CONTEXT, DEPTH // 2),
}  # fmt: skip


def write_model(path: Path) -> dict[str, Array]:
    rng = np.random.default_rng(2)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) * np.float32(0.3) for name, shape in SHAPES.items()}
    sizes = struct.pack("<7i", WIDTH, INNER, LAYERS, HEADS, GROUPS, VOCABULARY, CONTEXT)
    path.write_bytes(sizes + b"".join(tensor.tobytes() for tensor in tensors.values()))
    return tensors


def write_tokenizer(path: Path) -> None:
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    pieces += [b" ", b"a", b"b", b"ab", b" ab", b"c", b" c", b"abc", b"bc", b" a", b"cc"]
    scores = [0.0] * 262 + [-1.0, -2.0, 0.0, -4.0, -3.0, -5.0, -6.0, -7.0]
    body = b"".join(struct.pack("<fi", s, len(p)) + p for s, p in zip(scores, pieces, strict=True))
    path.write_bytes(struct.pack("<i", 9) + body)


def norm(x: Array, weight: Array) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight)


def turned(x_THD: Array) -> Array:
    """Neighbouring pairs of a head, as llama2.c has them."""
    angles = np.outer(np.arange(len(x_THD)), 10000.0 ** (-np.arange(0, DEPTH, 2) / DEPTH))[:, None]
    a, b = x_THD[..., ::2], x_THD[..., 1::2]
    pairs = [a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)]
    return np.stack(pairs, -1).reshape(x_THD.shape)


def logits_of(w: dict[str, Array], tokens: Array) -> Array:
    """llama2.c's forward pass."""
    stream, count = w["embedding"][tokens].astype(np.float64), len(tokens)
    for n in range(LAYERS):
        x = norm(stream, w["attention_norm"][n])
        q = turned((x @ w["q"][n].T).reshape(count, HEADS, DEPTH))
        k = turned((x @ w["k"][n].T).reshape(count, GROUPS, DEPTH)).repeat(HEADS // GROUPS, 1)
        v = (x @ w["v"][n].T).reshape(count, GROUPS, DEPTH).repeat(HEADS // GROUPS, 1)
        scores = np.einsum("shd,thd->hst", q, k) / np.sqrt(DEPTH)
        powers = np.exp(np.where(np.tri(count, dtype=bool), scores, -np.inf))
        seen = np.einsum("hst,thd->shd", powers / powers.sum(-1, keepdims=True), v).reshape(count, WIDTH)
        stream = stream + seen @ w["o"][n].T
        x = norm(stream, w["network_norm"][n])
        gate = x @ w["gate"][n].T
        stream = stream + (gate / (1 + np.exp(-gate)) * (x @ w["up"][n].T)) @ w["down"][n].T
    return norm(stream, w["norm"]) @ w["embedding"].T


def test_a_converted_model_computes_the_same(tmp_path: Path) -> None:
    tensors, folder = write_model(tmp_path / "model.bin"), tmp_path / "converted"
    write_tokenizer(tmp_path / "tokenizer.bin")
    command = [sys.executable, SCRIPT, tmp_path / "model.bin", tmp_path / "tokenizer.bin", folder]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "270 tokens" in shown
    tokens = np.random.default_rng(3).integers(3, VOCABULARY, 20)
    runner = EngineRunner(build_llm(folder, BuildOptions(level=0, token_budget=32, sequence_budget=1)), threads=1)
    found = runner.step(batch_of(runner, [(0, 0, tokens)]))
    expected = logits_of(tensors, tokens)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()
    assert runner.eos == {1, 2}
    runner.close()


def test_the_tokenizer_merges_by_score(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_model(tmp_path / "model.bin")
    write_tokenizer(tmp_path / "tokenizer.bin")
    command = [sys.executable, SCRIPT, tmp_path / "model.bin", tmp_path / "tokenizer.bin", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("ab").tokens == ["<s>", "▁ab"]
    assert tokenizer.encode("ab c!").tokens == ["<s>", "▁ab", "▁c", "<0x21>"]
    assert tokenizer.decode(tokenizer.encode("ab abc ünd").ids) == "ab abc ünd"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == GROUPS

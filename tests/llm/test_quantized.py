"""AWQ's and GPTQ's checkpoints: read without loss, run as the floats they stand for; others are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.errors import ImportFailure
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.models import decoder_of
from ingot.llm.quantized import matrices
from ingot.llm.reference import logits_of
from ingot.llm.runner import EngineRunner
from ingot.llm.weights import Checkpoint, open_checkpoint
from tests.llm.checkpoints import TOKENS, write, write_family
from tests.llm.packers import Packing, awq_words, packed, write_packed
from tests.llm.test_families import batch_of

SMALL = BuildOptions(context=64, token_budget=48, sequence_budget=2, level=0)
PACKINGS = {
    "awq": Packing("awq"),
    "awq whole": Packing("awq", group=-1),
    "gptq": Packing(symmetric=True),
    "gptq whole": Packing(group=-1),
    "gptq zeros": Packing(),
    "gptq v2": Packing(stored=0),
    "gptq sym, zeros as v2": Packing(symmetric=True, stored=0),
    "gptq 8": Packing(bits=8, symmetric=True, group=8),
    "gptq 8 zeros": Packing(bits=8),
    "gptq ordered": Packing(ordered=True),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_a_matrix_is_what_was_packed(name: str) -> None:
    kind = PACKINGS[name]
    tensors, floats = packed("a", 24, 80, kind)
    settings = {**kind.config, **({"checkpoint_format": "gptq"} if "as v2" in name else {})}
    checkpoint = Checkpoint(Path("x"), {}, tensors, settings)
    (found,) = matrices(checkpoint, 80, [("a", 24)])
    assert np.array_equal(found.floats(), floats.T)
    assert np.array_equal(found.columns(8, 16).floats(), floats.T[:, 8:16])
    assert (found.order is not None) == kind.ordered and checkpoint.taken == set(tensors)


def test_the_order_of_awq_is_that_of_its_kernels() -> None:
    """Nibbles from the lowest on are columns 0 2 4 6 1 3 5 7."""
    assert awq_words(np.arange(8)[None]).view(np.uint32)[0, 0] == 0x75316420


@pytest.mark.parametrize("name", ["awq", "gptq zeros", "gptq 8", "gptq ordered"])
def test_an_engine_gives_the_logits_of_the_floats(name: str, tmp_path: Path) -> None:
    packed_folder, plain = write_packed(tmp_path, "qwen3", PACKINGS[name])
    expected = logits_of(decoder_of(open_checkpoint(plain), 64), TOKENS)
    engine = build_llm(packed_folder, SMALL)
    runner = EngineRunner(engine, threads=1)
    found = runner.step(batch_of(runner, [(0, 0, TOKENS)]))
    alone = runner.step(batch_of(runner, [(1, 0, TOKENS[:1])]))
    runner.close()
    assert np.abs(found - expected).max() < 1e-3 * expected.std()
    assert np.abs(alone[0] - expected[0]).max() < 1e-3 * expected.std()
    assert len(engine.variants[0].weights) < len(build_llm(plain, replace(SMALL, verify=False)).variants[0].weights)


@pytest.mark.parametrize("name", ["phi3", "gemma2", "llama_tied_biased"])
def test_other_families_read_them(name: str, tmp_path: Path) -> None:
    folder, plain = write_packed(tmp_path, name, Packing("awq", group=-1))
    expected, found = (logits_of(decoder_of(open_checkpoint(f), 64), TOKENS) for f in (plain, folder))
    assert np.array_equal(found, expected)


def test_other_precisions_keep_the_integers(tmp_path: Path) -> None:
    """int8 is then of the last product alone."""
    folder, plain = write_packed(tmp_path, "qwen3", PACKINGS["awq"])
    expected = logits_of(decoder_of(open_checkpoint(plain), 64), TOKENS)
    runner = EngineRunner(build_llm(folder, replace(SMALL, precision="int8")), threads=1)
    found = runner.step(batch_of(runner, [(0, 0, TOKENS)]))
    runner.close()
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.05 * expected.std()


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder, plain = write_packed(tmp_path, "qwen3", PACKINGS["gptq"])
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    assert "no quantization_config" in refused(folder)
    del settings["quant_method"]
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    expected, found = (logits_of(decoder_of(open_checkpoint(f), 64), TOKENS) for f in (plain, folder))
    assert np.array_equal(found, expected)


def refused(folder: Path) -> str:
    with pytest.raises(ImportFailure) as caught:
        decoder_of(open_checkpoint(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes' is not read"),
        ({"quant_method": "fp8"}, "'fp8' is not read; read are awq"),
        ({"bits": 4}, "quant_method None"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "bits": 3}, "with 3 bits"),
        ({"quant_method": "awq", "group_size": 12}, "group_size 12 is neither -1 nor"),
        ({"quant_method": "awq", "group_size": "all"}, "group_size 'all'"),
        ({"quant_method": "gptq", "bits": 3}, "gptq of 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "form 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "form 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:head": {}}}, "'dynamic'"),
        ("awq", "quantization_config is 'awq', not an object"),
    ],
)
def test_other_methods_are_refused_by_name(settings: Any, reason: str, tmp_path: Path) -> None:
    assert reason in refused(write_family(tmp_path, "llama", quantization_config=settings))


def damaged(folder: Path, kind: Packing, **changes: Any) -> str:
    """The refusal of a folder whose tensors, by the ends of their names, are others (None: missing)."""
    packed_folder, _ = write_packed(folder, "qwen3", kind)
    checkpoint = open_checkpoint(packed_folder)
    tensors = dict(checkpoint.tensors)
    for end, change in changes.items():
        name = f"model.layers.1.self_attn.q_proj.{end}"
        tensors[name] = None if change is None else change(tensors[name])  # type: ignore[assignment]
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return refused(write(folder / "damaged", {**checkpoint.config, "quantization_config": kind.config}, kept))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    awq, gptq = PACKINGS["awq"], PACKINGS["gptq"]
    assert "no tensor 'model.layers.1.self_attn.q_proj.scales'" in damaged(tmp_path, awq, scales=None)
    assert "qzeros' has shape" in damaged(tmp_path, awq, qzeros=lambda zeros: zeros[1:])
    assert "qweight' is float32" in damaged(tmp_path, awq, qweight=lambda words: words.view(np.float32))
    assert "says sym" in damaged(tmp_path, gptq, qzeros=lambda zeros: zeros + 1)
    assert "into groups of 16" in damaged(tmp_path, gptq, g_idx=lambda places: places * 0)
    assert "their g_idx differ" in damaged(tmp_path, gptq, g_idx=lambda places: places[::-1])
    assert "only some are quantized" in damaged(tmp_path, gptq, qweight=None)


def test_experts_in_integers_are_refused(tmp_path: Path) -> None:
    folder, _ = write_packed(tmp_path, "qwen3_moe", PACKINGS["awq"])
    assert "experts in integers (model.layers.0.mlp.experts) are not read" in refused(folder)

"""Checkpoints that do not fit: cut short, of another model, with keys missing or too many; sharded ones that do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.errors import ConfigError, ImportFailure
from ingot.llm.build import BuildOptions, build_llm, described
from ingot.llm.formats import FORMATS
from ingot.llm.models import decoder_of
from ingot.llm.weights import open_checkpoint
from tests.llm.checkpoints import drawn, families, write, write_family


def refused(folder: Path, context: int | None = None) -> str:
    with pytest.raises(ImportFailure) as caught:
        decoder_of(open_checkpoint(folder), context)
    return str(caught.value)


def tensors_of(name: str = "llama") -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {key: drawn(key, shape) for key, shape in families()[name]["shapes"].items()}


def test_shards_are_mapped_and_found(tmp_path: Path) -> None:
    config, tensors = families()["llama"]["config"], tensors_of()
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[:7], names[7:])):
        write(tmp_path, config, {name: tensors[name] for name in part}, f"part{number}.safetensors")
        places |= dict.fromkeys(part, f"part{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    checkpoint = open_checkpoint(tmp_path)
    assert all(np.array_equal(checkpoint.tensors[name], tensor) for name, tensor in tensors.items())
    assert not any(view.flags.owndata or view.flags.writeable for view in checkpoint.tensors.values())
    assert decoder_of(checkpoint).vocabulary == 64
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(ImportFailure, match=r"cannot read .*part1.safetensors"):
        open_checkpoint(tmp_path)


def test_a_missing_and_a_superfluous_tensor_are_named(tmp_path: Path) -> None:
    tensors = tensors_of()
    name = "model.layers.1.self_attn.q_proj.weight"
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    assert name in refused(write(tmp_path, families()["llama"]["config"], without))
    more = {**tensors, "model.layers.0.self_attn.q_norm.weight": np.ones(12, np.float32)}
    assert "q_norm" in refused(write(tmp_path, families()["llama"]["config"], more))
    old = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    decoder_of(open_checkpoint(write(tmp_path, families()["llama"]["config"], old)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 40}, r"tensor 'model.* has shape"),
        ({"num_hidden_layers": 4}, "there is no tensor 'model.layers.3"),
        ({"num_hidden_layers": 2}, "uses tensor 'model.layers.2"),
        ({"num_attention_heads": 0}, "'num_attention_heads' must be a positive number"),
        ({"num_key_value_heads": 3}, "do not share 3"),
        ({"model_type": "bloom"}, "no family for model_type 'bloom'; there are gemma"),
        ({"hidden_act": "tanhish"}, "'tanhish' is not known"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "rope type 'spiral'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "make no sense .'factor' is missing"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, "make no sense .could not convert"),
        ({"rope_parameters": {"rope_theta": -1}}, "must be greater than 0"),
        ({"rope_parameters": "x"}, "rope settings are 'x', not an object"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "1 factors for 6 pairs",
        ),
        ({"model_type": ["llama"]}, r"no family for model_type \['llama'\]"),
        ({"hidden_act": ["silu"]}, "is not known"),
        ({"num_hidden_layers": 10**30}, "'num_hidden_layers' is 10+, and there are 30 tensors"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' must be a number, it is '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a number"),
        ({"sliding_window": "all"}, "'sliding_window' must be a whole number, it is 'all'"),
        ({"layer_types": 3}, "'layer_types' must be an array"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "has 'chunked_attention'; known"),
        ({"text_config": "x"}, "'text_config' is 'x', not an object"),
        ({"quantization_config": {"quant_method": ["awq"]}}, r"quant_method \['awq'\] is not read"),
    ],
)
def test_a_config_of_another_model_is_refused(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ImportFailure, match=reason):
        decoder_of(open_checkpoint(write_family(tmp_path, "llama", **changes)))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gemma2", {"query_pre_attn_scalar": -1}, "'query_pre_attn_scalar' must be a number greater than 0"),
        ("qwen3_moe", {"num_experts_per_tok": 6}, "'num_experts_per_tok' is 6, and there are 5 experts"),
        ("qwen3_moe", {"num_experts": "5"}, "'num_experts' must be a whole number"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "'mlp_only_layers' must be an array"),
        ("qwen2_sliding", {"max_window_layers": -1}, "'max_window_layers' must be a whole number"),
        ("gpt2", {"n_head": 5}, "5 heads cannot share 48 columns"),
        ("gpt2", {"n_layer": 10**9}, "'n_layer' is 1000000000, and there are"),
    ],
)
def test_a_config_of_a_family_that_makes_no_sense(
    name: str, changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ImportFailure, match=reason):
        decoder_of(open_checkpoint(write_family(tmp_path, name, **changes)))


def test_json_that_nests_without_end(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "llama")
    header = b"[" * 100_000
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ImportFailure, match="its header makes no sense"):
        open_checkpoint(folder)
    (folder / "config.json").write_bytes(header)
    with pytest.raises(ImportFailure, match="is not JSON"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": "fp8"}, "precision fp8 is for GPUs alone: build with --target cuda:sm_90"),
        ({"precision": "fp8_cache"}, "precision fp8_cache is for GPUs alone"),
        ({"precision": "bf16", "kv": "int8", "target": "cuda:sm_90"}, "cannot be kept as int8 on a GPU"),
        ({"precision": "int8", "kv": "fp32", "target": "cuda:sm_90"}, "cannot be kept as fp32 on a GPU"),
        ({"precision": "int8", "calibration": "text"}, "precision int8 has none: leave it out"),
        ({"precision": "fp16"}, "precision 'fp16' is not known"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], reason: str) -> None:
    """Told at once, not after everything is compiled."""
    with pytest.raises(ConfigError, match=reason):
        BuildOptions(**options)


def test_ends_that_are_no_tokens_of_the_model(tmp_path: Path) -> None:
    """They are never drawn; min_tokens would forbid what there is not."""
    folder = write_family(tmp_path, "llama", eos_token_id=[2, 999, -1, "x"], bos_token_id=999)
    options, checkpoint = BuildOptions(), open_checkpoint(folder)
    facts = described(checkpoint, decoder_of(checkpoint), FORMATS["fp32"], options)
    assert facts["eos"] == [2] and facts["bos"] is None


def test_a_context_beyond_the_model_is_refused(tmp_path: Path) -> None:
    assert "made for 128 tokens" in refused(write_family(tmp_path, "llama"), 129)
    assert "made for 128 tokens" in refused(write_family(tmp_path, "gpt2"), 129)
    with pytest.raises(ConfigError, match="context must be at least 1"):
        build_llm(tmp_path, BuildOptions(context=0))


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_format(path: Path) -> None:
    path.write_bytes(b"GGUF" + bytes(100))


def with_broken_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(data))


def with_wrong_places(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"data_offsets": [0, ', b'"data_offsets": [8, ', 1))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shortened, "was cut short: tensor"), (emptied, "safetensors"), (of_another_format, "no safetensors file"),
        (with_broken_header, "makes no sense"), (with_wrong_places, "does not fit its"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(damage: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    damage(tmp_path / "model.safetensors")
    with pytest.raises(ImportFailure, match=reason):
        decoder_of(open_checkpoint(tmp_path))


def test_a_folder_without_weights_or_config(tmp_path: Path) -> None:
    with pytest.raises(ImportFailure, match=r"config.json: No such file"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ImportFailure, match="holds list"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ImportFailure, match=r"neither model.safetensors nor"):
        open_checkpoint(tmp_path)

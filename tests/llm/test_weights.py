"""Checkpoints that do not fit: cut short, of another model, with keys missing or too many; sharded ones that do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ingot.errors import ConfigError, ImportFailure
from ingot.llm.build import BuildOptions, build_llm
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
    ],
)
def test_a_config_of_another_model_is_refused(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ImportFailure, match=reason):
        decoder_of(open_checkpoint(write_family(tmp_path, "llama", **changes)))


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

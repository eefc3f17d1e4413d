"""Tiny checkpoints of every family, with weights drawn from their names: no torch, the same numbers everywhere."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
FAMILIES = Path(__file__).parent / "families.json"  # name -> {"config": …, "shapes": {tensor: shape}}
LOGITS = Path(__file__).parent / "families.npz"  # name -> logits of TOKENS, computed by transformers
TOKENS = np.random.default_rng(5).integers(3, 64, 40).astype(np.int32)
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}


def families() -> dict[str, Any]:
    """Every family's config and shapes."""
    return dict(json.loads(FAMILIES.read_text()))


def drawn(name: str, shape: Sequence[int], gemma: bool = False) -> Array:
    """The tensor of a name: matrices small, norms around 1 (Gemma's around 0)."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)
    if len(shape) > 1:
        return numbers * np.float32(0.12)
    is_norm = name.endswith("weight") and not gemma
    return numbers * np.float32(0.2) + np.float32(is_norm)


def write_family(folder: Path, name: str, **changes: Any) -> Path:
    """The folder of a family of FAMILIES; `changes` to its config."""
    family = families()[name]
    gemma = family["config"]["model_type"].startswith("gemma")
    tensors = {key: drawn(key, shape, gemma) for key, shape in family["shapes"].items()}
    return write(folder, {**family["config"], **changes}, tensors)


def write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array], file: str = "model.safetensors"
) -> Path:
    """config.json and one file of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, place = {}, 0
    for key, tensor in tensors.items():
        kind, end = TYPES[tensor.dtype.name], place + tensor.nbytes
        header[key] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder

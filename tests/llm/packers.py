"""Checkpoints in the packings of AWQ and GPTQ, written from known integers, and the same in floats."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.llm.checkpoints import Array, drawn, families, write

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the columns of a word, in four bits each


@dataclass(frozen=True)
class Packing:
    """How a folder is written; stored: what GPTQ's zeros are less; ordered: inputs in an order of their own."""

    method: str = "gptq"
    bits: int = 4
    group: int = 16
    symmetric: bool = False
    stored: int = 1
    ordered: bool = False

    @property
    def config(self) -> dict[str, Any]:
        if self.method == "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": self.group, "version": "gemm", "zero_point": True}
        return {"quant_method": "gptq", "bits": self.bits, "group_size": self.group, "sym": self.symmetric,
                "desc_act": self.ordered, "checkpoint_format": "gptq" if self.stored else "gptq_v2"}  # fmt: skip


def side_by_side(numbers: Array, bits: int) -> Array:
    """int32 words of each row's numbers, the first in the lowest bits, by strings of digits."""
    count = 32 // bits
    rows = [
        ["".join(format(int(n), f"0{bits}b") for n in row[at : at + count][::-1]) for at in range(0, len(row), count)]
        for row in numbers
    ]
    return np.array([[int(word, 2) for word in row] for row in rows], np.uint32).view(np.int32)


def packed(name: str, outputs: int, depth: int, kind: Packing) -> tuple[dict[str, Array], Array]:
    """(tensors, the weights [out, in] that they stand for), drawn from the name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    group = kind.group if kind.group > 0 else depth
    groups, most = -(-depth // group), 1 << kind.bits
    whole = rng.integers(0, most, (depth, outputs))
    zero = np.full((groups, outputs), most // 2) if kind.symmetric else rng.integers(0, most, (groups, outputs))
    scale = (rng.uniform(0.5, 1.5, (groups, outputs)) / most).astype(np.float16)
    places = np.arange(depth) // group
    if kind.ordered:
        places = np.random.default_rng(depth).permutation(places)  # products of one input have one order
    floats = ((whole - zero[places]) * scale.astype(np.float32)[places]).astype(np.float32)
    if kind.method == "awq":
        tensors = {"qweight": awq_words(whole), "qzeros": awq_words(zero)}
    else:
        stored = (zero - kind.stored) % most
        tensors = {"qweight": side_by_side(whole.T, kind.bits).T, "qzeros": side_by_side(stored, kind.bits),
                   "g_idx": places.astype(np.int32)}  # fmt: skip
    return {f"{name}.{part}": tensor for part, tensor in {**tensors, "scales": scale}.items()}, floats.T


def awq_words(numbers: Array) -> Array:
    """Four bits each: column c of a word's eight lies at place AWQ_PLACES[c]."""
    turned = np.empty_like(numbers)
    for column, place in enumerate(AWQ_PLACES):
        turned[:, place::8] = numbers[:, column::8]
    return side_by_side(turned, 4)


def write_packed(folder: Path, name: str, kind: Packing) -> tuple[Path, Path]:
    """(folder with the family's layers packed, folder with the floats they stand for)."""
    family = families()[name]
    config, quantized, plain = family["config"], dict[str, Array](), dict[str, Array]()
    for key, shape in family["shapes"].items():
        if len(shape) == 2 and key.endswith("_proj.weight"):
            tensors, plain[key] = packed(key.removesuffix(".weight"), *shape, kind)
            quantized |= tensors
        else:
            quantized[key] = plain[key] = drawn(key, shape)
    settings = {**config, "quantization_config": kind.config}
    return write(folder / "packed", settings, quantized), write(folder / "plain", config, plain)

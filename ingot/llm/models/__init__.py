"""Families of models, one file each: config.json and tensors by their names become a `Decoder`."""

from __future__ import annotations

import importlib

from ingot.errors import ImportFailure
from ingot.llm.decoder import Decoder
from ingot.llm.quantized import scheme_of
from ingot.llm.weights import Checkpoint

# model_type of config.json -> the family's module
FAMILIES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen", "qwen3": "qwen", "qwen3_moe": "qwen", "mixtral": "mixtral",
    "gemma": "gemma", "gemma2": "gemma", "gemma3_text": "gemma", "phi3": "phi3", "gpt2": "gpt2",
}  # fmt: skip
_BUFFERS = ("rotary_emb.inv_freq",)  # tensors of old files that are computed anew


def decoder_of(checkpoint: Checkpoint, context: int | None = None) -> Decoder:
    """The model of a checkpoint, for prompts and answers of up to `context` tokens together (None: a usual length)."""
    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ImportFailure(
            f"{checkpoint.folder / 'config.json'}: no family for model_type {kind!r}; there are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    scheme_of(checkpoint)
    family = importlib.import_module(f"ingot.llm.models.{FAMILIES[kind]}")
    decoder: Decoder = family.decoder(checkpoint, context)
    checkpoint.refuse_leftovers(_BUFFERS)
    return decoder

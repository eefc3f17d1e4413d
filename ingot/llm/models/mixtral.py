"""Mixtral: Mistral's attention, experts in every layer."""

from __future__ import annotations

from typing import Any

from ingot.llm.decoder import Decoder, Experts, Layer
from ingot.llm.models.common import Sizes, attention, decoder_with, scale, sizes_of, windows_of
from ingot.llm.weights import Checkpoint


def decoder(checkpoint: Checkpoint, context: int | None) -> Decoder:
    """The model of config.json's sizes."""
    sizes = sizes_of(checkpoint, context)
    windows = windows_of(checkpoint, sizes, lambda number: True)
    return decoder_with(checkpoint, sizes, [layer(checkpoint, sizes, n, w) for n, w in enumerate(windows)])


def layer(checkpoint: Checkpoint, sizes: Sizes, number: int, window: int) -> Layer:
    """Layer `number`."""
    at = f"model.layers.{number}"
    return Layer(
        before_attention=scale(checkpoint, f"{at}.input_layernorm", sizes.hidden),
        **attention(checkpoint, sizes, f"{at}.self_attn"),
        before_network=scale(checkpoint, f"{at}.post_attention_layernorm", sizes.hidden),
        experts=experts(checkpoint, sizes, f"{at}.block_sparse_moe"),
        window=window,
    )


def experts(checkpoint: Checkpoint, sizes: Sizes, at: str) -> Experts:
    """w1 is the gate, w3 up, w2 down; the weights of the chosen always add up to 1."""
    count = checkpoint.number("num_local_experts")

    def parts(name: str, *shape: int) -> tuple[Any, ...]:
        return tuple(checkpoint.take(f"{at}.experts.{e}.{name}.weight", *shape) for e in range(count))

    return Experts(
        checkpoint.take(f"{at}.gate.weight", count, sizes.hidden), parts("w1", sizes.inner, sizes.hidden),
        parts("w3", sizes.inner, sizes.hidden), parts("w2", sizes.hidden, sizes.inner),
        checkpoint.number("num_experts_per_tok"), True,
    )  # fmt: skip

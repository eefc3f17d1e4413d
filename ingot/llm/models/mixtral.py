"""Mixtral: Mistral's attention, experts in every layer."""

from __future__ import annotations

from ingot.llm.decoder import Decoder, Layer
from ingot.llm.models.common import Sizes, attention, experts, scale, usual_decoder
from ingot.llm.weights import Checkpoint


def decoder(checkpoint: Checkpoint, context: int | None) -> Decoder:
    """The model of config.json's sizes."""
    return usual_decoder(checkpoint, context, layer)


def layer(checkpoint: Checkpoint, sizes: Sizes, number: int, window: int) -> Layer:
    """Layer `number`."""
    at = f"model.layers.{number}"
    extents = checkpoint.number("num_local_experts"), sizes.inner, sizes.hidden
    return Layer(
        before_attention=scale(checkpoint, f"{at}.input_layernorm", sizes.hidden),
        **attention(checkpoint, sizes, f"{at}.self_attn"),
        before_network=scale(checkpoint, f"{at}.post_attention_layernorm", sizes.hidden),
        experts=experts(checkpoint, f"{at}.block_sparse_moe", extents, ("w1", "w3", "w2"), normalised=True),
        window=window,
    )

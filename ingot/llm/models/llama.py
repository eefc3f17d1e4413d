"""Llama 2 and 3, Mistral: RMSNorm, rotary positions, grouped queries, SwiGLU; Mistral with a sliding window."""

from __future__ import annotations

from ingot.llm.decoder import Decoder, Layer
from ingot.llm.models.common import Sizes, attention, gated, scale, usual_decoder
from ingot.llm.weights import Checkpoint


def decoder(checkpoint: Checkpoint, context: int | None) -> Decoder:
    """The model of config.json's sizes."""
    return usual_decoder(checkpoint, context, layer)


def layer(checkpoint: Checkpoint, sizes: Sizes, number: int, window: int) -> Layer:
    """Layer `number`."""
    at = f"model.layers.{number}"
    return Layer(
        before_attention=scale(checkpoint, f"{at}.input_layernorm", sizes.hidden),
        **attention(checkpoint, sizes, f"{at}.self_attn"),
        before_network=scale(checkpoint, f"{at}.post_attention_layernorm", sizes.hidden),
        **gated(checkpoint, sizes, f"{at}.mlp"),
        window=window,
    )

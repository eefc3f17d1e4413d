"""Phi-3: Llama's layers with queries, keys and values in one matrix, gate and up in another; long and short angles."""

from __future__ import annotations

from ingot.llm.decoder import Decoder, Layer
from ingot.llm.models.common import Sizes, matrix, scale, usual_decoder
from ingot.llm.weights import Checkpoint


def decoder(checkpoint: Checkpoint, context: int | None) -> Decoder:
    """The model of config.json's sizes."""
    return usual_decoder(checkpoint, context, layer)


def layer(checkpoint: Checkpoint, sizes: Sizes, number: int, window: int) -> Layer:
    """Layer `number`."""
    at = f"model.layers.{number}"
    both = matrix(checkpoint, sizes.hidden, (f"{at}.mlp.gate_up_proj", 2 * sizes.inner))
    return Layer(
        before_attention=scale(checkpoint, f"{at}.input_layernorm", sizes.hidden),
        projection=matrix(checkpoint, sizes.hidden, (f"{at}.self_attn.qkv_proj", sizes.query + 2 * sizes.key)),
        output=matrix(checkpoint, sizes.query, (f"{at}.self_attn.o_proj", sizes.hidden)),
        before_network=scale(checkpoint, f"{at}.post_attention_layernorm", sizes.hidden),
        gate=both.picked([(0, sizes.inner)]),
        up=both.picked([(sizes.inner, 2 * sizes.inner)]),
        down=matrix(checkpoint, sizes.inner, (f"{at}.mlp.down_proj", sizes.hidden)),
        window=window,
    )

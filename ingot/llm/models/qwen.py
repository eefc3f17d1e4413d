"""Qwen 2 and 3, Qwen3-MoE: Llama's layers; 2 with biases, 3 with normalised queries and keys, MoE with experts."""

from __future__ import annotations

from typing import Any

from ingot.llm.decoder import Decoder, Layer
from ingot.llm.models.common import Sizes, attention, experts, gated, scale, usual_decoder
from ingot.llm.weights import Checkpoint


def decoder(checkpoint: Checkpoint, context: int | None) -> Decoder:
    """The model of config.json's sizes."""
    config = checkpoint.config
    first = checkpoint.count("max_window_layers")
    slides = bool(config.get("use_sliding_window"))
    return usual_decoder(checkpoint, context, layer, lambda number: slides and number >= first)


def layer(checkpoint: Checkpoint, sizes: Sizes, number: int, window: int) -> Layer:
    """Layer `number`."""
    at = f"model.layers.{number}"
    scales: dict[str, Any] = {}
    if checkpoint.config["model_type"] != "qwen2":
        scales = {f"{kind}_scale": scale(checkpoint, f"{at}.self_attn.{kind[0]}_norm", sizes.depth)
                  for kind in ("query", "key")}  # fmt: skip
    return Layer(
        before_attention=scale(checkpoint, f"{at}.input_layernorm", sizes.hidden),
        **attention(checkpoint, sizes, f"{at}.self_attn"), **scales,
        before_network=scale(checkpoint, f"{at}.post_attention_layernorm", sizes.hidden),
        **network(checkpoint, sizes, number, f"{at}.mlp"),
        window=window,
    )  # fmt: skip


def network(checkpoint: Checkpoint, sizes: Sizes, number: int, at: str) -> dict[str, Any]:
    """The feed-forward part: one network, or experts in the layers that config.json gives them to."""
    config, step = checkpoint.config, checkpoint.count("decoder_sparse_step") or 1
    count = checkpoint.count("num_experts") or checkpoint.count("num_local_experts")
    if not count or number in (checkpoint.listed("mlp_only_layers") or ()) or (number + 1) % step:
        return gated(checkpoint, sizes, at)
    extents = count, checkpoint.number("moe_intermediate_size"), sizes.hidden
    names = "gate_proj", "up_proj", "down_proj"
    return {"experts": experts(checkpoint, at, extents, names, bool(config.get("norm_topk_prob")))}

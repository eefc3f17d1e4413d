"""Gemma 1, 2 and 3: norms kept as differences from 1, a scaled embedding, gelu; 2 and 3 with norms on both sides and
windows, 2 with capped scores, 3 with normalised queries and keys and two tables of angles."""

from __future__ import annotations

import functools
from typing import Any

from ingot.llm import rope
from ingot.llm.decoder import Decoder, Layer
from ingot.llm.models.common import Sizes, activation_of, attention, decoder_with, gated, sizes_of, windows_of
from ingot.llm.models.common import scale as plain_scale
from ingot.llm.weights import Checkpoint

scale = functools.partial(plain_scale, offset=1.0)
_FULL, _SLIDING = "full_attention", "sliding_attention"


def decoder(checkpoint: Checkpoint, context: int | None) -> Decoder:
    """The model of config.json's sizes."""
    sizes, config = sizes_of(checkpoint, context), checkpoint.config
    every = checkpoint.count("sliding_window_pattern") or {"gemma2": 2}.get(config["model_type"], 6)
    windows = windows_of(
        checkpoint, sizes, lambda number: config["model_type"] != "gemma" and bool((number + 1) % every)
    )
    return decoder_with(
        checkpoint, sizes, [layer(checkpoint, sizes, n, w) for n, w in enumerate(windows)], offset=1.0,
        scale=checkpoint.real("query_pre_attn_scalar", sizes.depth, above=0) ** -0.5,
        activation=activation_of(checkpoint, "hidden_activation", "gelu_pytorch_tanh"),
        embedding_scale=sizes.hidden**0.5, rope=angles(checkpoint, sizes),
        softcap=checkpoint.real("attn_logit_softcapping", 0.0),
        final_softcap=checkpoint.real("final_logit_softcapping", 0.0),
    )  # fmt: skip


def angles(checkpoint: Checkpoint, sizes: Sizes) -> dict[str, Any]:
    """Gemma 3's sliding layers turn faster than the others."""
    config = checkpoint.config
    if not config["model_type"].startswith("gemma3"):
        return {"default": rope.tables(rope.settings_of(config), sizes.depth, sizes.context)}
    full = rope.settings_of(config, _FULL, 1e6)
    local = rope.settings_of(config, _SLIDING) if _SLIDING in (config.get("rope_parameters") or {}) else {
        "rope_type": "default", "rope_theta": checkpoint.real("rope_local_base_freq", 10000.0, above=0)
    }  # fmt: skip
    return {
        kind: rope.tables(found, sizes.depth, sizes.context) for kind, found in (("default", full), ("local", local))
    }


def layer(checkpoint: Checkpoint, sizes: Sizes, number: int, window: int) -> Layer:
    """Layer `number`."""
    at, kind = f"model.layers.{number}", checkpoint.config["model_type"]
    names = {"before_attention": "input_layernorm", "before_network": "post_attention_layernorm"}
    if kind != "gemma":
        names |= {"after_attention": "post_attention_layernorm", "before_network": "pre_feedforward_layernorm",
                  "after_network": "post_feedforward_layernorm"}  # fmt: skip
    scales: dict[str, Any] = {part: scale(checkpoint, f"{at}.{name}", sizes.hidden) for part, name in names.items()}
    if kind.startswith("gemma3"):
        scales["query_scale"] = scale(checkpoint, f"{at}.self_attn.q_norm", sizes.depth)
        scales["key_scale"] = scale(checkpoint, f"{at}.self_attn.k_norm", sizes.depth)
        scales["rope"] = "local" if window else "default"
    return Layer(**scales, **attention(checkpoint, sizes, f"{at}.self_attn"), **gated(checkpoint, sizes, f"{at}.mlp"),
                 window=window)  # fmt: skip

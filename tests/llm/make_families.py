"""Writes families.json and families.npz: tiny configurations of every family and what transformers computes for them.

python -m tests.llm.make_families        (needs torch and transformers; the tests do not)
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from tests.llm.checkpoints import FAMILIES, LOGITS, TOKENS, drawn, write

USUAL = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 128, "short_factor": [1.0, 1.1, 1.3], "long_factor": [2.0, 3.0, 4.0],
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3},
    "llama_tied_biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
                          "num_key_value_heads": 4},
    "llama_yarn_one_key": {"rope_parameters": YARN, "num_key_value_heads": 1},
    "llama_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "mistral": {"sliding_window": 7, "head_dim": 20},
    "qwen2": {},
    "qwen2_sliding": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "norm_topk_prob": True, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0,
               "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": MIXED, "query_pre_attn_scalar": 20},
    "phi3": {"sliding_window": 11},
    "phi3_longrope": {"rope_parameters": LONGROPE, "sliding_window": None},
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 64},
}  # fmt: skip
KINDS = ("llama", "mistral", "qwen2", "qwen3_moe", "qwen3", "mixtral", "gemma3_text", "gemma2", "gemma", "phi3", "gpt2")


def kind_of(name: str) -> str:
    """model_type of a name."""
    return next(kind for kind in KINDS if name == kind or name.startswith(f"{kind}_"))


def shapes_of(folder: Path) -> dict[str, list[int]]:
    """Tensors as transformers names them in files."""
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


def main() -> None:
    """All families."""
    described, logits = {}, {}
    for name, own in CONFIGS.items():
        kind = kind_of(name)
        usual = {} if kind == "gpt2" else USUAL
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**usual, **own})).save_pretrained(folder)
            config, shapes = json.loads((folder / "config.json").read_text()), shapes_of(folder)
            write(folder, config, {key: drawn(key, shape, kind.startswith("gemma")) for key, shape in shapes.items()})
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            with torch.no_grad():
                logits[name] = model.eval()(torch.tensor(TOKENS[None].astype(np.int64))).logits[0].numpy()
        described[name] = {"config": config, "shapes": shapes}
        print(f"{name:20} {len(shapes)} tensors, logits {logits[name].std():.2f}")
    FAMILIES.write_text(json.dumps(described, indent=0) + "\n")
    np.savez_compressed(LOGITS, **logits)


if __name__ == "__main__":
    main()

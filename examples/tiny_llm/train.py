"""Train the tiny model and write it as a Hugging Face folder.

    python -m examples.tiny_llm.train [--minutes 30] [--start FOLDER] [--threads 1] [--out FOLDER]

Needs ingot[train,examples]. A Llama of 1.3 million parameters with a tokenizer of 1,024 tokens learns the conversations
of corpus.py; the loss at the end is printed and written beside the weights. The committed ones had 32 minutes of one
busy core in two parts, the second with --start; they answer every question of corpus.py's tables rightly.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
from torch import nn
from torch.nn import functional

from examples.tiny_llm.corpus import conversation

HERE = Path(__file__).parent
BEGIN, USER, ASSISTANT, END = SPECIAL = ("<|begin|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 384,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "attention_bias": False, "bos_token_id": 0, "eos_token_id": 3, "torch_dtype": "bfloat16",
}  # fmt: skip
LENGTH, BATCH = 256, 12


def text_of(messages: list[dict[str, str]]) -> str:
    """A conversation as the template writes it."""
    return BEGIN + "".join(f"<|{one['role']}|>{one['content']}{END}" for one in messages)


def make_tokenizer() -> tokenizers.Tokenizer:
    """Byte pairs of the corpus; digits stay single."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    draw = random.Random(1)
    made.train_from_iterator((one["content"] for _ in range(3000) for one in conversation(draw)), trainer)
    return made


class Norm(nn.Module):
    """x / rms(x) * weight"""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CONFIG["hidden_size"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return functional.rms_norm(x, self.weight.shape, self.weight, CONFIG["rms_norm_eps"])


class Layer(nn.Module):
    """Attention and a gated MLP, each after a norm; names as transformers' Llama has them."""

    def __init__(self) -> None:
        super().__init__()
        width, inner, depth = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
        heads, groups = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, (rows, columns) in {
            "q_proj": (heads * depth, width), "k_proj": (groups * depth, width),
            "v_proj": (groups * depth, width), "o_proj": (width, heads * depth),
        }.items():  # fmt: skip
            setattr(self.self_attn, name, nn.Linear(columns, rows, bias=False))
        self.mlp.gate_proj, self.mlp.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.mlp.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x [N, T, width]"""
        x = x + self.attention(self.input_layernorm(x), angles)
        inner = self.post_attention_layernorm(x)
        mlp: Any = self.mlp
        return x + mlp.down_proj(functional.silu(mlp.gate_proj(inner)) * mlp.up_proj(inner))

    def attention(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Causal, grouped queries, rotary positions."""
        attn: Any = self.self_attn
        split = [attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)]
        query, key, value = (each.unflatten(-1, (-1, CONFIG["head_dim"])).transpose(1, 2) for each in split)
        query, key = rotated(query, *angles), rotated(key, *angles)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return attn.o_proj(mixed.transpose(1, 2).flatten(2))


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary positions, halves as transformers pairs them."""
    low, high = x.chunk(2, -1)
    return x * cosine + torch.cat([-high, low], -1) * sine


class Model(nn.Module):
    """Logits [N, T, vocabulary] of tokens [N, T]; the embedding is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = Norm()
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.05)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """All positions."""
        half = CONFIG["head_dim"] // 2
        rates = CONFIG["rope_theta"] ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(tokens.shape[1]), rates).repeat(1, 2)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, (angles.cos(), angles.sin()))
        return functional.linear(self.norm(x), self.embed_tokens.weight)


def batches(tokenizer: tokenizers.Tokenizer, seed: int) -> Iterator[torch.Tensor]:
    """Tokens [BATCH, LENGTH + 1] of conversations after one another."""
    draw, waiting = random.Random(seed), list[int]()
    while True:
        while len(waiting) < BATCH * (LENGTH + 1):
            waiting += tokenizer.encode(text_of(conversation(draw))).ids
        taken, waiting = waiting[: BATCH * (LENGTH + 1)], waiting[BATCH * (LENGTH + 1) :]
        yield torch.tensor(taken).view(BATCH, LENGTH + 1)


def train(model: Model, tokenizer: tokenizers.Tokenizer, seconds: float) -> float:
    """AdamW, the rate falling along a cosine over the time given; returns the last losses' mean."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    began, losses = time.monotonic(), list[float]()
    for step, tokens in enumerate(batches(tokenizer, 2)):
        passed = (time.monotonic() - began) / seconds
        if passed >= 1:
            break
        rate = 3e-3 * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * passed))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {passed:.0%}", flush=True)
    return sum(losses[-20:]) / len(losses[-20:])


def save(model: Model, tokenizer: tokenizers.Tokenizer, folder: Path, loss: float) -> None:
    """config.json, bfloat16 weights, tokenizer, template."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": weight.to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt", "loss": f"{loss:.4f}"})
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    described = {"bos_token": BEGIN, "eos_token": END, "chat_template": TEMPLATE}
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--start", type=Path, help="a folder whose weights to go on from")
    parser.add_argument("--threads", type=int, default=1, help="more pay on an idle machine only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    tokenizer, model = make_tokenizer(), Model()
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {tokenizer.get_vocab_size()} tokens")
    if arguments.start is not None:
        known = safetensors.torch.load_file(arguments.start / "model.safetensors")
        model.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in known.items()})
    loss = train(model, tokenizer, arguments.minutes * 60)
    save(model, tokenizer, arguments.out, loss)
    print(f"loss {loss:.4f}; written to {arguments.out}")


if __name__ == "__main__":
    main()

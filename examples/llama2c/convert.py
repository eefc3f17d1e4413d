"""llama2.c's model.bin and tokenizer.bin become a folder that `ingot llm build` takes.

    python examples/llama2c/convert.py stories260K.bin tok512.bin stories260K/

Numpy alone. The first version of the format is read: seven numbers, then float32 tensors layer by layer of a kind.
Queries and keys come with the pairs that rotate side by side, Hugging Face has the halves of a head instead.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"


def main() -> None:
    """Convert the files named on the command line."""
    parser = argparse.ArgumentParser(description="convert a model of llama2.c")
    parser.add_argument("model", type=Path, help="model.bin")
    parser.add_argument("tokenizer", type=Path, help="tokenizer.bin")
    parser.add_argument("folder", type=Path, help="folder to write")
    arguments = parser.parse_args()
    config, tensors = read_model(arguments.model)
    pieces = read_tokenizer(arguments.tokenizer, config["vocab_size"])
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_json(arguments.folder / "config.json", config)
    write_safetensors(arguments.folder / "model.safetensors", tensors)
    write_json(arguments.folder / "tokenizer.json", tokenizer_json(pieces))
    write_json(arguments.folder / "tokenizer_config.json", {"bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN,
                                                           "add_bos_token": True})  # fmt: skip
    print(f"{arguments.folder}: {sum(t.size for t in tensors.values()):,} weights, {len(pieces)} tokens")


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """(config.json, tensors by Hugging Face's names)"""
    data = path.read_bytes()
    width, inner, layers, heads, groups, signed_vocabulary, context = struct.unpack_from("<7i", data)
    vocabulary, key = abs(signed_vocabulary), width // heads * groups
    numbers, place = np.frombuffer(data, np.float32, offset=28), 0

    def take(*shape: int) -> Array:
        nonlocal place
        size = int(np.prod(shape))
        if place + size > len(numbers):
            raise SystemExit(f"{path} is too short for the sizes it states: is it a model of llama2.c's first version?")
        place += size
        return numbers[place - size : place].reshape(shape)

    embedding, before_attention = take(vocabulary, width), take(layers, width)
    query, keys, value = take(layers, width, width), take(layers, key, width), take(layers, key, width)
    output, before_network = take(layers, width, width), take(layers, width)
    gate, down, up = take(layers, inner, width), take(layers, width, inner), take(layers, inner, width)
    final = take(width)
    take(2, context, width // heads // 2)  # angles, which are computed anew
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": final}
    for n in range(layers):
        tensors |= {
            f"model.layers.{n}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": before_attention[n], "self_attn.q_proj": halves(query[n], heads),
                "self_attn.k_proj": halves(keys[n], groups), "self_attn.v_proj": value[n],
                "self_attn.o_proj": output[n], "post_attention_layernorm": before_network[n], "mlp.gate_proj": gate[n],
                "mlp.up_proj": up[n], "mlp.down_proj": down[n],
            }.items()
        }  # fmt: skip
    if signed_vocabulary < 0:
        tensors["lm_head.weight"] = take(vocabulary, width)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
        "vocab_size": vocabulary, "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": signed_vocabulary > 0, "bos_token_id": 1,
        "eos_token_id": [1, 2],  # llama2.c ends a story with the mark that begins the next
    }  # fmt: skip
    return config, tensors


def halves(weight: Array, heads: int) -> Array:
    """Rows (2i, 2i+1) of each head become rows (i, i + half)."""
    outputs, inputs = weight.shape
    return weight.reshape(heads, outputs // heads // 2, 2, inputs).transpose(0, 2, 1, 3).reshape(outputs, inputs)


def read_tokenizer(path: Path, count: int) -> list[tuple[str, float]]:
    """(piece, score) by number, spaces as sentencepiece marks them."""
    data, place, pieces = path.read_bytes(), 4, []
    for _ in range(count):
        score, length = struct.unpack_from("<fi", data, place)
        place += 8 + length
        pieces.append((data[place - length : place].decode("utf-8", "replace").replace(" ", "\u2581"), score))
    names = [UNKNOWN, BEGIN, END, *(f"<0x{byte:02X}>" for byte in range(256))]
    return [(names[n] if n < len(names) else piece, score) for n, (piece, score) in enumerate(pieces)]


def tokenizer_json(pieces: list[tuple[str, float]]) -> dict[str, Any]:
    """A byte-pair encoding whose merges go by score, as sentencepiece's do."""
    numbers = {piece: number for number, (piece, _) in enumerate(pieces)}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": numbers[name], "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for name in (UNKNOWN, BEGIN, END)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BEGIN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BEGIN: {"id": BEGIN, "ids": [numbers[BEGIN]], "tokens": [BEGIN]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": UNKNOWN, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": numbers, "merges": merges(numbers, dict(pieces)),
        },
    }  # fmt: skip


def merges(numbers: dict[str, int], scores: dict[str, float]) -> list[list[str]]:
    """Pairs whose union is a piece, best piece first."""
    found = []
    for piece, score in scores.items():
        parts = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [(numbers[a], numbers[b], a, b) for a, b in parts if a in numbers and b in numbers]
        found += [(-score, first, second, a, b) for first, second, a, b in sorted(known)]
    return [[a, b] for _, _, _, a, b in sorted(found, key=lambda entry: entry[0])]


def write_json(path: Path, content: Any) -> None:
    """One JSON file."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, Array]) -> None:
    """Length of the header, header, data."""
    header, place = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes())


if __name__ == "__main__":
    main()

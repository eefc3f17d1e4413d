"""Three new versions of the digits model, made from the trained one: a good one, a slower one, a wrong one."""

import itertools
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

ORIGINAL = Path(__file__).parent.parent / "digits" / "digits.onnx"
WIDTH, DEPTH = 1024, 14


def good(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights rounded to eleven bits, as float16 has: half the information, the same answers."""
    for initializer in model.graph.initializer:
        values = numpy_helper.to_array(initializer)
        if values.dtype == np.float32:
            rounded = values.astype(np.float16).astype(np.float32)
            initializer.CopyFrom(numpy_helper.from_array(rounded, initializer.name))
    return model


def slower(model: onnx.ModelProto) -> onnx.ModelProto:
    """A branch of large products that adds almost nothing to the scores but takes its time."""
    random, graph = np.random.default_rng(0), model.graph
    output = graph.output[0].name
    widths = [64, *[WIDTH] * DEPTH, 10]
    graph.initializer.append(numpy_helper.from_array(np.array([-1, 64], np.int64), "branch_shape"))
    nodes = [helper.make_node("Reshape", [graph.input[0].name, "branch_shape"], ["branch_0"])]
    for index, (rows, columns) in enumerate(itertools.pairwise(widths)):
        weight = (random.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(weight, f"branch_weight_{index}"))
        nodes.append(helper.make_node("MatMul", [f"branch_{index}", f"branch_weight_{index}"], [f"branch_{index + 1}"]))
    graph.initializer.append(numpy_helper.from_array(np.array(1e-6, np.float32), "branch_scale"))
    nodes.append(helper.make_node("Mul", [f"branch_{len(widths) - 1}", "branch_scale"], ["branch_scaled"]))
    for node in graph.node:
        node.output[:] = ["scores_before" if name == output else name for name in node.output]
    nodes.append(helper.make_node("Add", ["scores_before", "branch_scaled"], [output]))
    graph.node.extend(nodes)
    return model


def wrong(model: onnx.ModelProto) -> onnx.ModelProto:
    """The last layer's classes moved by one for half of them: fast, and wrong."""
    names = {name for node in list(model.graph.node)[-3:] for name in node.input}
    for initializer in model.graph.initializer:
        values = numpy_helper.to_array(initializer)
        if initializer.name in names and 10 in values.shape:
            axis = values.shape.index(10)
            order = np.array([1, 0, 3, 2, 5, 4, 6, 7, 8, 9])
            initializer.CopyFrom(numpy_helper.from_array(np.take(values, order, axis), initializer.name))
    return model


MAKERS = {"good": good, "slower": slower, "wrong": wrong}


def write(folder: Path) -> dict[str, Path]:
    """name => file of each version, the original among them"""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"original": folder / "original.onnx"}
    paths["original"].write_bytes(ORIGINAL.read_bytes())
    for name, make in MAKERS.items():
        paths[name] = folder / f"{name}.onnx"
        onnx.save(make(onnx.load(ORIGINAL)), paths[name])
    return paths

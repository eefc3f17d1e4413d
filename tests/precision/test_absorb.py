"""Factors of channels go into the constants that make a tensor, and the model says what it said."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from ingot.importers import onnx as importer
from ingot.ir import oracle, shapes
from ingot.precision import nodes, smooth
from tests.passes.support import Net, model_of

WIDTH, HEADS = 8, 2
FACTORS = np.linspace(0.5, 2.0, WIDTH).astype(np.float32)


def norm(net: Net, x: str) -> str:
    return net.node("LayerNormalization", x, net.draw(WIDTH), net.draw(WIDTH))


def parts_of_a_norm(net: Net, x: str) -> str:
    """As older exporters write it."""
    mean = net.node("ReduceMean", x, net.constant([-1], "int64"))
    centred = net.node("Sub", x, mean)
    variance = net.node("ReduceMean", net.node("Mul", centred, centred), net.constant([-1], "int64"))
    whole = net.node("Div", centred, net.node("Sqrt", net.node("Add", variance, net.constant(1e-5))))
    return net.node("Add", net.node("Mul", whole, net.draw(WIDTH)), net.draw(WIDTH))


def attention(net: Net, x: str) -> str:
    """Weighted sums of values, head by head."""

    def heads(rows: str) -> str:
        four = net.node("Reshape", rows, net.constant([0, 0, HEADS, WIDTH // HEADS], "int64"))
        return net.node("Transpose", four, perm=[0, 2, 1, 3])

    values = heads(net.node("Add", net.node("MatMul", x, net.draw(WIDTH, WIDTH)), net.draw(WIDTH)))
    scores = net.node("MatMul", heads(x), net.node("Transpose", heads(x), perm=[0, 1, 3, 2]))
    mixed = net.node("Transpose", net.node("MatMul", net.node("Softmax", scores), values), perm=[0, 2, 1, 3])
    return net.node("Reshape", mixed, net.constant([0, 0, WIDTH], "int64"))


def smoothed(net: Net, tensor: str, *outputs: str) -> tuple[ir.Model, ir.Model]:
    """The model before and after what the last product reads is divided by FACTORS."""
    before = importer.load(model_of(net, {"x": ("float32", (2, 5, WIDTH))}, *outputs))
    shapes.infer(before)
    after = before.clone()
    readers = [target for target in nodes.targets(after) if target.x.name == tensor]
    smooth.divide_and_multiply(readers[0].x, readers, FACTORS)
    shapes.infer(after)
    return before, after


def same(before: ir.Model, after: ir.Model) -> None:
    feeds = {"x": np.random.default_rng(3).standard_normal((2, 5, WIDTH)).astype(np.float32)}
    wanted, found = (oracle.evaluate_model(model, feeds) for model in (before, after))
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("made", [norm, parts_of_a_norm, attention])
def test_constants_take_the_factors(made: Any) -> None:
    net = Net()
    tensor = made(net, "x")
    before, after = smoothed(net, tensor, net.node("MatMul", tensor, net.draw(WIDTH, 3)))
    assert len(after.graph) == len(before.graph)
    same(before, after)


def test_a_residual_multiplies_again() -> None:
    """One node more, which an epilogue takes; and the user's name is with the user's numbers."""
    net = Net()
    tensor = norm(net, "x")
    y = net.node("Add", net.node("MatMul", tensor, net.draw(WIDTH, WIDTH)), tensor)
    before, after = smoothed(net, tensor, y)
    assert [n.op_type for n in after.graph].count("Mul") == 1
    assert next(v for n in after.graph for v in n.outputs if v.name == tensor).producer().op_type == "Mul"
    same(before, after)


@pytest.mark.parametrize("case", ["output", "input", "reader", "shared"])
def test_a_multiplication_where_constants_cannot(case: str) -> None:
    net = Net()
    tensor = "x" if case == "input" else norm(net, "x") if case in ("output", "reader") else attention(net, "x")
    y = net.node("MatMul", tensor, net.draw(WIDTH, 3))
    others = {"output": [tensor], "reader": [net.node("Softmax", tensor)]}.get(case, [])
    if case == "shared":  # the values have another reader
        values = next(node for node in net.nodes if node.op_type == "Add").output[0]
        others = [net.node("Relu", values)]
    before, after = smoothed(net, tensor, y, *others)
    assert len(after.graph) == len(before.graph) + 1
    same(before, after)

"""Constants are folded, up to a size; equal nodes become one; what nothing reads goes."""

from __future__ import annotations

import numpy as np
import pytest

from examples.writer import Shape
from ingot.importers import onnx as importer
from ingot.ir import shapes
from ingot.passes.common import remove_dead
from ingot.passes.fold import fold
from tests.passes.support import Net, model_of, rewritten_same

X: dict[str, tuple[str, Shape]] = {"x": ("float32", ("N", 4))}


def test_a_chain_of_constants_is_one() -> None:
    net = Net()
    table = net.node("Exp", net.node("Mul", net.draw(4), net.constant(2.0)))
    assert rewritten_same(net, X, net.node("Add", "x", table), N=2).operators == {"Pointwise": 1}


def test_arithmetic_of_shapes_is_folded() -> None:
    net = Net()
    shape = net.node("Shape", "x")
    rows = net.node("Gather", shape, net.constant([0], "int64"))
    target = net.node("Concat", rows, net.constant([2, 2], "int64"), axis=0)
    result = rewritten_same(net, X, net.node("Reshape", net.node("Relu", "x"), target), N=3)
    assert result.operators == {"Pointwise": 1, "View": 1}


def test_an_output_that_is_constant_keeps_its_name() -> None:
    net = Net()
    y = net.node("Exp", net.constant([1.0, 2.0]))
    result = rewritten_same(net, X, net.node("Relu", "x"), y, N=2)
    assert [value.name for value in result.after.graph.outputs] == [value.name for value in result.before.graph.outputs]


@pytest.mark.parametrize(("limit", "folded"), [(1 << 20, 1), (1000, 0)])
def test_what_would_grow_beyond_the_limit_stays(limit: int, folded: int) -> None:
    net = Net()
    grown = net.node("Expand", net.constant([[1.0]]), net.constant([100, 4], "int64"))
    model = importer.load(model_of(net, {"x": ("float32", (100, 4))}, net.node("Add", "x", grown)))
    shapes.infer(model)
    assert fold(model, largest_growth=limit) == folded


def test_random_numbers_are_not_folded() -> None:
    net = Net()
    noise = net.node("RandomNormal", shape=[4])
    model = importer.load(model_of(net, X, net.node("Add", "x", noise)))
    shapes.infer(model)
    assert fold(model) == 0


def test_equal_nodes_become_one() -> None:
    net = Net()
    both = [net.node("Softmax", "x", axis=1) for _ in range(2)]
    result = rewritten_same(net, X, net.node("MatMul", both[0], net.draw(4, 2)), net.node("Neg", both[1]), N=2)
    assert result.operators["Softmax"] == 1


def test_nodes_with_other_settings_stay_apart() -> None:
    net = Net()
    both = [net.node("Softmax", "x", axis=axis) for axis in (0, 1)]
    result = rewritten_same(net, X, *(net.node("MatMul", value, net.draw(4, 2)) for value in both), N=2)
    assert result.operators["Softmax"] == 2


def test_equal_outputs_keep_a_node_each() -> None:
    net = Net()
    result = rewritten_same(net, X, *(net.node("Softmax", "x", axis=1) for _ in range(2)), N=2)
    assert result.operators["Softmax"] == 2


def test_equal_small_constants_are_one_initializer() -> None:
    net = Net()
    values = np.array([1, 2, 3, 4], np.float32)
    y = net.node("Mul", net.node("Add", "x", net.weight("a", values)), net.weight("b", values))
    result = rewritten_same(net, X, net.node("Relu", y), N=2)
    assert len(result.after.graph.initializers) == 1


def test_dead_nodes_and_their_weights_go() -> None:
    net = Net()
    net.node("MatMul", "x", net.draw(4, 4))
    model = importer.load(model_of(net, X, net.node("Relu", "x")))
    assert remove_dead(model) == 1
    assert len(model.graph) == 1 and not model.graph.initializers

"""What changes nothing goes, chains of moves become one: each rewrite where it fires, where it holds back, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from examples.writer import Shape
from ingot.passes.simplify import single_part
from tests.passes.support import Net, Rewritten, rewritten_same
from tests.passes.test_rewrite import RELU, Sketch

Inputs = dict[str, tuple[str, Shape]]
Write = Callable[[Net], str]
X: Inputs = {"x": ("float32", (2, 3, 4, 4))}


def ints(net: Net, *values: int) -> str:
    return net.constant(list(values), "int64")


def relu(net: Net, value: str) -> str:
    """Something for a move to stand before: the output of a graph keeps its node."""
    return net.node("Relu", value)


def cut(net: Net, x: str, start: int, end: int, axis: int = 1, step: int = 1) -> str:
    return net.node("Slice", x, ints(net, start), ints(net, end), ints(net, axis), ints(net, step))


def reduced(net: Net, x: str, *axes: int, op: str = "ReduceMean", keepdims: int = 1) -> str:
    return net.node(op, x, ints(net, *axes), keepdims=keepdims)


def pooled(net: Net, op: str, size: int, **given: Any) -> str:
    return net.node(op, "x", kernel_shape=[size, size], **given)


def spread(net: Net, x: str) -> str:
    return net.node("Expand", x, ints(net, 2, 3, 4, 4))


def split_then_joined(net: Net, axis: int) -> str:
    return net.node("Concat", *net.nodes_of("Split", "x", outputs=2, axis=2, num_outputs=2), axis=axis)


def top(net: Net, axis: int = 3, softmax_axis: int = 3) -> tuple[str, str]:
    shares = net.node("Softmax", "x", axis=softmax_axis)
    values, indices = net.nodes_of("TopK", shares, ints(net, 2), outputs=2, axis=axis)
    return values, indices


NOTHING: list[Write] = [
    lambda n: n.node("Reshape", "x", ints(n, 2, 3, 4, 4)),
    lambda n: cut(n, "x", 0, 3),
    lambda n: n.node("Expand", "x", ints(n, 2, 1, 4, 4)),
    lambda n: n.node("Pad", "x", ints(n, *[0] * 8)),
    lambda n: n.node("Tile", "x", ints(n, 1, 1, 1, 1)),
    lambda n: n.node("Concat", "x", axis=1),
    lambda n: n.nodes_of("Split", "x", outputs=1, axis=1, num_outputs=1)[0],
    lambda n: n.node("Identity", n.node("Dropout", n.node("Cast", "x", to=1))),
]


@pytest.mark.parametrize("write", NOTHING)
def test_what_does_nothing_leaves_nothing(write: Write) -> None:
    net = Net()
    assert rewritten_same(net, X, relu(net, write(net))).operators == {"Pointwise": 1}


def test_a_single_part_left_by_others_goes() -> None:
    sketch = Sketch()
    sketch.finish(sketch.pointwise(RELU, sketch.node("Concat", sketch.inputs[0], axis=0)))
    assert [entry.rewrite for entry in sketch.apply(single_part).fired] == ["single part"]
    assert len(sketch.graph) == 1


def there_and_back(net: Net) -> str:
    return net.node("Reshape", net.node("Reshape", "x", ints(net, 6, 16)), ints(net, 2, 3, 4, 4))


FIRES: list[tuple[str, Write, dict[str, int]]] = [
    ("same as input", lambda n: relu(n, there_and_back(n)), {"Pointwise": 1}),
    ("pool of one", lambda n: relu(n, pooled(n, "MaxPool", 1)), {"Pointwise": 1}),
    ("global pool", lambda n: pooled(n, "AveragePool", 4), {"Reduce": 1}),
    ("global pool", lambda n: pooled(n, "MaxPool", 4), {"Reduce": 1}),
    ("views", lambda n: n.node("Reshape", n.node("Reshape", "x", ints(n, 6, 16)), ints(n, 3, 32)), {"View": 1}),
    ("transposes", lambda n: n.node("Transpose", n.node("Transpose", "x", perm=[1, 0, 3, 2]), perm=[3, 2, 1, 0]),
     {"Transpose": 1}),
    ("slices", lambda n: cut(n, cut(n, "x", 1, 4, 2), 1, 3, 2), {"Slice": 1}),
    ("concats", lambda n: n.node("Concat", n.node("Concat", "x", relu(n, "x"), axis=1), "x", axis=1),
     {"Pointwise": 1, "Concat": 1}),
    ("split and joined", lambda n: relu(n, split_then_joined(n, 2)), {"Pointwise": 1}),
    ("expands", lambda n: n.node("Expand", spread(n, reduced(n, "x", 1)), ints(n, 5, 2, 3, 4, 4)),
     {"Reduce": 1, "Expand": 1}),
    ("broadcast operand", lambda n: n.node("Add", "x", spread(n, reduced(n, "x", 1))),
     {"Reduce": 1, "Pointwise": 1}),
    ("reduce transposed", lambda n: reduced(n, n.node("Transpose", "x", perm=[0, 2, 3, 1]), 1, 2),
     {"Reduce": 1, "View": 1}),
    ("reduce viewed", lambda n: reduced(n, n.node("Reshape", "x", ints(n, 2, 3, 16)), 2, keepdims=0), {"Reduce": 1}),
    ("squeezed reduce", lambda n: n.node("Squeeze", reduced(n, "x", 2, 3), ints(n, 2, 3)), {"Reduce": 1}),
    ("extreme of softmax", lambda n: n.node("ArgMax", n.node("Softmax", "x", axis=3), axis=3), {"Reduce": 1}),
    ("top of softmax", lambda n: top(n)[1], {"TopK": 1}),
    ("log softmax", lambda n: n.node("Log", n.node("Softmax", "x", axis=1)), {"Softmax": 1}),
    ("simpler expression", lambda n: n.node("Exp", n.node("Mul", n.node("Add", "x", n.constant(0.0)), n.constant(1.0))),
     {"Pointwise": 1}),
    ("transposed operand", lambda n: n.node("MatMul", "x", n.node("Transpose", "x", perm=[0, 1, 3, 2])), {"MatMul": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "operators"), FIRES, ids=[case[0] for case in FIRES])
def test_fires(name: str, write: Write, operators: dict[str, int]) -> None:
    net = Net()
    result = rewritten_same(net, X, write(net))
    assert result.fired(name) >= 1
    assert result.operators == operators


STAYS: list[tuple[str, Write, str]] = [
    ("same as input", lambda n: relu(n, cut(n, "x", 0, 2)), "Slice"),
    ("same as input", lambda n: relu(n, cut(n, "x", 3, -4, 1, -1)), "Slice"),
    ("pool of one", lambda n: pooled(n, "MaxPool", 1, strides=[2, 2]), "Pool"),
    ("global pool", lambda n: pooled(n, "AveragePool", 3), "Pool"),
    ("global pool", lambda n: pooled(n, "MaxPool", 4, pads=[1, 1, 1, 1]), "Pool"),
    ("split and joined", lambda n: split_then_joined(n, 3), "Split"),
    ("concats", lambda n: n.node("Concat", n.node("Concat", "x", relu(n, "x"), axis=2), n.draw(2, 1, 8, 4), axis=1),
     "Concat"),
    ("squeezed reduce", lambda n: n.node("Reshape", reduced(n, "x", 3), ints(n, 3, 2, 4)), "View"),
    ("reduce viewed", lambda n: reduced(n, n.node("Reshape", "x", ints(n, 2, 12, 4)), 1), "View"),
    ("broadcast operand", lambda n: n.node("Add", spread(n, reduced(n, "x", 0)), n.draw(1)), "Expand"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "operator"), STAYS, ids=[case[0] for case in STAYS])
def test_stays(name: str, write: Write, operator: str) -> None:
    net = Net()
    result = rewritten_same(net, X, write(net))
    assert not result.fired(name) and result.operators[operator] >= 1


REFUSED: list[tuple[str, Write, str]] = [
    ("reduce transposed", lambda n: reduced(n, n.node("Transpose", "x", perm=[3, 2, 1, 0]), 1), "change their order"),
    ("extreme of softmax", lambda n: n.node("ArgMax", n.node("Softmax", "x", axis=1), axis=3), "along another axis"),
    ("top of softmax", lambda n: top(n, softmax_axis=1)[1], "along another axis"),
    ("top of softmax", lambda n: top(n)[0], "the values are read too"),
]


@pytest.mark.parametrize(("name", "write", "reason"), REFUSED)
def test_refused(name: str, write: Write, reason: str) -> None:
    net = Net()
    result = rewritten_same(net, X, write(net))
    assert not result.fired(name) and any(reason in said for said in result.reasons(name))


def both(write: Callable[[Net], tuple[str, str]]) -> Rewritten:
    """A model with two outputs: the moved value is used elsewhere too."""
    net = Net()
    return rewritten_same(net, X, *write(net))


def shared_softmax(net: Net) -> tuple[str, str]:
    shares = net.node("Softmax", "x", axis=1)
    return net.node("Log", shares), shares


def test_a_logarithm_leaves_probabilities_that_are_used_elsewhere() -> None:
    result = both(shared_softmax)
    assert not result.fired("log softmax") and any("used elsewhere" in said for said in result.reasons("log softmax"))


def shared_concat(net: Net) -> tuple[str, str]:
    inner = net.node("Concat", "x", relu(net, "x"), axis=1)
    return net.node("Concat", inner, "x", axis=1), inner


def test_a_joined_value_used_elsewhere_is_joined_once() -> None:
    result = both(shared_concat)
    assert not result.fired("concats") and result.operators["Concat"] == 2


def shared_reduce(net: Net) -> tuple[str, str]:
    kept = reduced(net, "x", 2, 3)
    return net.node("Squeeze", kept, ints(net, 2, 3)), kept


def test_a_mean_used_elsewhere_keeps_its_axes() -> None:
    assert not both(shared_reduce).fired("squeezed reduce")


def test_readers_of_a_shared_move_read_past_it() -> None:
    def write(net: Net) -> tuple[str, str]:
        view = net.node("Reshape", "x", ints(net, 6, 16))
        return net.node("Reshape", view, ints(net, 3, 32)), view

    result = both(write)
    assert result.fired("views") == 1
    assert [node.inputs[0].name for node in result.nodes if node.inputs[0]] == ["x", "x"]


def test_epilogues_are_simplified_too() -> None:
    net = Net()
    y = net.node("Relu", net.node("Relu", net.node("MatMul", "x", net.draw(4, 5))))
    result = rewritten_same(net, X, y)
    assert result.operators == {"Linear": 1}
    assert result.only("Linear").attributes["epilogue"].value == "Relu %0 -> float32"


def test_a_reduction_of_one_element_is_a_view() -> None:
    net = Net()
    result = rewritten_same(net, {"x": ("float32", (2, 1, 4, 1))}, relu(net, reduced(net, "x", 1, 3, keepdims=0)))
    assert result.fired("reduce of one") == 1 and result.operators["Reduce"] == 0


def test_the_sum_of_squares_of_one_element_is_no_view() -> None:
    net = Net()
    result = rewritten_same(net, {"x": ("float32", (2, 1, 4))}, reduced(net, "x", 1, op="ReduceSumSquare"))
    assert not result.fired("reduce of one") and result.operators["Reduce"] == 1


def test_a_slice_of_the_first_sizes_needs_no_host() -> None:
    """The places of a transformer: `table[:S]`, where S is the length of the input."""
    net = Net()
    length = net.node("Slice", net.node("Shape", "x"), ints(net, 1), ints(net, 2))
    table = net.weight("table", np.arange(64, dtype=np.float32).reshape(16, 4))
    y = net.node("Add", "x", net.node("Slice", table, ints(net, 0), length, ints(net, 0)))
    result = rewritten_same(net, {"x": ("float32", ("N", "S", 4))}, y, N=2, S=7)
    assert result.operators == {"Slice": 1, "Pointwise": 1} and not result.report.remaining

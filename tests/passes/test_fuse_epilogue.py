"""Elementwise work after products, convolutions, reductions and norms becomes their epilogue, residuals included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from examples.writer import Shape
from ingot.ir.provenance import origins
from tests.passes.support import Net, Rewritten, rewritten_same

Inputs = dict[str, tuple[str, Shape]]
IMAGE: Inputs = {"x": ("float32", ("N", 4, 5, 6)), "r": ("float32", ("N", 8, 3, 4))}
ROWS: Inputs = {"x": ("float32", ("N", 3, 8)), "r": ("float32", ("N", 3, 6))}
Write = Callable[[Net, str], str]


def conv(net: Net, bias: bool = True) -> str:
    return net.node("Conv", "x", net.draw(8, 4, 3, 3), *([net.draw(8)] if bias else []))


def linear(net: Net) -> str:
    return net.node("Add", net.node("MatMul", "x", net.draw(8, 6)), net.draw(6))


def text(result: Rewritten, op: str) -> str:
    return str(result.only(op).attributes["epilogue"].value)


def gelu(net: Net, y: str) -> str:
    inner = net.node("Erf", net.node("Div", y, net.constant(2.0**0.5)))
    return net.node("Mul", net.node("Mul", y, net.node("Add", inner, net.constant(1.0))), net.constant(0.5))


ACTIVATIONS: dict[str, tuple[Write, str]] = {
    "relu": (lambda n, y: n.node("Relu", y), "Relu"),
    "clip": (lambda n, y: n.node("Clip", y, n.constant(0.0), n.constant(6.0)), "Clip"),
    "gelu": (gelu, "Gelu"),
    "silu": (lambda n, y: n.node("Mul", y, n.node("Sigmoid", y)), "Sigmoid"),
    "hard-swish": (lambda n, y: n.node("HardSwish", y), "HardSwish"),
    "leaky": (lambda n, y: n.node("LeakyRelu", y, alpha=0.2), "LeakyRelu"),
    "prelu of one slope": (lambda n, y: n.node("PRelu", y, n.constant([0.2])), ""),
    "mish": (lambda n, y: n.node("Mul", y, n.node("Tanh", n.node("Softplus", y))), "Tanh"),
    "sum with a residual": (lambda n, y: n.node("Add", y, "r"), "Add"),
    "least of it and a residual": (lambda n, y: n.node("Min", y, "r"), "Min"),
    "greatest of it and a residual": (lambda n, y: n.node("Max", "r", y), "Max"),
    "a gate": (lambda n, y: n.node("Mul", "r", n.node("Sigmoid", y)), "Sigmoid"),
    "residual, then relu": (lambda n, y: n.node("Relu", n.node("Add", "r", y)), "Relu"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("op", ["Conv", "Linear"])
def test_what_follows_becomes_the_epilogue(op: str, name: str) -> None:
    net = Net()
    write, instruction = ACTIVATIONS[name]
    inputs = IMAGE if op == "Conv" else ROWS
    result = rewritten_same(net, inputs, write(net, conv(net) if op == "Conv" else linear(net)), N=2)
    assert result.operators == {op: 1} and instruction in text(result, op)


OTHERS: dict[str, tuple[str, Write]] = {
    "MatMul": ("MatMul", lambda n, x: n.node("MatMul", x, n.node("Transpose", x, perm=[0, 1, 3, 2]))),
    "ConvTranspose": ("ConvTranspose", lambda n, x: n.node("ConvTranspose", x, n.draw(4, 6, 3, 3))),
    "Reduce": ("Reduce", lambda n, x: n.node("ReduceMean", x, n.constant([2, 3], "int64"))),
    "Norm": ("Norm", lambda n, x: n.node("LayerNormalization", x, n.draw(6), n.draw(6))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operators_take_epilogues(name: str) -> None:
    op, write = OTHERS[name]
    net = Net()
    y = net.node("Sigmoid", net.node("Mul", write(net, "x"), net.constant(0.1)))
    result = rewritten_same(net, {"x": IMAGE["x"]}, y, N=2)
    assert result.operators == {op: 1} and "Sigmoid" in text(result, op)


def test_the_block_of_a_residual_network_is_two_convolutions() -> None:
    net = Net()
    first = net.node("Relu", net.node("Conv", "x", net.draw(4, 4, 3, 3), pads=[1] * 4))
    second = net.node("Conv", first, net.draw(4, 4, 3, 3), pads=[1] * 4)
    result = rewritten_same(net, {"x": IMAGE["x"]}, net.node("Relu", net.node("Add", second, "x")), N=2)
    assert result.operators == {"Conv": 2}


def test_the_longer_sums_take_the_residual() -> None:
    """Both convolutions could add the other's result: the 3x3 one does, the 1x1 one is its operand."""
    net = Net()
    long, short = net.node("Conv", "x", net.draw(8, 4, 3, 3), pads=[1] * 4), net.node("Conv", "x", net.draw(8, 4, 1, 1))
    result = rewritten_same(net, {"x": IMAGE["x"]}, net.node("Add", long, short), N=2)
    taking = [node for node in result.nodes if node.attributes["epilogue"].value]
    assert result.operators == {"Conv": 2} and len(taking) == 1
    assert taking[0].attributes["pads"].value == (1, 1, 1, 1)


def test_the_epilogue_knows_the_nodes_it_came_from() -> None:
    net = Net()
    product = net.node("MatMul", "x", net.draw(8, 6), name="product")
    y = net.node("Relu", net.node("Add", product, "r", name="residual"), name="last")
    assert set(origins(rewritten_same(net, ROWS, y, N=2).only("Linear"))) == {"product", "residual", "last"}


REFUSED: dict[str, tuple[Inputs, Write, str]] = {
    "a row that runs across the channels": (
        {"v": ("float32", (3, 1))}, lambda n, y: n.node("Mul", y, "v"), "neither a scalar"),
    "a result that is broadcast": (
        {"v": ("float32", (7, 2, 3, 6))}, lambda n, y: n.node("Add", y, "v"), "the result is broadcast"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_operands_that_an_epilogue_cannot_take(name: str) -> None:
    inputs, write, reason = REFUSED[name]
    net = Net()
    result = rewritten_same(net, {"x": ("float32", (2, 3, 8)), **inputs}, write(net, linear(net)))
    assert result.operators == {"Linear": 1, "Pointwise": 1}
    assert any(reason in said for said in result.reasons("epilogue"))


def test_a_result_used_elsewhere_keeps_its_own_step() -> None:
    net = Net()
    y = linear(net)
    result = rewritten_same(net, ROWS, net.node("Relu", y), net.node("Exp", y), N=2)
    assert result.operators == {"Linear": 1, "Pointwise": 2}
    assert any("used elsewhere" in said for said in result.reasons("epilogue"))


def test_an_epilogue_does_not_grow_without_end() -> None:
    net = Net()
    y = linear(net)
    for index in range(30):
        y = net.node("Sin" if index % 2 else "Cos", y)
    result = rewritten_same(net, ROWS, y, N=2)
    assert result.operators["Linear"] == 1 and result.operators["Pointwise"] >= 1
    assert any("24 instructions" in said for said in result.reasons("epilogue") + result.reasons("pointwise chain"))


def test_places_of_the_largest_take_no_epilogue() -> None:
    net = Net()
    y = net.node("Cast", net.node("ArgMax", "x", axis=1), to=1)
    result = rewritten_same(net, {"x": IMAGE["x"]}, y, N=2)
    assert result.operators == {"Reduce": 1, "Pointwise": 1}


def test_half_precision_keeps_its_type() -> None:
    net = Net()
    weight = net.weight("w", np.linspace(-1, 1, 48).reshape(8, 6).astype(np.float16))
    inputs: dict[str, Any] = {"x": ("float16", (2, 3, 8))}
    result = rewritten_same(net, inputs, net.node("Relu", net.node("MatMul", "x", weight)), rtol=1e-2)
    assert text(result, "Linear") == "Relu %0 -> float16"


def test_a_scaled_residual_is_scaled_in_the_epilogue() -> None:
    net = Net()
    residual = net.node("Mul", net.node("Transpose", "r", perm=[0, 1, 2]), net.draw(6))
    result = rewritten_same(net, ROWS, net.node("Add", linear(net), residual), N=2)
    assert result.fired("operand chain") == 1 and "Pointwise" not in result.operators


@pytest.mark.parametrize("case", ["used elsewhere", "a vector of rows", "dear"])
def test_a_residual_that_is_made_before(case: str) -> None:
    net = Net()
    made = {"used elsewhere": lambda: net.node("Mul", "r", net.draw(6)),
            "a vector of rows": lambda: net.node("Mul", "r", net.draw(3, 1)),
            "dear": lambda: net.node("Tanh", net.node("Mul", "r", net.draw(6)))}[case]()  # fmt: skip
    outputs = [net.node("Add", linear(net), made), *([made] if case == "used elsewhere" else [])]
    result = rewritten_same(net, ROWS, *outputs, N=2)
    assert result.fired("operand chain") == 0

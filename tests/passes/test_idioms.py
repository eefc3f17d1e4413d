"""Activations, softmax and reductions that exporters spell out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from ingot.passes.idioms import IDIOMS
from tests.passes.support import Net, Rewritten, assert_same, model_of, rewritten_same, through

X = {"x": ("float32", (2, 3, 8))}
Write = Callable[[Net], str]


def c(net: Net, number: float) -> str:
    return net.constant(number)


def gelu(net: Net, order: int = 0, by_product: bool = False, one: float = 1.0) -> str:
    inner = net.node("Mul", "x", c(net, 0.5**0.5)) if by_product else net.node("Div", "x", c(net, 2**0.5))
    gate = net.node("Add", net.node("Erf", inner), c(net, one))
    if order == 0:
        return net.node("Mul", net.node("Mul", "x", gate), c(net, 0.5))
    if order == 1:
        return net.node("Mul", net.node("Mul", c(net, 0.5), "x"), gate)
    return net.node("Mul", "x", net.node("Mul", gate, c(net, 0.5)))


def gelu_tanh(net: Net, cube: str = "pow", factor: float = 0.044715) -> str:
    k = c(net, math.sqrt(2 / math.pi))
    if cube == "factored":
        square = net.node("Mul", "x", "x")
        inner = net.node("Mul", "x", net.node("Add", net.node("Mul", square, c(net, factor)), c(net, 1)))
        argument = net.node("Mul", k, inner)
    else:
        third = net.node("Pow", "x", c(net, 3)) if cube == "pow" else net.node("Mul", net.node("Mul", "x", "x"), "x")
        argument = net.node("Mul", net.node("Add", "x", net.node("Mul", third, c(net, factor))), k)
    gate = net.node("Add", net.node("Tanh", argument), c(net, 1))
    return net.node("Mul", net.node("Mul", "x", c(net, 0.5)), gate)


def hard_swish(net: Net, form: str = "inside", width: float = 6) -> str:
    clipped = net.node("Clip", net.node("Add", "x", c(net, 3)), c(net, 0), c(net, width))
    if form == "inside":
        return net.node("Mul", "x", net.node("Div", clipped, c(net, 6)))
    return net.node("Div", net.node("Mul", "x", clipped), c(net, 6))


def sigmoid(net: Net, form: str = "reciprocal") -> str:
    total = net.node("Add", c(net, 1), net.node("Exp", net.node("Neg", "x")))
    return net.node("Reciprocal", total) if form == "reciprocal" else net.node("Div", c(net, 1), total)


def softmax(net: Net, shift: bool = True, axis: int = -1, peak_axis: int | None = None) -> str:
    value = "x"
    if shift:
        peak = net.node("ReduceMax", "x", net.constant([axis if peak_axis is None else peak_axis], "int64"), keepdims=1)
        value = net.node("Sub", "x", peak)
    powers = net.node("Exp", value)
    return net.node("Div", powers, net.node("ReduceSum", powers, net.constant([axis], "int64"), keepdims=1))


def log_softmax(net: Net) -> str:
    axes = net.constant([1], "int64")
    shifted = net.node("Sub", "x", net.node("ReduceMax", "x", axes, keepdims=1))
    return net.node("Sub", shifted, net.node("Log", net.node("ReduceSum", net.node("Exp", shifted), axes, keepdims=1)))


def summed(net: Net, value: str, keepdims: int = 0) -> str:
    return net.node("ReduceSum", value, net.constant([2], "int64"), keepdims=keepdims)


def stable_log_sum_exp(net: Net, axis: int = 2) -> str:
    peak = net.node("ReduceMax", "x", net.constant([axis], "int64"), keepdims=1)
    total = summed(net, net.node("Exp", net.node("Sub", "x", peak)), keepdims=1)
    return net.node("Add", net.node("Log", total), peak)


def run(write: Write) -> Rewritten:
    net = Net()
    return rewritten_same(net, X, write(net))


CASES: list[tuple[str, Write, str, str]] = [
    ("gelu", gelu, "Pointwise", "Gelu %0 -> float32"),
    ("gelu", lambda net: gelu(net, 1, True), "Pointwise", "Gelu %0 -> float32"),
    ("gelu", lambda net: gelu(net, 2), "Pointwise", "Gelu %0 -> float32"),
    ("gelu tanh", gelu_tanh, "Pointwise", "GeluTanh %0 -> float32"),
    ("gelu tanh", lambda net: gelu_tanh(net, "mul"), "Pointwise", "GeluTanh %0 -> float32"),
    ("gelu tanh", lambda net: gelu_tanh(net, "factored"), "Pointwise", "GeluTanh %0 -> float32"),
    ("hard sigmoid", hard_swish, "Pointwise", "HardSwish %0 -> float32"),
    ("hard swish gated", hard_swish, "Pointwise", "HardSwish %0 -> float32"),
    ("hard swish", lambda net: hard_swish(net, "outside"), "Pointwise", "HardSwish %0 -> float32"),
    ("sigmoid", sigmoid, "Pointwise", "Sigmoid %0 -> float32"),
    ("sigmoid", lambda net: sigmoid(net, "div"), "Pointwise", "Sigmoid %0 -> float32"),
    ("silu", lambda net: net.node("Mul", "x", net.node("Sigmoid", "x")), "Pointwise",
     "Sigmoid %0 -> float32; Mul %0 $0 -> float32"),
    ("softplus", lambda net: net.node("Log", net.node("Add", net.node("Exp", "x"), c(net, 1))), "Pointwise",
     "Softplus %0 -> float32"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "op", "text"), CASES)
def test_activations(name: str, write: Write, op: str, text: str) -> None:
    result = run(write)
    assert result.fired(name) == 1
    assert result.only(op).attributes["expression"].as_string() == text
    assert len(result.nodes) == 1


@pytest.mark.parametrize(
    ("name", "write"),
    [("gelu", lambda net: gelu(net, one=1.1)), ("gelu tanh", lambda net: gelu_tanh(net, factor=0.05)),
     ("hard swish", lambda net: hard_swish(net, "outside", 5.0))],
)  # fmt: skip
def test_other_constants_are_other_functions(name: str, write: Write) -> None:
    result = run(write)
    assert not result.fired(name)
    assert any("expected the constant" in reason for reason in result.reasons(name)) or len(result.nodes) == 1


def test_a_gate_used_elsewhere_keeps_the_primitives() -> None:
    net = Net()
    y = gelu(net)
    erf = next(node.output[0] for node in net.nodes if node.op_type == "Erf")
    result = through(model_of(net, X, y, erf), IDIOMS)
    assert not result.fired("gelu")
    assert any("used elsewhere" in reason or "expected" in reason for reason in result.reasons("gelu"))
    assert_same(result)


REDUCTIONS: list[tuple[str, Write, str, dict[str, object]]] = [
    ("softmax", softmax, "Softmax", {"axis": 2, "log": 0}),
    ("shifted softmax", softmax, "Softmax", {"axis": 2}),
    ("softmax", lambda net: softmax(net, shift=False, axis=1), "Softmax", {"axis": 1, "log": 0}),
    ("log softmax of sum", log_softmax, "Softmax", {"axis": 1, "log": 1}),
    ("log softmax", lambda net: net.node("Log", net.node("Softmax", "x", axis=1)), "Softmax", {"axis": 1, "log": 1}),
    ("l2 norm", lambda net: net.node("Sqrt", summed(net, net.node("Mul", "x", "x"))), "Reduce", {"kind": "l2"}),
    ("l2 norm", lambda net: net.node("Sqrt", summed(net, net.node("Pow", "x", c(net, 2)))), "Reduce", {"kind": "l2"}),
    ("l1 norm", lambda net: summed(net, net.node("Abs", "x"), 1), "Reduce", {"kind": "l1", "keepdims": 1}),
    ("sum of squares", lambda net: summed(net, net.node("Mul", "x", "x")), "Reduce", {"kind": "sumsquare"}),
    ("log sum exp", lambda net: net.node("Log", summed(net, net.node("Exp", "x"))), "Reduce", {"kind": "logsumexp"}),
    ("stable log sum exp", stable_log_sum_exp, "Reduce", {"kind": "logsumexp", "keepdims": 1}),
]


@pytest.mark.parametrize(("name", "write", "op", "settings"), REDUCTIONS)
def test_reductions(name: str, write: Write, op: str, settings: dict[str, object]) -> None:
    result = run(write)
    assert result.fired(name) == 1 and len(result.nodes) == 1
    node = result.only(op)
    assert {key: node.attributes[key].value for key in settings} == settings


def test_a_softmax_over_several_axes_stays() -> None:
    net = Net()
    powers = net.node("Exp", "x")
    total = net.node("ReduceSum", powers, net.constant([1, 2], "int64"), keepdims=1)
    result = rewritten_same(net, X, net.node("Div", powers, total))
    assert not result.fired("softmax") and result.reasons("softmax")[0].startswith("the sum is not along one")


def test_a_peak_over_another_axis_is_no_log_sum_exp() -> None:
    result = run(lambda net: stable_log_sum_exp(net, axis=0))
    assert not result.fired("stable log sum exp")
    assert result.reasons("stable log sum exp")[0].startswith("the maximum is over other axes")


def test_a_peak_along_another_axis_is_no_shift() -> None:
    result = run(lambda net: softmax(net, axis=-1, peak_axis=1))
    assert result.fired("softmax") == 1 and not result.fired("shifted softmax")
    assert result.reasons("shifted softmax")[0].startswith("the maximum is along another axis")


def test_powers_used_elsewhere_keep_the_sum() -> None:
    net = Net()
    powers = net.node("Exp", "x")
    y = net.node("Log", summed(net, powers))
    result = rewritten_same(net, X, y, powers)
    assert not result.fired("log sum exp") and any("used elsewhere" in r for r in result.reasons("log sum exp"))

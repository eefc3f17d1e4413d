"""Chains of elementwise work become one Pointwise."""

from __future__ import annotations

from examples.writer import Shape
from ingot.passes.facts import MAX_INSTRUCTIONS
from tests.passes.support import Net, Rewritten, rewritten_same

X: dict[str, tuple[str, Shape]] = {"x": ("float32", ("N", 4, 5)), "y": ("float32", ("N", 4, 5))}


def expression(result: Rewritten) -> str:
    return str(result.only("Pointwise").attributes["expression"].value)


def test_a_chain_is_one_node() -> None:
    net = Net()
    z = net.node("Tanh", net.node("Mul", net.node("Add", "x", "y"), net.node("Exp", "x")))
    result = rewritten_same(net, X, z, N=2)
    assert result.operators == {"Pointwise": 1} and result.fired("pointwise chain") >= 1


def test_scale_and_activation() -> None:
    net = Net()
    scaled = net.node("Add", net.node("Mul", "x", net.draw(4, 1)), net.draw(4, 1))
    result = rewritten_same(net, X, net.node("Sigmoid", scaled), N=2)
    assert result.operators == {"Pointwise": 1} and result.fired("unary chain") >= 1
    assert len(result.only("Pointwise").inputs) == 3


def test_what_parts_have_in_common_is_computed_once() -> None:
    net = Net()
    power = net.node("Exp", net.node("Neg", "x"))
    result = rewritten_same(net, X, net.node("Div", power, net.node("Add", power, "y")), N=2)
    assert expression(result).count("Exp") == 1


def test_a_costly_value_used_elsewhere_is_computed_once() -> None:
    net = Net()
    power = net.node("Exp", "x")
    result = rewritten_same(net, X, net.node("Add", power, "y"), net.node("Tanh", net.node("Mul", power, "y")), N=2)
    assert sum("Exp" in node.attributes["expression"].value for node in result.nodes) == 1
    assert any("used elsewhere too and is not trivial" in said for said in result.reasons("pointwise chain"))


def test_a_cheap_value_is_computed_by_each_reader() -> None:
    net = Net()
    negative = net.node("Neg", "x")
    outputs = [net.node("Mul", negative, "y"), net.node("Exp", net.node("Sub", negative, "y"))]
    result = rewritten_same(net, X, *outputs, N=2)
    assert result.operators == {"Pointwise": 2}


def test_an_output_of_the_graph_is_kept() -> None:
    net = Net()
    negative = net.node("Neg", "x")
    result = rewritten_same(net, X, net.node("Mul", negative, "y"), negative, N=2)
    assert result.operators == {"Pointwise": 2}


def test_a_smaller_operand_is_not_computed_over_and_over() -> None:
    net = Net()
    result = rewritten_same(net, {**X, "z": ("float32", (5,))}, net.node("Add", "x", net.node("Exp", "z")), N=2)
    assert result.operators == {"Pointwise": 2} and not result.fired("pointwise chain")


def test_chains_end_at_the_limit() -> None:
    net, value = Net(), "x"
    for index in range(3 * MAX_INSTRUCTIONS):
        value = net.node("Sin" if index % 2 else "Cos", value)
    result = rewritten_same(net, {"x": X["x"]}, value, N=2)
    assert 3 <= result.operators["Pointwise"] <= 6
    assert any("instructions" in said for said in result.reasons("pointwise chain"))


def test_narrow_values_are_widened_by_every_reader() -> None:
    net = Net()
    wide = net.node("Cast", "x", to=1)
    outputs = [net.node(op, wide) for op in ("Exp", "Tanh")]
    result = rewritten_same(net, {"x": ("uint8", (3, 5))}, *outputs, rtol=1e-3)
    assert result.operators == {"Pointwise": 2} and result.fired("widening") == 2
    assert all(node.inputs[0] is result.after.graph.inputs[0] for node in result.nodes)


def test_narrowing_is_done_once() -> None:
    net = Net()
    narrow = net.node("Cast", "x", to=6)
    outputs = [net.node("Abs", narrow), net.node("Neg", narrow), net.node("Identity", narrow)]
    result = rewritten_same(net, {"x": ("float64", (3, 5))}, *outputs)
    assert not result.fired("widening")

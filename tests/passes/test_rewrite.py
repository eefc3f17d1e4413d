"""The engine: matching with commuting and choices, uses elsewhere, order, provenance, reasons, fixpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from ingot.errors import BuildError
from ingot.ir.graph import add_constant, make_node, set_type
from ingot.ir.ops import TensorType
from ingot.ir.provenance import origins
from ingot.passes.pattern import describe, roots_of, size_of, trace
from ingot.passes.rewrite import Builder, Journal, Result, Rewrite, Table, reject, rewrite, rewrite_node


class Sketch:
    """A canonical graph over inputs x, y of [4] floats, built by hand."""

    def __init__(self) -> None:
        self.inputs = [self.value(name) for name in "xy"]
        self.graph = ir.Graph(self.inputs, [], nodes=[], opset_imports={"": 20, "ingot": 1}, name="sketch")

    def value(self, name: str) -> ir.Value:
        value = ir.Value(name=name)
        set_type(value, TensorType("float32", (4,)))
        return value

    def node(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = make_node(op, inputs, attributes, name=f"{op}{len(self.graph)}")
        self.graph.append(node)
        return node.outputs[0]

    def pointwise(self, text: str, *inputs: ir.Value) -> ir.Value:
        return self.node("Pointwise", *inputs, expression=text)

    def finish(self, *outputs: ir.Value) -> Sketch:
        self.graph.outputs.extend(outputs)
        return self

    def apply(self, *rewrites: Rewrite) -> Journal:
        journal = Journal()
        Table("test", rewrites).apply(self.graph, journal)
        return journal

    def texts(self) -> list[str]:
        return [node.attributes["expression"].as_string() for node in self.graph]


ADD, RELU, EXP = "Add %0 %1 -> float32", "Relu %0 -> float32", "Exp %0 -> float32"


@rewrite(lambda op, x, y: op.Relu(op.Add(x, op.Exp(y))))
def relu_of_sum(op: Builder, x: ir.Value, y: ir.Value) -> Result:
    """Relu(x + exp(y)) => one expression"""
    return op.Pointwise(x, y, expression="Exp %1 -> float32; Add %0 $0 -> float32; Relu $1 -> float32")


def relu_sum(sketch: Sketch, first: bool) -> ir.Value:
    x, y = sketch.inputs
    power = sketch.pointwise(EXP, y)
    return sketch.pointwise(RELU, sketch.pointwise(ADD, *((power, x) if first else (x, power))))


@pytest.mark.parametrize("first", [True, False])
def test_sums_commute(first: bool) -> None:
    sketch = Sketch()
    sketch.finish(relu_sum(sketch, first))
    journal = sketch.apply(relu_of_sum)
    (node,) = sketch.graph
    assert node.inputs == tuple(sketch.inputs)
    assert [entry.rewrite for entry in journal.fired] == ["relu of sum"]


def test_an_interior_used_elsewhere_is_named() -> None:
    sketch = Sketch()
    y = relu_sum(sketch, False)
    inner = y.producer().inputs[0]  # type: ignore[union-attr]
    sketch.finish(y, sketch.pointwise(EXP, inner))
    journal = sketch.apply(relu_of_sum)
    assert not journal.fired and len(sketch.graph) == 4
    (refused,) = journal.refused
    assert refused.node == "Pointwise2" and "used elsewhere" in refused.reason and "Pointwise1" in refused.reason


def test_an_interior_that_is_an_output_is_kept() -> None:
    sketch = Sketch()
    y = relu_sum(sketch, False)
    sketch.finish(y, y.producer().inputs[0])  # type: ignore[union-attr, arg-type]
    assert not sketch.apply(relu_of_sum).fired


def test_a_near_miss_says_what_was_expected() -> None:
    sketch = Sketch()
    x, y = sketch.inputs
    sketch.finish(sketch.pointwise(RELU, sketch.pointwise(ADD, x, sketch.pointwise("Log %0 -> float32", y))))
    (refused,) = sketch.apply(relu_of_sum).refused
    assert refused.reason.startswith("expected Exp, found ")


def test_a_shared_interior_may_be_used_elsewhere() -> None:
    @rewrite(lambda op, x: op.Relu(op.shared(op.Exp(x))))
    def positive(op: Builder, x: ir.Value) -> Result:
        """Relu(exp(x)) => exp(x)"""
        return op.Pointwise(x, expression=EXP)

    sketch = Sketch()
    power = sketch.pointwise(EXP, sketch.inputs[0])
    sketch.finish(sketch.pointwise(RELU, power), power)
    assert len(sketch.apply(positive).fired) == 1
    assert sketch.texts() == [EXP, EXP]


@rewrite(lambda op, x: op.either(op.Mul(x, 0.5), op.Div(x, 2)))
def half(op: Builder, x: ir.Value) -> Result:
    """x / 2 => Exp(x), to see that it fired"""
    return op.Pointwise(x, expression=EXP)


@pytest.mark.parametrize(
    ("text", "matches"),
    [("Mul %0 0.5 -> float32", True), ("Mul 0.5 %0 -> float32", True), ("Div %0 2 -> float32", True),
     ("Div 2 %0 -> float32", False), ("Mul %0 0.51 -> float32", False)],
)  # fmt: skip
def test_numbers_and_choices(text: str, matches: bool) -> None:
    sketch = Sketch()
    sketch.finish(sketch.pointwise(text, sketch.inputs[0]))
    assert bool(sketch.apply(half).fired) == matches


def test_a_constant_of_one_element_is_a_number() -> None:
    sketch = Sketch()
    number = add_constant(sketch.graph, np.array([0.5], np.float32))
    sketch.finish(sketch.pointwise("Mul %0 %1 -> float32", sketch.inputs[0], number))
    assert len(sketch.apply(half).fired) == 1


def test_a_number_is_bound_and_a_variable_used_twice_is_one_value() -> None:
    seen: list[float] = []

    @rewrite(lambda op, x, k: op.Add(op.Mul(x, op.number(k)), x))
    def record(op: Builder, x: ir.Value, k: float) -> Result:
        """x * k + x => nothing, k is recorded"""
        seen.append(k)
        return None

    sketch = Sketch()
    x, y = sketch.inputs
    scaled = sketch.pointwise("Mul %0 3.5 -> float32", x)
    sketch.finish(sketch.pointwise(ADD, scaled, y), sketch.pointwise(ADD, x, scaled))
    sketch.apply(record)
    assert seen == []  # the scaled value is read twice
    other = Sketch()
    x, y = other.inputs
    other.finish(other.pointwise(ADD, x, other.pointwise("Mul %0 3.5 -> float32", x)))
    other.apply(record)
    assert seen == [3.5]


@pytest.mark.parametrize("given", [True, False])
def test_an_optional_operand(given: bool) -> None:
    found: list[Any] = []

    @rewrite(lambda op, x, scale: op.Norm(x, op.optional(scale), capture="whole"))
    def record(op: Builder, x: ir.Value, scale: ir.Value | None, whole: ir.Value) -> Result:
        """Norm(x, scale?) => nothing, recorded"""
        found.append((x, scale, whole))
        return None

    sketch = Sketch()
    operands = sketch.inputs[: 2 if given else 1]
    whole = sketch.node("Norm", *operands, kind="layer", axis=0)
    sketch.finish(whole)
    sketch.apply(record)
    assert found == [(sketch.inputs[0], sketch.inputs[1] if given else None, whole)]


def test_attributes_must_be_equal() -> None:
    @rewrite(lambda op, x: op.Reduce(x, kind="max", axes=(0,)))
    def largest(op: Builder, x: ir.Value) -> Result:
        """max(x) => x, to see that it fired"""
        return op.Pointwise(x, expression=EXP)

    sketch = Sketch()
    x, _ = sketch.inputs
    sketch.finish(*(sketch.node("Reduce", x, kind=kind, axes=[0], keepdims=1) for kind in ("max", "min")))
    assert [entry.node for entry in sketch.apply(largest).fired] == ["Reduce0"]


@rewrite(lambda op, x: op.Relu(op.Relu(x)))
def relu_relu(op: Builder, x: ir.Value) -> Result:
    """Relu(Relu(x)) => Relu(x)"""
    return op.Pointwise(x, expression=RELU)


def test_a_table_runs_to_a_fixpoint_and_keeps_all_origins() -> None:
    sketch = Sketch()
    value = sketch.inputs[0]
    for _ in range(20):
        value = sketch.pointwise(RELU, value)
    sketch.finish(value)
    journal = sketch.apply(relu_relu)
    (node,) = sketch.graph
    assert len(journal.fired) == 19
    assert sorted(origins(node)) == sorted(f"Pointwise{index}" for index in range(20))
    assert node.name == "Pointwise19"


def test_the_name_of_an_output_stays() -> None:
    sketch = Sketch()
    y = sketch.pointwise(RELU, sketch.pointwise(RELU, sketch.inputs[0]))
    y.name = "answer"
    sketch.finish(y)
    sketch.apply(relu_relu)
    assert [value.name for value in sketch.graph.outputs] == ["answer"]
    assert sketch.graph.outputs[0].producer() in list(sketch.graph)


def test_an_output_is_not_replaced_by_an_input() -> None:
    @rewrite(lambda op, x: op.Relu(x))
    def nothing(op: Builder, x: ir.Value) -> Result:
        """Relu(x) => x"""
        return x

    sketch = Sketch()
    sketch.finish(sketch.pointwise(RELU, sketch.inputs[0]))
    journal = sketch.apply(nothing)
    assert len(sketch.graph) == 1 and "needs a node of its own" in journal.refused[0].reason


def test_new_nodes_stand_before_their_readers() -> None:
    sketch = Sketch()
    relu = relu_sum(sketch, True)
    last = sketch.pointwise(EXP, relu)
    sketch.finish(last)
    sketch.apply(relu_of_sum)
    first, second = sketch.graph
    assert second.inputs[0] is first.outputs[0] and second.outputs[0] is last


def test_a_rejection_leaves_no_trace() -> None:
    @rewrite_node("Pointwise")
    def hesitant(op: Builder, node: ir.Node) -> Result:
        """f(x) => nothing, after having made nodes"""
        op.Pointwise(*node.inputs, expression=EXP)
        return reject("it does not feel like it", node)

    sketch = Sketch()
    sketch.finish(sketch.pointwise(RELU, sketch.inputs[0]))
    journal = sketch.apply(hesitant)
    assert len(sketch.inputs[0].uses()) == 1 and len(sketch.graph) == 1
    assert journal.refused[0].reason == "it does not feel like it (Pointwise Pointwise0)"


def test_a_refusal_is_forgotten_when_the_rewrite_fires_later() -> None:
    sketch = Sketch()
    x, _ = sketch.inputs
    inner = sketch.pointwise(RELU, x)
    sketch.finish(sketch.pointwise(RELU, inner), sketch.pointwise(EXP, inner))

    @rewrite_node("Pointwise")
    def exp_of_relu(op: Builder, node: ir.Node) -> Result:
        """Exp(f(x)) => Exp(x), wrong but it frees the interior"""
        return op.Pointwise(x, expression=EXP) if node.inputs[0] is inner and node.name == "Pointwise2" else None

    journal = sketch.apply(relu_relu, exp_of_relu)
    assert not journal.refused and len(journal.fired) == 2


def test_going_in_circles_is_an_error() -> None:
    @rewrite_node("Pointwise")
    def restless(op: Builder, node: ir.Node) -> Result:
        """f(x) => f(x)"""
        return op.Pointwise(*node.inputs, expression=node.attributes["expression"].as_string())

    sketch = Sketch()
    sketch.finish(sketch.pointwise(RELU, sketch.inputs[0]))
    with pytest.raises(BuildError, match="'test' go in circles at node"):
        sketch.apply(restless)


def test_bodies_do_not_match_across_their_border() -> None:
    outer = Sketch()
    power = outer.pointwise(EXP, outer.inputs[1])
    inner = Sketch()
    total = inner.pointwise(ADD, outer.inputs[0], power)
    inner.finish(inner.pointwise(RELU, total))
    journal = Journal()
    Table("test", (relu_of_sum,)).apply(inner.graph, journal)
    assert not journal.fired


def test_makers_of_all_that_is_replaced_go() -> None:
    """Of a value that is not the root's too, where its readers read what takes its place before the root is swept."""

    @rewrite_node("Pointwise")
    def both(op: Builder, node: ir.Node) -> Result:
        """y = exp(x); z = relu(y) => (y, z) of one node"""
        if node.attributes["expression"].as_string() != RELU or (x := node.inputs[0]) is None:
            return None
        inner = x.producer()
        if inner is None:
            return None
        op.after(x)
        first, second = (op.Pointwise(inner.inputs[0], expression=text) for text in (EXP.replace("Exp", "Abs"), ADD))
        op.nodes[1].resize_inputs(2)
        op.nodes[1].replace_input_with(1, inner.inputs[0])
        return {x: first, node.outputs[0]: second}

    sketch = Sketch()
    power = sketch.pointwise(EXP, sketch.inputs[0])
    sketch.finish(sketch.pointwise(RELU, power), sketch.pointwise(ADD, power, sketch.inputs[1]))
    before = list(sketch.graph)
    journal = sketch.apply(both)
    assert len(journal.fired) == 1
    assert all(node.graph is None for node in before[:2]) and before[2].graph is sketch.graph
    kept = {value.producer() for value in before[2].inputs if value is not None}
    assert before[0] not in kept and set(sketch.texts()) == {EXP.replace("Exp", "Abs"), ADD}


def test_patterns_say_what_they_are() -> None:
    pattern = trace(lambda op, x: op.either(op.Relu(op.Exp(x)), op.Clip(x, 0, 6)))
    assert list(roots_of(pattern)) == [("ingot", "Relu"), ("ingot", "Clip")]
    assert size_of(pattern) == 1 and describe(pattern) == "Relu or Clip"
    with pytest.raises(TypeError, match="starts at an operator"):
        list(roots_of(trace(lambda op, x: x)))


def test_a_rewrite_knows_its_algebra() -> None:
    assert relu_relu.summary == "Relu(Relu(x)) => Relu(x)" and relu_relu.name == "relu relu"

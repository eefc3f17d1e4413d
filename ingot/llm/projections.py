"""Products of a decoder become Projections: with the norm before them, gate and up in one, sums in float32.

For targets where a launch costs as much as many weights do: a layer is then five launches for one token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.expression import Expression, Input, Instruction, Operand, Result
from ingot.ir.graph import attributes, constant_of, dtype_of, make_node, replace_node
from ingot.llm.decoder import Array
from ingot.llm.mixtures import mix

_X, _WEIGHT, _EXTRAS = 0, 1, 2
_NORMS = {"Projection": 2, "Mixture": 8}  # who holds the norm before it, and where


def project(model: ir.Model) -> int:
    """Every Linear of the graph as a Projection, Experts as Mixtures, in place; how many norms and products were taken in."""
    graph, known = model.graph, _Joined()
    before = len(graph)
    for node in list(graph):
        if node.op_type == "Linear":
            _gate(graph, node, known)
    for node in list(graph):
        if node.op_type == "Linear":
            _plain(node)
    mix(graph)
    for node in list(graph):
        if node.op_type in _NORMS:
            _with_norm(node)
    for node in reversed(list(graph)):
        if node.op_type == "Norm" and not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    return before - len(graph)


class _Joined:
    """Weights side by side, once for the same ones."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Array, Array, Array]] = {}

    def __call__(self, first: Array, second: Array) -> Array:
        key = id(first), id(second)
        if key not in self._known:
            self._known[key] = first, second, np.concatenate([first.T, second.T]).T
        return self._known[key][2]


def _plain(node: ir.Node) -> None:
    text = _to_result(expressions.parse(attributes(node)["epilogue"]), node)
    operands = [node.inputs[_X], node.inputs[_WEIGHT], None, *node.inputs[_EXTRAS:]]
    _replace(node, operands, 1, text)


def _gate(graph: ir.Graph, gate: ir.Node, known: _Joined) -> None:
    """gate(x @ g, x @ u) => one product, where nobody else reads x @ u."""
    ups = [(k, v.producer()) for k, v in enumerate(gate.inputs) if k >= _EXTRAS and v is not None and _is_up(v, gate)]
    if len(ups) != 1:
        return
    (place, up), weights = ups[0], []
    assert up is not None
    for node in (gate, up):
        array = constant_of(node.inputs[_WEIGHT])
        assert array is not None
        weights.append(array)
    others = [v for k, v in enumerate(gate.inputs) if k >= _EXTRAS and k != place]
    first = 2 + len(others)  # sums of both, then operands of the gate, then those of the other
    own = _moved(expressions.parse(_epilogue(up)), {0: Input(1)}, first - 1, 0)
    answer: Operand = Result(len(own) - 1) if own else Input(1)
    numbers = [k for k in range(_EXTRAS, len(gate.inputs)) if k != place]
    inputs: dict[int, Operand] = {0: Input(0), place - _EXTRAS + 1: answer}
    inputs |= {k - _EXTRAS + 1: Input(2 + n) for n, k in enumerate(numbers)}
    rest = _moved(expressions.parse(_epilogue(gate)), inputs, 0, len(own))
    weight = _constant(graph, known(*weights), f"{gate.name}.gated.weight")
    operands = [gate.inputs[_X], weight, None, *others, *up.inputs[_EXTRAS:]]
    _replace(gate, operands, 2, _to_result(Expression((*own, *rest)), gate))
    graph.remove(up, safe=True)


def _is_up(value: ir.Value, gate: ir.Node) -> bool:
    node = value.producer()
    if node is None or node.op_type != "Linear" or value.is_graph_output() or len(value.uses()) != 1:
        return False
    mine, theirs = (constant_of(n.inputs[_WEIGHT]) for n in (gate, node))
    return node.inputs[_X] is gate.inputs[_X] and mine is not None and theirs is not None and mine.shape == theirs.shape


def _epilogue(node: ir.Node) -> str:
    return str(attributes(node)["epilogue"])


def _moved(expression: Expression, inputs: dict[int, Operand], shift: int, after: int) -> list[Instruction]:
    """Its instructions behind `after` others: operands as `inputs` says, others `shift` places further."""

    def moved(operand: Operand) -> Operand:
        if isinstance(operand, Input):
            return inputs[operand.index] if operand.index in inputs else Input(operand.index + shift)
        return Result(operand.index + after) if isinstance(operand, Result) else operand

    return [
        Instruction(i.op, tuple(map(moved, i.operands)), i.dtype, i.attributes) for i in expression.instructions
    ]


def _to_result(expression: Expression, node: ir.Node) -> str:
    """Ending in the type of the node's result, which a Projection's sums do not have."""
    dtype = dtype_of(node.outputs[0])
    if (expression.dtype or "float32") != dtype:
        last: Operand = expression.result if expression else Input(0)
        expression = expressions.append(expression, "Cast", last, dtype=dtype)
    return expressions.format(expression)


def _replace(node: ir.Node, operands: Sequence[ir.Value | None], parts: int, text: str) -> None:
    made = make_node("Projection", operands, {"parts": parts, "expression": text}, name=node.name)
    replace_node(node, [made], list(made.outputs))


def _constant(graph: ir.Graph, array: Array, name: str) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _with_norm(node: ir.Node) -> None:
    """Projection(rms(x), w) => Projection(x, w, norm), and Mixtures alike"""
    x = node.inputs[_X]
    norm = x.producer() if x is not None else None
    if norm is None or norm.op_type != "Norm" or x is None or x.is_graph_output():
        return
    stated = attributes(norm)
    shape = norm.inputs[0].shape if norm.inputs[0] is not None else None
    last = shape is not None and stated["axis"] % len(shape) == len(shape) - 1
    scaled_only = len(norm.inputs) <= 2 or all(v is None for v in norm.inputs[2:])
    if stated["kind"] != "rms" or stated["epilogue"] or not last or not scaled_only or norm.inputs[1] is None:
        return
    node.replace_input_with(_X, norm.inputs[0])
    node.replace_input_with(_NORMS[node.op_type], norm.inputs[1])
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", stated["epsilon"])

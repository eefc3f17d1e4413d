"""Products of a decoder become Projections: with the norm before them, gate and up in one, sums in float32.

For targets where a launch costs as much as many weights do: a layer is then five launches for one token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ingot.errors import BuildError
from ingot.ir import expression as expressions
from ingot.ir.expression import Expression, Input, Instruction, Operand, Result
from ingot.ir.graph import attributes, constant_of, dtype_of, make_node, replace_node
from ingot.llm.decoder import Array
from ingot.llm.mixtures import mix

_X, _WEIGHT = 0, 1
_MADE = {"Linear": "Projection", "QuantizedLinear": "QuantizedProjection"}
_EXTRAS = {"Linear": 2, "QuantizedLinear": 4}  # the first operand of the epilogue; before it x, weights, scales, zeros
_RUNS = {4: 32, 8: 16}  # numbers along the depth, of so many bits, that a thread loads at once
_NORMS = {"Projection": 2, "QuantizedProjection": 2, "Mixture": 8}  # who holds the norm before it, and where


def project(model: ir.Model) -> int:
    """Every Linear and QuantizedLinear of the graph as a Projection or QuantizedProjection, Experts as Mixtures, in
    place; how many norms and products went into others."""
    graph, known = model.graph, _Joined()
    before = len(graph)
    for node in list(graph):
        if node.op_type in _MADE:
            _check_group(node)
            _gate(graph, node, known)
    for node in list(graph):
        if node.op_type in _MADE:
            _plain(node)
    mix(graph)
    for node in list(graph):
        if node.op_type in _NORMS:
            _with_norm(node)
    for node in reversed(list(graph)):
        if node.op_type == "Norm" and not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    return before - len(graph)


def _check_group(node: ir.Node) -> None:
    """BuildError where scales change within what a thread loads at once."""
    kind = _kind(node)
    least, weight = _RUNS[kind["bits"]] if kind else 1, _weights(node)[0]
    if kind and weight is not None and kind["group"] < len(weight) and kind["group"] % least:
        raise BuildError(f"{node.name}: groups of {kind['group']} numbers of {kind['bits']} bits share a scale; for a "
                         f"GPU it must be a multiple of {least}. Build for the CPU, or take a checkpoint of larger "
                         "groups")  # fmt: skip


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
    text, extras = _to_result(expressions.parse(_epilogue(node)), node), _EXTRAS[node.op_type]
    _replace(node, node.inputs[_WEIGHT:extras], node.inputs[extras:], 1, text)


def _gate(graph: ir.Graph, gate: ir.Node, known: _Joined) -> None:
    """gate(x @ g, x @ u) => one product, where nobody else reads x @ u."""
    extras = _EXTRAS[gate.op_type]
    ups = [(k, v.producer()) for k, v in enumerate(gate.inputs) if k >= extras and v is not None and _is_up(v, gate)]
    if len(ups) != 1:
        return
    place, up = ups[0]
    assert up is not None
    others = [v for k, v in enumerate(gate.inputs) if k >= extras and k != place]
    first = 2 + len(others)  # sums of both, then operands of the gate, then those of the other
    own = _moved(expressions.parse(_epilogue(up)), {0: Input(1)}, first - 1, 0)
    answer: Operand = Result(len(own) - 1) if own else Input(1)
    numbers = [k for k in range(extras, len(gate.inputs)) if k != place]
    inputs: dict[int, Operand] = {0: Input(0), place - extras + 1: answer}
    inputs |= {k - extras + 1: Input(2 + n) for n, k in enumerate(numbers)}
    rest = _moved(expressions.parse(_epilogue(gate)), inputs, 0, len(own))
    pairs = zip(_weights(gate), _weights(up), ("weight", "scale", "zero"), strict=False)
    joined = [None if a is None or b is None else _constant(graph, known(a, b), f"{gate.name}.gated.{part}")
              for a, b, part in pairs]  # fmt: skip
    _replace(gate, joined, [*others, *up.inputs[_EXTRAS[up.op_type] :]], 2, _to_result(Expression((*own, *rest)), gate))
    graph.remove(up, safe=True)


def _is_up(value: ir.Value, gate: ir.Node) -> bool:
    """Whether it is the product of the same input with weights of the same kind, which nobody else reads."""
    node = value.producer()
    if node is None or node.op_type != gate.op_type or value.is_graph_output() or len(value.uses()) != 1:
        return False
    mine, theirs = _weights(gate), _weights(node)
    alike = all((a is None) == (b is None) and (a is None or b is None or (a.shape, a.dtype) == (b.shape, b.dtype))
                for a, b in zip(mine, theirs, strict=True))  # fmt: skip
    return node.inputs[_X] is gate.inputs[_X] and mine[0] is not None and alike and _kind(node) == _kind(gate)


def _weights(node: ir.Node) -> list[Array | None]:
    """The product's constants: weights, and scales and zeros where it has some."""
    return [None if v is None else constant_of(v) for v in node.inputs[_WEIGHT : _EXTRAS[node.op_type]]]


def _kind(node: ir.Node) -> dict[str, int]:
    return {key: value for key, value in attributes(node).items() if key in ("bits", "group")}


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


def _replace(node: ir.Node, weights: Sequence[ir.Value | None], extras: Sequence[ir.Value | None], parts: int,
             text: str) -> None:  # fmt: skip
    operands = [node.inputs[_X], weights[0], None, *weights[1:], *extras]  # without a norm
    stated = {"parts": parts, "expression": text, **_kind(node)}
    made = make_node(_MADE[node.op_type], operands, stated, name=node.name)
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

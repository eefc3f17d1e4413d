"""float32 tensors become 16-bit ones throughout; what is computed elementwise is computed in float32 all the same.

In place, on a rewritten graph: inputs and outputs of the model keep their types. Sums of products, norms, softmax and
reductions accumulate in float32 whatever they read (that is what the operators mean). Nodes that have no 16-bit form
read and write float32, with conversions around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.dtypes import LARGEST_HALF, numpy_dtype
from ingot.ir import expression as expressions
from ingot.ir.expression import Expression, Input, Literal, Operand, Result
from ingot.ir.graph import (
    add_constant,
    attributes,
    constant_of,
    data_type,
    dtype_name,
    is_canonical,
    make_node,
    replace_node,
    set_type,
    substitute,
    type_of,
)
from ingot.ir.ops_linear import SHORT_INTEGERS
from ingot.ir.ops_paged import STATEFUL
from ingot.ir.ops_table import TensorType

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
_WIDE = "float32"
_BYTES = (*SHORT_INTEGERS, "float8_e4m3fn")
_KEPT = frozenset({"RNN", "TopK", "CumSum", "Range", "Unreachable", "ScatterElements", "ScatterND"})
LIMITS = {"float16": LARGEST_HALF, "bfloat16": 3.3895e38}


@dataclass(frozen=True)
class Scope:
    """What becomes narrow: the nodes for which `takes` says so; of those in `opens` the result, from operands in
    float32, of those in `closes` all but the result."""

    takes: Callable[[ir.Node], bool] = lambda node: node.op_type not in _KEPT
    opens: frozenset[ir.Node] = frozenset()
    closes: frozenset[ir.Node] = frozenset()


def convert(model: ir.Model, dtype: str, scope: Scope | None = None) -> int:
    """The model's main graph in `dtype`; the number of nodes that stay in float32."""
    change = _Change(model.graph, dtype, scope or Scope())
    for node in list(model.graph):
        change.node(node)
    return change.kept


@dataclass(eq=False)
class _Change:
    graph: ir.Graph
    dtype: str
    scope: Scope
    kept: int = 0
    narrow: set[ir.Value] = field(default_factory=set)  # was float32
    _narrowed: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _widened: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def node(self, node: ir.Node) -> None:
        """One node of the graph: converted, or fed with float32, or gone as there is nothing to convert any more."""
        if self._needless(node):
            return
        concerned = any(self._was_wide(v) for v in (*node.inputs, *node.outputs))
        if is_canonical(node) and self.scope.takes(node) and concerned:
            self._convert(node)
            return
        self.kept += concerned
        for graph_node in (node, *_inner_nodes(node)):
            for index, value in enumerate(graph_node.inputs):
                if value in self.narrow:
                    graph_node.replace_input_with(index, self._wide(value, node))

    def _needless(self, node: ir.Node) -> bool:
        """Whether it was a conversion between float32 and the narrow type, of a narrow tensor or to one, and went."""
        value, result = node.inputs[0] if node.inputs else None, node.outputs[0]
        if value is None or not _only_converts(node) or value.is_graph_output():
            return False
        types = value.dtype, dtype_name(result.dtype)
        enters = not self._was_wide(value) and types == (data_type(self.dtype), _WIDE)
        if enters and all(starmap(_widens, value.uses())) and not result.is_graph_output():
            self.narrow.add(value)
            substitute(result, value, inherit=False)
        elif value in self.narrow and types[1] == self.dtype and not value.is_graph_input():
            substitute(result, value)
        else:
            return False
        self.graph.remove(node, safe=True)
        return True

    def _was_wide(self, value: ir.Value | None) -> bool:
        return value is not None and (value in self.narrow or dtype_name(value.dtype) == _WIDE)

    def _convert(self, node: ir.Node) -> None:
        given = attributes(node)
        wide = [self._was_wide(v) for v in node.inputs]
        results = [self._was_wide(v) for v in node.outputs]
        outputs = [v.is_graph_output() for v in node.outputs]
        key = next((k for k in ("expression", "epilogue") if k in given), None)
        stays = results[0] and (outputs[0] or node in self.scope.closes) and key is not None
        skipped = 0 if key in (None, "expression") else _main_inputs(node)
        x = node.inputs[0] if skipped else None
        if x is not None and dtype_name(x.dtype) in _BYTES:  # scales of sums need float32's range
            wide[skipped:] = [w and constant_of(v) is None for v, w in zip(node.inputs, wide, strict=True)][skipped:]
        if node.op_type in STATEFUL or _of_integers(node):  # tables of angles, scales of integers need more digits
            wide = [w and constant_of(v) is None for v, w in zip(node.inputs, wide, strict=True)]
        if node in self.scope.opens:
            wide[:skipped] = [False] * skipped
        if key is not None:
            first = [] if key == "expression" else [results[0] or wide[0]]
            given[key] = self._expression(given[key], [*first, *wide[skipped:]], results[0], stays)
        inputs = [self._half(v, node) if w else v for v, w in zip(node.inputs, wide, strict=True)]
        made = make_node(node.op_type, inputs, given, outputs=len(node.outputs))
        types = [type_of(v) for v in node.outputs]
        replace_node(node, [made], list(made.outputs))
        for index, (value, was) in enumerate(zip(made.outputs, results, strict=True)):
            if was and not (index == 0 and stays):
                self._retype(value, types[index])
                if outputs[index]:
                    self._restore_output(value, made)

    def _retype(self, value: ir.Value, known: TensorType | None) -> None:
        self.narrow.add(value)
        if known is not None:
            set_type(value, TensorType(self.dtype, known.shape))

    def _restore_output(self, value: ir.Value, after: ir.Node) -> None:
        """The graph's output is float32 still."""
        name, index = value.name, next(i for i, v in enumerate(self.graph.outputs) if v is value)
        value.name = f"{name}.{self.dtype}"
        wide = self._wide(value, after, after=True)
        wide.name = name
        self.graph.outputs[index] = wide

    def _expression(self, text: str, wide: Sequence[bool], result: bool, stays: bool) -> str:
        """Computes as before on operands that are narrow now; the result narrow where it was float32."""
        old = expressions.parse(text)
        if not old and not stays:
            return text
        used = [k for k in expressions.operands_of(old) if k < len(wide) and wide[k]]
        made = Expression()
        places: dict[int, Operand] = {}
        for k in used:
            made = expressions.append(made, "Cast", Input(k), dtype=_WIDE)
            places[k] = made.result
        made = _continued(made, old, places)
        if result and not stays:
            if self._exceeds(old):
                limit = LIMITS[self.dtype]
                made = expressions.append(made, "Clip", made.result, -limit, limit, dtype=_WIDE)
            made = expressions.append(made, "Cast", made.result, dtype=self.dtype)
        return expressions.format(made)

    def _exceeds(self, expression: Expression) -> bool:
        """Whether it names finite numbers that the narrow type has not, as masks do."""
        numbers = [o.value for i in expression.instructions for o in i.operands if isinstance(o, Literal)]
        return any(LIMITS[self.dtype] < abs(n) < float("inf") for n in numbers)

    def _half(self, value: ir.Value | None, reader: ir.Node) -> ir.Value | None:
        if value is None or value in self.narrow:
            return value
        if value not in self._narrowed:
            constant = constant_of(value)
            if constant is not None:
                self._narrowed[value] = add_constant(self.graph, self._rounded(constant), value.name)
            else:
                self._narrowed[value] = self._cast(value, reader, self.dtype)
                self.narrow.add(self._narrowed[value])
        return self._narrowed[value]

    def _rounded(self, array: Any) -> Any:
        limit = LIMITS[self.dtype]
        finite = np.where(np.isfinite(array), np.clip(array, -limit, limit), array)
        return finite.astype(numpy_dtype(self.dtype))

    def _wide(self, value: ir.Value, reader: ir.Node, after: bool = False) -> ir.Value:
        if value not in self._widened:
            self._widened[value] = self._cast(value, reader, _WIDE, after)
        return self._widened[value]

    def _cast(self, value: ir.Value, place: ir.Node, dtype: str, after: bool = False) -> ir.Value:
        node = make_node("Pointwise", [value], {"expression": f"Cast %0 -> {dtype}"}, name=f"{value.name}.{dtype}")
        (self.graph.insert_after if after else self.graph.insert_before)(place, [node])
        node.outputs[0].name = f"{value.name}.{dtype}"
        return node.outputs[0]


def _of_integers(node: ir.Node) -> bool:
    """Whether it is a product with weights that are integers."""
    weight = node.inputs[1] if node.op_type in ("Linear", "QuantizedLinear") else None
    return weight is not None and dtype_name(weight.dtype) in SHORT_INTEGERS


def _continued(made: Expression, old: Expression, places: dict[int, Operand]) -> Expression:
    """`old` behind the casts, reading their results."""
    shift = len(made.instructions)
    if not old:
        return made
    moved = []
    for instruction in old.instructions:
        operands = tuple(
            places.get(o.index, o) if isinstance(o, Input) else Result(o.index + shift) if isinstance(o, Result) else o
            for o in instruction.operands
        )
        moved.append(expressions.Instruction(instruction.op, operands, instruction.dtype, instruction.attributes))
    return Expression((*made.instructions, *moved))


def _only_converts(node: ir.Node) -> bool:
    if node.op_type != "Pointwise" or not is_canonical(node) or len(node.inputs) != 1:
        return False
    steps = expressions.parse(attributes(node)["expression"]).instructions
    return len(steps) == 1 and steps[0].op == "Cast" and not steps[0].attributes


def _widens(node: ir.Node, index: int) -> bool:
    """Whether the first thing that an elementwise expression does with the node's input is to make it float32."""
    key = next((k for k in ("expression", "epilogue") if k in node.attributes), None)
    if not is_canonical(node) or key is None:
        return False
    operand = index if key == "expression" else index - _main_inputs(node) + 1
    steps = expressions.parse(attributes(node)[key]).instructions
    reading = [step for step in steps if Input(operand) in step.operands]
    return operand >= (key == "epilogue") and all((step.op, step.dtype) == ("Cast", _WIDE) for step in reading)


def _main_inputs(node: ir.Node) -> int:
    from ingot.ir.ops_table import definition

    return len(definition(node.op_type).inputs)


def _inner_nodes(node: ir.Node) -> list[ir.Node]:
    """Nodes of the bodies of a control step: they read values of the graph around them."""
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return [inner for graph in graphs for inner in ir.traversal.RecursiveGraphIterator(graph)]

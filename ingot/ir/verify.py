"""What a legal graph is, as a table of rules; `verify(model)` raises one GraphError that names what is broken where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ingot.errors import GraphError, IngotError
from ingot.ir import expression as expressions
from ingot.ir import ops
from ingot.ir.elementwise import FLOATS, INSTRUCTIONS, INTEGERS
from ingot.ir.expression import Expression, Instruction
from ingot.ir.graph import attributes, constant_of, dtype_name, encode, is_canonical, type_of
from ingot.ir.ops_table import Op, Shape, TensorType

_MOST_SHOWN = 5
Problems = Iterator[str]
NodeRule = Callable[[ir.Node], Problems]
GraphRule = Callable[[ir.Graph, frozenset[ir.Value]], Problems]


@dataclass(frozen=True)
class Violation:
    """A rule that does not hold, and where."""

    rule: str
    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem} (rule: {self.rule})"


def verify(model: ir.Model | ir.Graph) -> None:
    """Raise GraphError unless every rule holds, bodies of control flow included."""
    graph = model.graph if isinstance(model, ir.Model) else model
    violations = list(violations_of(graph, frozenset()))
    if violations:
        shown = "; ".join(map(str, violations[:_MOST_SHOWN]))
        more = f"; and {len(violations) - _MOST_SHOWN} more" if len(violations) > _MOST_SHOWN else ""
        raise GraphError(f"the graph {graph.name!r} is not legal: {shown}{more}; please report this model")


def violations_of(graph: ir.Graph, outer: frozenset[ir.Value]) -> Iterator[Violation]:
    """Every rule broken in a graph and the bodies within; `outer` are the values of the enclosing graphs."""
    for name, rule in GRAPH_RULES:
        yield from (Violation(name, f"graph {graph.name!r}", problem) for problem in rule(graph, outer))
    for node in graph:
        if is_canonical(node):
            yield from _node_violations(node)
    visible = outer | frozenset(_own_values(graph))
    for inner in _bodies(graph):
        yield from violations_of(inner, visible)


def _node_violations(node: ir.Node) -> Iterator[Violation]:
    """The rules in order; later ones presuppose the earlier."""
    where = f"node {node.name!r} ({node.op_type})"
    for name, rule in NODE_RULES:
        problems = list(rule(node))
        yield from (Violation(name, where, problem) for problem in problems)
        if problems:
            return


def _own_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _bodies(graph: ir.Graph) -> Iterator[ir.Graph]:
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield attribute.as_graph()


# graphs


def _defined_in_order(graph: ir.Graph, outer: frozenset[ir.Value]) -> Problems:
    known = {*outer, *graph.inputs, *graph.initializers.values()}
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                yield f"node {node.name!r} ({node.op_type}) reads {value.name!r}, which nothing before it makes"
        known.update(node.outputs)
    for value in graph.outputs:
        if value not in known:
            yield f"its output {value.name!r} is made by nothing"


def _distinct_names(graph: ir.Graph, _: frozenset[ir.Value]) -> Problems:
    seen: dict[str, ir.Value] = {}
    for value in _own_values(graph):
        if value.name and seen.setdefault(value.name, value) is not value:
            yield f"two values are called {value.name!r}"


def _inputs_typed(graph: ir.Graph, _: frozenset[ir.Value]) -> Problems:
    for value in graph.inputs:
        if isinstance(value.type, ir.TensorType) and dtype_name(value.dtype) is None:
            yield f"its input {value.name!r} has no element type"


# canonical nodes


def _known_operator(node: ir.Node) -> Problems:
    if node.op_type not in ops.OPS:
        yield "there is no such canonical operator"


def _exact_attributes(node: ir.Node) -> Problems:
    known = ops.definition(node.op_type).attributes
    if node.attributes.keys() != known.keys():
        yield f"it has the attributes {sorted(node.attributes)}, not {sorted(known)}"
        return
    expected = {attribute.name: attribute.type for attribute in encode(node.op_type, attributes(node))}
    for name, attribute in node.attributes.items():
        if attribute.type != expected[name]:
            yield f"its attribute {name!r} is of kind {attribute.type.name}, not {expected[name].name}"


def _inputs_present(node: ir.Node) -> Problems:
    entry = ops.definition(node.op_type)
    if len(node.inputs) < entry.required or (entry.extras is None and len(node.inputs) > len(entry.inputs)):
        yield f"it has {len(node.inputs)} inputs, but takes ({' '.join(entry.inputs)}{' …' if entry.extras else ''})"
    for index, value in enumerate(node.inputs):
        if value is None and (index >= len(entry.inputs) or not entry.inputs[index].endswith("?")):
            yield f"its input {index} is absent"


def _types_known(node: ir.Node) -> Problems:
    for value in (*node.inputs, *node.outputs):
        if value is not None and type_of(value) is None:
            yield f"the dtype or shape of {value.name!r} is unknown"


def _types_of(values: Sequence[ir.Value | None]) -> list[TensorType | None]:
    return [None if value is None else type_of(value) for value in values]


def _legal_expression(node: ir.Node) -> Problems:
    text, operands = _expression_and_operands(node)
    if text is None:
        return
    try:
        expression = expressions.parse(text)
    except GraphError as error:
        yield str(error)
        return
    read = expressions.operands_of(expression)
    if read and read[-1] >= len(operands):
        yield f"its expression reads %{read[-1]}, but there are {len(operands)} operands"
        return
    for instruction, types in zip(expression.instructions, expressions.dtypes_of(expression, operands), strict=True):
        yield from _typing_problems(instruction, types, expression)


def _expression_and_operands(node: ir.Node) -> tuple[str | None, list[str]]:
    """(text, operand dtypes); None for an operator without an expression."""
    entry = ops.definition(node.op_type)
    types = _types_of(node.inputs)
    if node.op_type == "Pointwise":
        return str(attributes(node)["expression"]), [known.dtype for known in types if known]
    if not entry.epilogue:
        return None, []
    given = attributes(node)
    accumulator = ops.infer(node.op_type, types[: len(entry.inputs)], {**given, "epilogue": ""})[0].dtype
    extras = [known.dtype for known in types[len(entry.inputs) :] if known]
    return str(given["epilogue"]), [accumulator, *extras]


def _typing_problems(instruction: Instruction, types: tuple[str, ...], expression: Expression) -> Problems:
    """Operands of one dtype where the instruction wants that."""
    place = f"instruction {expression.instructions.index(instruction)} ({instruction.op} -> {instruction.dtype})"
    typing = INSTRUCTIONS[instruction.op].typing
    if instruction.dtype not in FLOATS | INTEGERS | {"bool"}:
        yield f"{place} has no such result type"
    wanted = {
        "same": [instruction.dtype] * len(types),
        "compare": [types[0]] * len(types),
        "logic": ["bool"] * len(types),
        "select": ["bool", instruction.dtype, instruction.dtype],
    }.get(typing)
    if wanted is not None and list(types) != wanted:
        yield f"{place} reads {', '.join(types)} where it needs {', '.join(wanted)}"
    if typing in ("compare", "logic") and instruction.dtype != "bool":
        yield f"{place} can only give bool"


def _types_agree(node: ir.Node) -> Problems:
    try:
        inferred = ops.infer(node.op_type, _types_of(node.inputs), attributes(node))
    except IngotError as error:
        yield str(error)
        return
    if len(node.outputs) > len(inferred):
        yield f"it has {len(node.outputs)} outputs, but makes {len(inferred)}"
    for value, found in zip(node.outputs, inferred, strict=False):
        stated = type_of(value)
        if stated is not None and not _compatible(stated, found):
            yield f"{value.name!r} is {stated.dtype}{list(stated.shape)}, but computes {found.dtype}{list(found.shape)}"


def _compatible(stated: TensorType, found: TensorType) -> bool:
    """Equal dtypes, ranks and static extents; symbolic ones may be written in several ways."""
    if stated.dtype != found.dtype or len(stated.shape) != len(found.shape):
        return False
    pairs = zip(stated.shape, found.shape, strict=True)
    return all(a == b or isinstance(a, str) or isinstance(b, str) for a, b in pairs)


def _constant_weight(node: ir.Node) -> Problems:
    if node.op_type not in ("Linear", "QuantizedLinear"):
        return
    for value in node.inputs[1 : len(ops.definition(node.op_type).inputs)]:
        if value is not None and constant_of(value) is None:
            yield f"its weight {value.name!r} is not a constant"


def _extras_fit(node: ir.Node) -> Problems:
    entry = ops.definition(node.op_type)
    if not entry.epilogue:
        return
    output = type_of(node.outputs[0])
    for index, value in enumerate(node.inputs[len(entry.inputs) :], start=1):
        extra = None if value is None else type_of(value)
        if extra is not None and output is not None and not extra_fits(entry, node, extra.shape, output.shape):
            yield f"operand %{index} of its epilogue has the shape {list(extra.shape)}: not scalar, channel or full"


def extra_fits(entry: Op, node: ir.Node, extra: Shape, output: Shape) -> bool:
    """Whether an epilogue operand is one number, a vector along the channel axis, or as large as the output."""
    if all(size == 1 for size in extra):
        return len(extra) <= len(output)
    if len(extra) == len(output) and all(a == b or isinstance(a, str) or isinstance(b, str)
                                         for a, b in zip(extra, output, strict=True)):  # fmt: skip
        return True
    aligned = (1,) * (len(output) - len(extra)) + tuple(extra)
    axis = channel_axis(entry.name, str(attributes(node).get("kind", "")), len(output))
    return axis is not None and all(size == 1 for place, size in enumerate(aligned) if place != axis)


def channel_axis(op: str, kind: str, rank: int) -> int | None:
    """The axis of the output along which an epilogue operand may be a vector; None where there is none."""
    if op in ("Linear", "QuantizedLinear", "MatMul") or (op == "Norm" and kind in ("layer", "rms")):
        return rank - 1
    return None if op == "Reduce" else 1


GRAPH_RULES: tuple[tuple[str, GraphRule], ...] = (
    ("values are made before they are read", _defined_in_order),
    ("names are distinct", _distinct_names),
    ("inputs have types", _inputs_typed),
)
NODE_RULES: tuple[tuple[str, NodeRule], ...] = (
    ("operators of our domain are canonical", _known_operator),
    ("canonical operators have exactly their attributes", _exact_attributes),
    ("required inputs are there", _inputs_present),
    ("dtypes and shapes are known", _types_known),
    ("expressions are legal", _legal_expression),
    ("outputs have the types that are computed", _types_agree),
    ("a Linear's weight is constant", _constant_weight),
    ("epilogue operands are scalars, channel vectors or full", _extras_fit),
)

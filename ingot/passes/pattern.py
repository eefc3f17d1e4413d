"""Patterns are ordinary functions, traced once: `lambda op, x, w, b: op.Add(op.MatMul(x, w), b)`.

In a pattern
- a parameter stands for any value; used twice, for the same value twice;
- `op.number(k)` binds a constant of one element as a Python number, `op.number()` just wants one; a number written out
  must be equal to it;
- a keyword is an attribute that must be equal (`axis=1`); `capture="name"` binds the node's output;
- `op.either(a, b)` is one of several, tried in order; `op.maybe("Cast", x)` is `either(Cast(x), x)`;
- `op.optional(b)` stands also for an absent operand; `op.shared(a)` may be used elsewhere (it then stays in the graph);
- `op.onnx.Exp(x)` names an operator that is not canonical.
Add, Mul, Max, Min, And, Or, Xor and Equal commute. A Pointwise of one instruction is read as that instruction, so
`op.Add(x, 1)` finds `Pointwise(x; "Add %0 1 -> float32")`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.graph import DOMAIN, scalar_value

COMMUTATIVE = frozenset({"Add", "Mul", "Max", "Min", "And", "Or", "Xor", "Equal"})
_TOLERANCE = 1e-3  # relative: constants of half precision models are rounded


@dataclass(frozen=True, eq=False, slots=True)
class Variable:
    """Any value; with `number` a constant of one element, with `absent` an operand that is not there."""

    name: str
    number: bool = False
    absent: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Number:
    """A constant with one element of this value."""

    value: float


@dataclass(frozen=True, eq=False, slots=True)
class Apply:
    """The first output of a node of this operator."""

    domain: str
    op: str
    sources: tuple[Pattern, ...]
    attributes: tuple[tuple[str, object], ...] = ()
    capture: str | None = None
    shared: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """The first of several that leads to a match of the whole."""

    options: tuple[Pattern, ...]


Pattern = Variable | Number | Apply | Choice
Found = ir.Value | int | float | None  # numbers are literals of an expression


@dataclass(frozen=True)
class Operators:
    """The `op` of a pattern: attribute access makes a node pattern."""

    domain: str = DOMAIN

    @property
    def onnx(self) -> Operators:
        return Operators("")

    def either(self, *options: Pattern) -> Pattern:
        return Choice(options)

    def maybe(self, op: str, source: Pattern, **attributes: object) -> Pattern:
        return Choice((getattr(self, op)(source, **attributes), source))

    def optional(self, variable: Variable) -> Pattern:
        return Choice((variable, Variable("", absent=True)))

    def number(self, variable: Variable | None = None) -> Pattern:
        return replace(variable or Variable(""), number=True)

    def shared(self, pattern: Apply) -> Pattern:
        return replace(pattern, shared=True)

    def __getattr__(self, op: str) -> Callable[..., Apply]:
        def apply(*sources: Pattern | float, capture: str | None = None, **attributes: object) -> Apply:
            patterns = tuple(Number(float(s)) if isinstance(s, int | float) else s for s in sources)
            return Apply(self.domain, op, patterns, tuple(attributes.items()), capture)

        return apply


def trace(function: Callable[..., Pattern]) -> Pattern:
    """The pattern a function describes; its parameters after the first are the free variables."""
    names = list(inspect.signature(function).parameters)[1:]
    return function(Operators(), *map(Variable, names))


def roots_of(pattern: Pattern) -> Iterator[tuple[str, str]]:
    """(domain, operator) of every node at which the pattern can start."""
    match pattern:
        case Apply(domain=domain, op=op):
            yield domain, op
        case Choice(options=options):
            for option in options:
                yield from roots_of(option)
        case _:
            raise TypeError("a pattern starts at an operator, not at a free variable or a number")


def size_of(pattern: Pattern) -> int:
    """How many nodes the pattern has at least."""
    match pattern:
        case Apply(sources=sources):
            return 1 + sum(size_of(source) for source in dict.fromkeys(sources))
        case Choice(options=options):
            return min(map(size_of, options))
    return 0


# what a node is, to a pattern


@lru_cache(maxsize=8192)
def single_instruction(text: str) -> expressions.Instruction | None:
    """The instruction of an expression that has exactly one."""
    instructions = expressions.parse(text).instructions
    return instructions[0] if len(instructions) == 1 else None


def instruction_of(node: ir.Node) -> expressions.Instruction | None:
    """The instruction of a Pointwise that has exactly one."""
    if node.op_type != "Pointwise" or node.domain != DOMAIN:
        return None
    return single_instruction(node.attributes["expression"].value)


def keys_of(node: ir.Node) -> list[tuple[str, str]]:
    """The (domain, operator) names under which patterns can find the node."""
    instruction = instruction_of(node)
    own = (node.domain, node.op_type)
    return [own] if instruction is None else [(DOMAIN, instruction.op), own]


def _operands(node: ir.Node, pattern: Apply) -> tuple[Found, ...] | None:
    """What the node's operands are, when it is of the pattern's operator and has its attributes."""
    if pattern.domain == node.domain and node.op_type == pattern.op:
        if not all(_has_attribute(node, name, wanted) for name, wanted in pattern.attributes):
            return None
        return tuple(node.inputs)
    instruction = instruction_of(node)
    if instruction is None or instruction.op != pattern.op or pattern.domain != DOMAIN:
        return None
    if not all(instruction.attribute(name) == wanted for name, wanted in pattern.attributes):
        return None
    return tuple(o.value if isinstance(o, expressions.Literal) else node.inputs[o.index] for o in instruction.operands)


def _has_attribute(node: ir.Node, name: str, wanted: object) -> bool:
    attribute = node.attributes.get(name)
    if attribute is None:
        return wanted is None
    held = attribute.value
    return bool((tuple(held) if isinstance(held, list | tuple) else held) == wanted)


# matching


@dataclass(slots=True)
class Match:
    """What a pattern was found to stand for; filled while matching, undone on the way back."""

    graph: ir.Graph
    values: dict[Pattern, Found] = field(default_factory=dict)
    nodes: list[tuple[Apply, ir.Node]] = field(default_factory=list)
    deepest: int = 0
    failure: tuple[Pattern, Found] | None = None

    def bindings(self) -> dict[str, Found]:
        """Free variables and captures by name."""
        bound = {p.name: v for p, v in self.values.items() if isinstance(p, Variable) and p.name}
        bound.update((p.capture, v) for p, v in self.values.items() if isinstance(p, Apply) and p.capture)
        return bound

    def fail(self, pattern: Pattern, value: Found) -> bool:
        """Keeps the mismatch that lies deepest in the pattern: it is the one worth telling."""
        if len(self.nodes) >= self.deepest:
            self.deepest, self.failure = len(self.nodes), (pattern, value)
        return False


_Goals = tuple[Any, Any, Any] | None  # (pattern, value, further goals)


def solve(pattern: Pattern, value: ir.Value, match: Match) -> bool:
    """Whether the pattern matches the value; `match` then holds the bindings, else why not."""
    return _solve((pattern, value, None), match)


def _solve(goals: _Goals, match: Match) -> bool:
    while goals is not None:
        pattern, value, goals = goals
        if pattern in match.values:
            if match.values[pattern] is not value:
                return match.fail(pattern, value)
            continue
        if type(pattern) is Choice:
            return _any(((option, value, goals) for option in pattern.options), match)
        if type(pattern) is Apply:
            operands = _application(pattern, value, match.graph)
            if operands is None:
                return match.fail(pattern, value)
            match.values[pattern] = value
            match.nodes.append((pattern, value.producer()))
            if pattern.op in COMMUTATIVE and len(operands) == 2:
                return _any((_with_sources(pattern, order, goals) for order in (operands, operands[::-1])), match)
            goals = _with_sources(pattern, operands, goals)
        elif not _accept(pattern, value, match):
            return match.fail(pattern, value)
    return True


def _any(alternatives: Iterator[_Goals], match: Match) -> bool:
    values, nodes = len(match.values), len(match.nodes)
    for goals in alternatives:
        if _solve(goals, match):
            return True
        del match.nodes[nodes:]
        while len(match.values) > values:
            match.values.popitem()
    return False


def _with_sources(pattern: Apply, operands: tuple[Found, ...], goals: _Goals) -> _Goals:
    for source, value in zip(reversed(pattern.sources), reversed(operands), strict=True):
        goals = (source, value, goals)
    return goals


def _application(pattern: Apply, value: Found, graph: ir.Graph) -> tuple[Found, ...] | None:
    """The operands of the node behind `value`, as many as the pattern has; None when it is no such node."""
    if not isinstance(value, ir.Value) or (node := value.producer()) is None:
        return None
    operands = _operands(node, pattern) if node.graph is graph and value.index() == 0 else None
    count = len(pattern.sources)
    if operands is None or any(operand is not None for operand in operands[count:]):
        return None
    return operands[:count] + (None,) * (count - len(operands))


def _accept(pattern: Variable | Number, value: Found, match: Match) -> bool:
    """Checks a leaf, and binds a variable."""
    if isinstance(pattern, Number):
        number = _number(value)
        return number is not None and abs(number - pattern.value) <= _TOLERANCE * max(abs(pattern.value), 1e-3)
    if pattern.absent:
        return value is None
    found = _number(value) if pattern.number else value
    if found is None or (not pattern.number and not isinstance(found, ir.Value)):
        return False
    match.values[pattern] = found
    return True


def _number(value: Found) -> float | int | None:
    return scalar_value(value) if isinstance(value, ir.Value) else value


def used_elsewhere(match: Match) -> ir.Value | None:
    """The first value inside the match that something outside reads; None when the match can be replaced whole."""
    inside = {node for _, node in match.nodes}
    for pattern, node in match.nodes[1:]:
        if not pattern.shared:
            for value in node.outputs:
                if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                    return value
    return None


def describe(pattern: Pattern) -> str:
    """The pattern in words, for a reason that a person reads."""
    match pattern:
        case Variable(name=name):
            return "a constant number" if pattern.number else f"the same value as {name}" if name else "no operand"
        case Number(value=value):
            return f"the constant {value:g}"
        case Apply(op=op, attributes=attributes):
            return op + "".join(f" with {name}={value}" for name, value in attributes)
        case Choice(options=options):
            return " or ".join(describe(option) for option in options)

"""Elementwise work as data: the epilogue of a fused op, or the body of a Pointwise.

Text form, one instruction per ';', the last one is the result, the empty text is the identity of `%0`:
`Add %0 %1 -> float32; Sigmoid $0 -> float32; Mul $0 $1 -> float32`. `%k` is the k-th operand, `$k` the result of
instruction k, anything else a literal number, which takes the type its position calls for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import GraphError
from ingot.ir.elementwise import INSTRUCTIONS, Array, Scalar, compute


@dataclass(frozen=True)
class Input:
    """`%index`"""

    index: int


@dataclass(frozen=True)
class Result:
    """`$index`"""

    index: int


@dataclass(frozen=True)
class Literal:
    """A number written in the text."""

    value: int | float


Operand = Input | Result | Literal
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Instruction:
    """One elementwise operation; `dtype` is its result's."""

    op: str
    operands: tuple[Operand, ...]
    dtype: str
    attributes: tuple[tuple[str, Scalar], ...] = ()

    def attribute(self, name: str) -> Scalar:
        """Value of an attribute, its default where not given."""
        return dict(self.attributes).get(name, INSTRUCTIONS[self.op].attributes.get(name, 0))


@dataclass(frozen=True)
class Expression:
    """Instructions in order; the last one is the result, none is the identity."""

    instructions: tuple[Instruction, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.instructions)

    @property
    def result(self) -> Operand:
        """What the expression evaluates to."""
        return Result(len(self.instructions) - 1) if self.instructions else Input(0)

    @property
    def dtype(self) -> str | None:
        """Result type; None for the identity."""
        return self.instructions[-1].dtype if self.instructions else None


IDENTITY = Expression()


# text


@lru_cache(maxsize=8192)
def parse(text: str) -> Expression:
    """The expression a text stands for; GraphError says what is wrong with it."""
    expression = Expression(tuple(_parse_instruction(part) for part in text.split(";") if part.strip()))
    problems = problems_of(expression)
    if problems:
        raise GraphError(f"the expression {text!r} is malformed: {problems[0]}")
    return expression


def _parse_instruction(text: str) -> Instruction:
    body, arrow, dtype = text.partition("->")
    if not arrow or not body.split():
        raise GraphError(f"the instruction {text.strip()!r} does not read `Op operand … -> dtype`")
    head, *operands = body.split()
    op, _, settings = head.partition(":")
    pairs = (setting.partition("=") for setting in settings.split(",") if setting)
    attributes = tuple(sorted((name, _parse_scalar(value)) for name, _, value in pairs))
    return Instruction(op, tuple(map(_parse_operand, operands)), dtype.strip(), attributes)


def _parse_operand(text: str) -> Operand:
    if text[0] in "%$":
        if not text[1:].isdecimal():
            raise GraphError(f"{text!r} is not an operand: a number belongs after {text[0]}")
        return (Input if text[0] == "%" else Result)(int(text[1:]))
    value = _parse_scalar(text)
    if isinstance(value, str):
        raise GraphError(f"{text!r} is not an operand: %k, $k or a number is")
    return Literal(value)


def _parse_scalar(text: str) -> Scalar:
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return math.nan if value != value else value  # one object, so that equal expressions compare equal
    return text


def format(expression: Expression) -> str:
    """Text form; parse(format(e)) == e."""
    return "; ".join(map(_format_instruction, expression.instructions))


def _format_instruction(instruction: Instruction) -> str:
    settings = ",".join(f"{name}={value}" for name, value in instruction.attributes)
    head = f"{instruction.op}:{settings}" if settings else instruction.op
    return f"{' '.join([head, *map(_format_operand, instruction.operands)])} -> {instruction.dtype}"


def _format_operand(operand: Operand) -> str:
    match operand:
        case Input(index):
            return f"%{index}"
        case Result(index):
            return f"${index}"
        case Literal(value):
            return repr(value)


# legality and types


def problems_of(expression: Expression) -> list[str]:
    """What is illegal in an expression, whatever its operands."""
    problems = []
    for index, instruction in enumerate(expression.instructions):
        entry = INSTRUCTIONS.get(instruction.op)
        if entry is None:
            problems.append(f"there is no instruction {instruction.op!r}")
            continue
        if len(instruction.operands) != entry.arity:
            problems.append(f"{instruction.op} takes {entry.arity} operands, not {len(instruction.operands)}")
        if not {name for name, _ in instruction.attributes} <= entry.attributes.keys():
            problems.append(f"{instruction.op} has no attributes but {sorted(entry.attributes)}")
        if any(isinstance(operand, Result) and operand.index >= index for operand in instruction.operands):
            problems.append(f"instruction {index} reads a result that is not there yet")
    return problems


def operands_of(expression: Expression) -> tuple[int, ...]:
    """Indices of the operands read, ascending; the identity reads operand 0."""
    if not expression:
        return (0,)
    operands = (operand for instruction in expression.instructions for operand in instruction.operands)
    return tuple(sorted({operand.index for operand in operands if isinstance(operand, Input)}))


def result_dtype(expression: Expression, operand_dtypes: Sequence[str]) -> str:
    """Type of the result; the identity keeps that of operand 0."""
    return expression.dtype or operand_dtypes[0]


def dtypes_of(expression: Expression, operand_dtypes: Sequence[str]) -> list[tuple[str, ...]]:
    """For each instruction the types its operands are read as, literals included."""
    return [operand_types(expression, instruction, operand_dtypes) for instruction in expression.instructions]


def operand_types(expression: Expression, instruction: Instruction, operand_dtypes: Sequence[str]) -> tuple[str, ...]:
    """Types of one instruction's operands; a literal has the type its position calls for."""
    known = [_known_dtype(expression, operand, operand_dtypes) for operand in instruction.operands]
    return tuple(dtype or _literal_dtype(instruction, position, known) for position, dtype in enumerate(known))


def _known_dtype(expression: Expression, operand: Operand, operand_dtypes: Sequence[str]) -> str | None:
    match operand:
        case Input(index):
            return operand_dtypes[index]
        case Result(index):
            return expression.instructions[index].dtype
        case Literal():
            return None


def _literal_dtype(instruction: Instruction, position: int, known: Sequence[str | None]) -> str:
    """Comparisons: as the other operand. Where: bool first. Scales and zero points: as x or the result."""
    typing = INSTRUCTIONS[instruction.op].typing
    if typing == "compare":
        return next((dtype for dtype in known if dtype), "float32")
    if typing == "select" and position == 0:
        return "bool"
    if typing == "quantize" and position < 2:
        return known[0] or "float32"
    if typing == "dequantize" and position != 1:
        return known[0] or "int8"
    return instruction.dtype


# meaning


def evaluate(expression: Expression, operands: Sequence[Array]) -> Array:
    """Result with numpy broadcasting; every instruction rounds to its own dtype."""
    if not expression:
        return operands[0]
    results: list[Array] = []
    dtypes = dtypes_of(expression, [operand.dtype.name for operand in operands])
    with np.errstate(all="ignore"):
        for instruction, types in zip(expression.instructions, dtypes, strict=True):
            values = [_value(operand, operands, results, dtype)
                      for operand, dtype in zip(instruction.operands, types, strict=True)]  # fmt: skip
            results.append(compute(instruction.op, values, instruction.dtype, dict(instruction.attributes)))
    return results[-1]


def _value(operand: Operand, operands: Sequence[Array], results: Sequence[Array], dtype: str) -> Array:
    match operand:
        case Input(index):
            return operands[index]
        case Result(index):
            return results[index]
        case Literal(value):
            return np.asarray(value).astype(numpy_dtype(dtype))


# construction


def apply(op: str, *operands: Operand | int | float, dtype: str, **attributes: Scalar) -> Expression:
    """One instruction; numbers become literals."""
    return append(IDENTITY, op, *operands, dtype=dtype, **attributes)


def append(expression: Expression, op: str, *operands: Operand | int | float, dtype: str,
           **attributes: Scalar) -> Expression:  # fmt: skip
    """The expression followed by one more instruction, which names `expression.result` where it continues it."""
    wrapped = tuple(Literal(value) if isinstance(value, int | float) else value for value in operands)
    instruction = Instruction(op, wrapped, dtype, tuple(sorted(attributes.items())))
    return Expression((*expression.instructions, instruction))


def substitute(expression: Expression, inputs: Mapping[int, Operand]) -> Expression:
    """Operands `%k` replaced, those not named stay."""
    return _mapped(expression.instructions, lambda operand: inputs.get(operand.index, operand))


def _mapped(instructions: Iterable[Instruction], change: Callable[[Input], Operand]) -> Expression:
    def changed(instruction: Instruction) -> Instruction:
        operands = tuple(change(o) if isinstance(o, Input) else o for o in instruction.operands)
        return replace(instruction, operands=operands)

    return Expression(tuple(map(changed, instructions)))


def compose(outer: Expression, inner: Expression, position: int, outer_operands: Sequence[Name],
            inner_operands: Sequence[Name]) -> tuple[Expression, tuple[Name, ...]]:  # fmt: skip
    """outer(…, inner(…), …) with inner as outer's operand `position`, and the merged operands, inner's first.

    Equal operands become one, equal instructions too; operands nobody reads are kept, `prune` drops them.
    """
    merged = list(dict.fromkeys([*inner_operands, *(o for i, o in enumerate(outer_operands) if i != position)]))
    place = {operand: index for index, operand in enumerate(merged)}
    inside = substitute(inner, {i: Input(place[o]) for i, o in enumerate(inner_operands)})
    joint = Result(len(inside.instructions) - 1) if inside else Input(place[inner_operands[0]])
    inputs: dict[int, Operand] = {i: Input(place[o]) for i, o in enumerate(outer_operands) if i != position}
    inputs[position] = joint
    if not outer:
        return tidy(inside), tuple(merged)
    outside = substitute(_shifted(outer, len(inside.instructions)), inputs)
    return tidy(Expression((*inside.instructions, *outside.instructions))), tuple(merged)


def _shifted(expression: Expression, offset: int) -> Expression:
    def shift(instruction: Instruction) -> Instruction:
        operands = tuple(Result(o.index + offset) if isinstance(o, Result) else o for o in instruction.operands)
        return replace(instruction, operands=operands)

    return Expression(tuple(map(shift, expression.instructions)))


def without_first(expression: Expression) -> Expression:
    """The rest, with operand 0 in the place of the first instruction's result."""
    rest = _shifted(Expression(expression.instructions[1:]), -1)
    gone = {Result(-1): Input(0)}
    return Expression(tuple(
        replace(i, operands=tuple(gone.get(o, o) if isinstance(o, Result) else o for o in i.operands))
        for i in rest.instructions
    ))  # fmt: skip


def tidy(expression: Expression) -> Expression:
    """Common instructions merged, those without effect on the result removed."""
    kept: list[Instruction] = []
    place: dict[Instruction, int] = {}
    moved: dict[int, int] = {}
    live = _live(expression)
    for index, instruction in enumerate(expression.instructions):
        if index not in live:
            continue
        operands = tuple(Result(moved[o.index]) if isinstance(o, Result) else o for o in instruction.operands)
        instruction = replace(instruction, operands=operands)
        moved[index] = place.setdefault(instruction, len(kept))
        if moved[index] == len(kept):
            kept.append(instruction)
    return Expression(tuple(kept))


def _live(expression: Expression) -> set[int]:
    live = {len(expression.instructions) - 1}
    for index in range(len(expression.instructions) - 1, -1, -1):
        if index in live:
            live |= {o.index for o in expression.instructions[index].operands if isinstance(o, Result)}
    return live


def prune(expression: Expression, operands: Sequence[Name], keep: int = 0) -> tuple[Expression, tuple[Name, ...]]:
    """Operands nobody reads dropped, the first `keep` excepted (an epilogue keeps its accumulator)."""
    used = sorted({*operands_of(expression), *range(keep)})
    renumbered = substitute(expression, {old: Input(new) for new, old in enumerate(used)})
    return renumbered, tuple(operands[index] for index in used)


def bind(expression: Expression, position: int, value: int | float) -> Expression:
    """Operand `position` replaced by a literal; later operands move down by one."""
    last = max(operands_of(expression), default=0)
    moved: dict[int, Operand] = {index: Input(index - 1) for index in range(position + 1, last + 1)}
    return substitute(expression, {**moved, position: Literal(value)})

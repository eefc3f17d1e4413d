"""The affine beginning of an expression, `scale * %0 + shift` with constants, so that weights can take it over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.elementwise import FLOATS, Array
from ingot.ir.expression import IDENTITY, Expression, Input, Instruction, Literal, Operand
from ingot.ir.graph import constant_of
from ingot.passes.facts import Shape, channel_vector


@dataclass(frozen=True)
class Affine:
    """rest(scale * %0 + shift, …); scale and shift are numbers or vectors along the channels, in float64."""

    scale: Array
    shift: Array
    rest: Expression
    steps: tuple[str, ...]

    @property
    def scales(self) -> bool:
        """Whether there is more to it than one added bias."""
        return any(op != "Add" for op in self.steps) or len(self.steps) > 1


def vectors_of(operands: Sequence[ir.Value], output: Shape, axis: int) -> dict[int, Array]:
    """By operand index, from 1 on: the constants that are scalars or vectors along the axis."""
    found: dict[int, Array] = {}
    for index, value in enumerate(operands, 1):
        array = constant_of(value)
        vector = None if array is None else channel_vector(array, output, axis)
        if vector is not None and vector.dtype.kind == "f":
            found[index] = vector.astype(np.float64)
    return found


def peel(expression: Expression, vectors: Mapping[int, Array]) -> Affine:
    """As much of the expression's beginning as is affine in `%0` (which may be nothing)."""
    current: Operand = Input(0)
    scale, shift = np.asarray(1.0), np.asarray(0.0)
    steps: list[str] = []
    while (place := _only_reader(expression, current)) is not None:
        instruction = expression.instructions[place]
        step = _step(instruction, current, vectors)
        if step is None:
            break
        factor, term = step
        scale, shift = np.asarray(scale * factor), np.asarray(shift * factor + term)
        steps.append(instruction.op)
        current = expressions.Result(place)
    return Affine(scale, shift, _after(expression, current), tuple(steps))


def _only_reader(expression: Expression, operand: Operand) -> int | None:
    readers = [place for place, instruction in enumerate(expression.instructions) if operand in instruction.operands]
    return readers[0] if len(readers) == 1 else None


def _step(instruction: Instruction, current: Operand, vectors: Mapping[int, Array]) -> tuple[Array, Array] | None:
    """(factor, term) of an instruction that is factor * current + term."""
    if instruction.dtype not in FLOATS or instruction.operands.count(current) != 1:
        return None
    one, zero = np.asarray(1.0), np.asarray(0.0)
    if instruction.op == "Neg":
        return -one, zero
    if instruction.op not in ("Add", "Sub", "Mul", "Div"):
        return None
    first = instruction.operands[0] == current
    other = _constant(instruction.operands[1 if first else 0], vectors)
    if other is None:
        return None
    match instruction.op:
        case "Add":
            return one, other
        case "Sub":
            return (one, -other) if first else (-one, other)
        case "Mul":
            return other, zero
        case _:
            return (1 / other, zero) if first and np.all(other != 0) else None


def _constant(operand: Operand, vectors: Mapping[int, Array]) -> Array | None:
    if isinstance(operand, Literal):
        return np.asarray(operand.value, np.float64)
    return vectors.get(operand.index) if isinstance(operand, Input) else None


def _after(expression: Expression, current: Operand) -> Expression:
    """What follows `current`, which becomes `%0`."""
    if isinstance(current, Input):
        return expression
    if current == expression.result:
        return IDENTITY

    def moved(instruction: Instruction) -> Instruction:
        return replace(instruction, operands=tuple(Input(0) if o == current else o for o in instruction.operands))

    return expressions.tidy(Expression(tuple(map(moved, expression.instructions))))

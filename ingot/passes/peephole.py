"""Expressions made simpler an instruction at a time: identities, repeated activations, casts that undo one another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.elementwise import FLOATS, INTEGERS
from ingot.ir.expression import Expression, Input, Instruction, Literal, Operand, Result
from ingot.ir.graph import dtype_of
from ingot.ir.ops import broadcast
from ingot.ir.shapes import shape_of

Operands = tuple[ir.Value, ...]


def simplified(text: str, operands: Operands, output: ir.Value) -> tuple[str, Operands]:
    """The expression and the operands it needs; an empty text where it is its first operand."""
    simple = simpler(text, tuple(map(dtype_of, operands)))
    if not simple.instructions:
        return "", operands
    pruned, kept = expressions.prune(simple, operands)
    shapes = [shape_of(value) for value in kept]
    known = [shape for shape in shapes if shape is not None]
    if not kept or len(known) < len(shapes) or broadcast(*known) != shape_of(output):
        return expressions.format(simple), operands
    return expressions.format(pruned), kept


@lru_cache(maxsize=8192)
def simpler(text: str, dtypes: tuple[str, ...]) -> Expression:
    """The expression over operands of these types, as simple as the rules make it."""
    expression = expressions.parse(text)
    while (place := _first(expression, dtypes)) is not None:
        index, replacement = place
        expression = _replaced(expression, index, replacement)
    return expression


@dataclass(frozen=True)
class Context:
    """What a rule may ask about the operands of an instruction."""

    expression: Expression
    dtypes: tuple[str, ...]

    def maker(self, operand: Operand, *ops: str) -> Instruction | None:
        """The instruction that makes the operand, when it is one of these."""
        if not isinstance(operand, Result):
            return None
        instruction = self.expression.instructions[operand.index]
        return instruction if instruction.op in ops else None

    def dtype(self, operand: Operand) -> str | None:
        match operand:
            case Input(index):
                return self.dtypes[index]
            case Result(index):
                return self.expression.instructions[index].dtype
        return None


Replacement = Operand | Instruction
Rule = Callable[[Instruction, Context], Replacement | None]


def _first(expression: Expression, dtypes: tuple[str, ...]) -> tuple[int, Replacement] | None:
    context = Context(expression, dtypes)
    for index, instruction in enumerate(expression.instructions):
        for rule in (*_RULES.get(instruction.op, ()), _constant):
            replacement = rule(instruction, context)
            if replacement is not None and _is_possible(replacement, Result(index) == expression.result):
                return index, replacement
    return None


def _is_possible(replacement: Replacement, whole: bool) -> bool:
    """The whole expression can be its first operand, but no other one and no number."""
    if not whole:
        return True
    return replacement == Input(0) if isinstance(replacement, Input) else not isinstance(replacement, Literal)


def _replaced(expression: Expression, index: int, replacement: Replacement) -> Expression:
    instructions = list(expression.instructions)
    if isinstance(replacement, Instruction):
        instructions[index] = replacement
        return expressions.tidy(Expression(tuple(instructions)))
    if Result(index) == expression.result:
        last = replacement.index if isinstance(replacement, Result) else -1
        return expressions.tidy(Expression(tuple(instructions[: last + 1]))) if last >= 0 else expressions.IDENTITY
    for place, instruction in enumerate(instructions):
        operands = tuple(replacement if operand == Result(index) else operand for operand in instruction.operands)
        instructions[place] = replace(instruction, operands=operands)
    return expressions.tidy(Expression(tuple(instructions)))


def _constant(instruction: Instruction, context: Context) -> Replacement | None:
    """f(1, 2) => its value"""
    if not all(isinstance(operand, Literal) for operand in instruction.operands) or instruction.dtype == "bool":
        return None
    value = expressions.evaluate(Expression((instruction,)), [])
    if value.dtype == np.float32:
        return Literal(float(str(value)))
    return Literal(value.item()) if value.dtype.kind in "iuf" else None


def _neutral(right: float, commutes: bool) -> Rule:
    def rule(instruction: Instruction, context: Context) -> Replacement | None:
        first, second = instruction.operands
        if second == Literal(right) and context.dtype(first) == instruction.dtype:
            return first
        if commutes and first == Literal(right) and context.dtype(second) == instruction.dtype:
            return second
        return None

    return rule


def _repeated(instruction: Instruction, context: Context) -> Replacement | None:
    """f(f(x)) => f(x)"""
    inner = context.maker(instruction.operands[0], instruction.op)
    return instruction.operands[0] if inner is not None and inner.attributes == instruction.attributes else None


def _undone(instruction: Instruction, context: Context) -> Replacement | None:
    """f(f(x)) => x"""
    inner = context.maker(instruction.operands[0], instruction.op)
    return None if inner is None else inner.operands[0]


def _positive(instruction: Instruction, context: Context) -> Replacement | None:
    """Relu(x) => x where x is the result of what is never negative"""
    source = instruction.operands[0]
    return source if context.maker(source, "Sigmoid", "Exp", "Abs", "Softplus") else None


def _clipped_relu(instruction: Instruction, context: Context) -> Replacement | None:
    """Clip(Relu(x), lo, hi) => Clip(x, max(lo, 0), hi)"""
    inner = context.maker(instruction.operands[0], "Relu")
    _, low, high = instruction.operands
    if inner is None or not isinstance(low, Literal) or not isinstance(high, Literal) or high.value < 0:
        return None
    return Instruction("Clip", (inner.operands[0], Literal(max(low.value, 0)), high), instruction.dtype)


def _relu_clip(instruction: Instruction, context: Context) -> Replacement | None:
    """Relu(Clip(x, lo, hi)) => Clip(x, max(lo, 0), hi)"""
    inner = context.maker(instruction.operands[0], "Clip")
    if inner is None:
        return None
    x, low, high = inner.operands
    if not isinstance(low, Literal) or not isinstance(high, Literal) or high.value < 0:
        return None
    return Instruction("Clip", (x, Literal(max(low.value, 0)), high), instruction.dtype)


def _max_zero(instruction: Instruction, context: Context) -> Replacement | None:
    """Max(x, 0) => Relu(x)"""
    if Literal(0) not in instruction.operands or instruction.dtype not in FLOATS:
        return None
    other = next((o for o in instruction.operands if not isinstance(o, Literal)), None)
    return None if other is None else Instruction("Relu", (other,), instruction.dtype)


_BITS = {name: int("".join(filter(str.isdigit, name)) or 0) for name in INTEGERS}
_MANTISSA = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}


def _holds(wide: str, narrow: str) -> bool:
    """Whether every number of the narrow type is one of the wide type."""
    if wide == narrow or narrow == "bool":
        return True
    if narrow in INTEGERS and wide in INTEGERS:
        signed, unsigned_source = not wide.startswith("u"), narrow.startswith("u")
        return (_BITS[wide] > _BITS[narrow] and (signed or unsigned_source)) or (
            _BITS[wide] >= _BITS[narrow] and signed != unsigned_source
        )  # fmt: skip
    if narrow in INTEGERS:
        return _BITS[narrow] <= _MANTISSA.get(wide, 0)
    return (narrow, wide) in {("float16", "float32"), ("bfloat16", "float32"), ("float32", "float64"),
                              ("float16", "float64"), ("bfloat16", "float64")}  # fmt: skip


def _cast(instruction: Instruction, context: Context) -> Replacement | None:
    """Cast(x) to x's type => x; Cast(Cast(x)) => Cast(x) where the inner one loses nothing"""
    source = instruction.operands[0]
    if context.dtype(source) == instruction.dtype:
        return source
    inner = context.maker(source, "Cast")
    if inner is None:
        return None
    original = context.dtype(inner.operands[0])
    if original is None or not _holds(inner.dtype, original):
        return None
    return Instruction("Cast", inner.operands, instruction.dtype, instruction.attributes)


def _requantized(instruction: Instruction, context: Context) -> Replacement | None:
    """Quantize(Dequantize(q, s, z), s, z) => q"""
    source, *settings = instruction.operands
    inner = context.maker(source, "Dequantize")
    if inner is None or list(inner.operands[1:]) != settings or context.dtype(inner.operands[0]) != instruction.dtype:
        return None
    return inner.operands[0]


_RANGES = {"uint8": (0, 255), "int8": (-128, 127)}


def _saturating(instruction: Instruction, context: Context) -> Replacement | None:
    """Quantize(Clip(x, lo, hi)) => Quantize(x) where the integers end at lo and hi too"""
    source, scale, zero = instruction.operands
    inner = context.maker(source, "Relu", "Clip")
    limits = _RANGES.get(instruction.dtype)
    if inner is None or limits is None or not isinstance(scale, Literal) or not isinstance(zero, Literal):
        return None
    bounds = inner.operands[1:] or (Literal(0), Literal(math.inf))
    if not all(isinstance(bound, Literal) for bound in bounds):
        return None
    low, high = (bound.value / scale.value + zero.value for bound in bounds if isinstance(bound, Literal))
    if low > limits[0] or high < limits[1]:
        return None
    return replace(instruction, operands=(inner.operands[0], scale, zero))


_RULES: dict[str, tuple[Rule, ...]] = {
    "Add": (_neutral(0, True),), "Sub": (_neutral(0, False),), "Mul": (_neutral(1, True),),
    "Div": (_neutral(1, False),), "Pow": (_neutral(1, False),), "Neg": (_undone,), "Not": (_undone,),
    "Abs": (_repeated,), "Floor": (_repeated,), "Ceil": (_repeated,), "Round": (_repeated,), "Sign": (_repeated,),
    "Relu": (_repeated, _positive, _relu_clip), "Clip": (_clipped_relu,), "Max": (_max_zero,), "Cast": (_cast,),
    "Quantize": (_requantized, _saturating),
}  # fmt: skip

"""What values an expression can take, by interval arithmetic: code that knows needs no guards.

A bound is a number or one per output channel. Nothing (None) is known of floats from outside, nor where an infinity, a
NaN or an integer that wraps could arise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ingot.ir.elementwise import Array
from ingot.ir.expression import Expression, Input, Instruction, Literal, Operand, Result

_BYTES = {"uint8": (0, 255), "int8": (-128, 127)}
_LIMITS = {**_BYTES, "int32": (-(2**31), 2**31 - 1), "float32": (-1e30, 1e30)}


@dataclass(frozen=True, eq=False)
class Interval:
    """Every value lies in [low, high], float64."""

    low: Array
    high: Array

    @property
    def largest(self) -> float:
        """The largest magnitude of all channels."""
        return float(max(np.max(np.abs(self.low)), np.max(np.abs(self.high))))

    def fits(self, dtype: str) -> bool:
        """Whether a type holds all of it, with room for the roundings of float32."""
        low, high = _LIMITS.get(dtype, (0, 0))
        return bool(np.all(self.low >= low) and np.all(self.high <= high))


Known = Interval | None


def interval(*values: Array | float) -> Interval:
    """The smallest one that holds all values, channel by channel."""
    arrays = [np.asarray(value, np.float64) for value in values]
    low, high = arrays[0], arrays[0]
    for array in arrays[1:]:
        low, high = np.minimum(low, array), np.maximum(high, array)
    return Interval(low, high)


def of_dtype(dtype: str) -> Known:
    """All values of a byte."""
    return interval(*map(float, _BYTES[dtype])) if dtype in _BYTES else None


def of_constant(values: Array | None) -> Known:
    """One number, or one for every channel."""
    if values is None or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        return None
    return interval(values.ravel() if values.size > 1 else values.reshape(()))


def of_products(weight: Array, dtype: str, zero_point: int, bias: Array | None = None) -> Interval:
    """Σ (x - zero_point) w over all but the first axis of w, x a byte, plus a bias: for each output."""
    low, high = _BYTES[dtype]
    flat = weight.reshape(len(weight), -1).astype(np.float64)
    rises, falls = np.maximum(flat, 0).sum(axis=1), np.minimum(flat, 0).sum(axis=1)
    ends = ((low - zero_point), (high - zero_point))
    start = 0.0 if bias is None else bias.ravel().astype(np.float64)
    return Interval(start + ends[0] * rises + ends[1] * falls, start + ends[1] * rises + ends[0] * falls)


def ranges(expression: Expression, operands: Sequence[Known]) -> list[tuple[Known, ...]]:
    """What is known of each instruction's operands."""
    results: list[Known] = []
    taken = []
    for instruction in expression.instructions:
        known = tuple(_operand(operand, operands, results) for operand in instruction.operands)
        taken.append(known)
        results.append(_result(instruction, known))
    return taken


def _operand(operand: Operand, operands: Sequence[Known], results: Sequence[Known]) -> Known:
    match operand:
        case Input(index):
            return operands[index] if index < len(operands) else None
        case Result(index):
            return results[index]
        case Literal(value):
            return interval(float(value)) if np.isfinite(value) else None


def _result(instruction: Instruction, known: Sequence[Known]) -> Known:
    if instruction.op == "Quantize":
        return of_dtype(instruction.dtype)
    meaning = _MEANINGS.get(instruction.op)
    there = [one for one in known if one is not None]
    if meaning is None or len(there) < len(known) or not there:
        return None
    result = meaning(*there)
    return result if result.fits(instruction.dtype) else None


def _sum(a: Interval, b: Interval) -> Interval:
    return Interval(a.low + b.low, a.high + b.high)


def _difference(a: Interval, b: Interval) -> Interval:
    return Interval(a.low - b.high, a.high - b.low)


def _product(a: Interval, b: Interval) -> Interval:
    return interval(a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high)


def _dequantized(x: Interval, scale: Interval, zero: Interval) -> Interval:
    return _product(_difference(x, zero), scale)


_MEANINGS: dict[str, Callable[..., Interval]] = {
    "Add": _sum,
    "Sub": _difference,
    "Mul": _product,
    "Dequantize": _dequantized,
    "Cast": lambda x: x,
    "Relu": lambda x: Interval(np.maximum(x.low, 0), np.maximum(x.high, 0)),
    "Neg": lambda x: Interval(-x.high, -x.low),
    "Min": lambda a, b: Interval(np.minimum(a.low, b.low), np.minimum(a.high, b.high)),
    "Max": lambda a, b: Interval(np.maximum(a.low, b.low), np.maximum(a.high, b.high)),
}

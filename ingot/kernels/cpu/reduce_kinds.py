"""What each kind of Reduce starts from, does with an element, how it combines partial results and finishes."""

from __future__ import annotations

import math as numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ingot.ir.elementwise import FLOATS, NARROW_FLOATS
from ingot.kernels.cpu import math
from ingot.kernels.cpu.llvm import Function, Value, element_of, lanes_of
from ingot.kernels.cpu.math import magnitude
from ingot.kernels.cpu.render_convert import convert, integer_range, is_signed

Combine = Literal["add", "multiply", "max", "min"]


@dataclass(frozen=True)
class Kind:
    """`real`: integers are accumulated in double. `widening`: 8-bit integers in int32, and stay so. `shifted`: the
    largest element is found first."""

    combine: Combine
    prepare: Callable[[Function, Value, str], Value] = lambda f, x, dtype: x
    finish: Callable[[Function, Value, Value], Value] = lambda f, total, count: total
    real: bool = False
    widening: bool = False
    shifted: bool = False


def _absolute(f: Function, x: Value, dtype: str) -> Value:
    if dtype in FLOATS:
        return magnitude(f, x)
    return f.select(f.compare("slt", x, 0), 0 - x, x) if is_signed(dtype) else x


def _mean(f: Function, total: Value, count: Value) -> Value:
    return f.binary("fdiv", total, count)


KINDS: dict[str, Kind] = {
    "sum": Kind("add", widening=True),
    "mean": Kind("add", finish=_mean, real=True),
    "max": Kind("max"),
    "min": Kind("min"),
    "prod": Kind("multiply"),
    "l1": Kind("add", _absolute),
    "l2": Kind("add", lambda f, x, dtype: x * x, lambda f, x, count: f.call("llvm.sqrt", x.type, x), real=True),
    "logsum": Kind("add", finish=lambda f, x, count: math.log(f, x), real=True),
    "logsumexp": Kind("add", finish=lambda f, x, count: math.log(f, x), real=True, shifted=True),
    "sumsquare": Kind("add", lambda f, x, dtype: x * x),
}


def accumulator(kind: Kind, dtype: str) -> str:
    """The type partial results have."""
    return "float64" if kind.real and dtype not in FLOATS else main_dtype(kind, dtype)


def main_dtype(kind: Kind, dtype: str) -> str:
    """The type the result has before the epilogue."""
    if dtype in NARROW_FLOATS:
        return "float32"
    return "int32" if kind.widening and dtype in ("int8", "uint8") else dtype


def identity(combine: Combine, dtype: str) -> float:
    """What changes nothing when combined."""
    if combine in ("add", "multiply"):
        return 0 if combine == "add" else 1
    if dtype == "bool":
        return 0 if combine == "max" else 1
    low, high = (-numbers.inf, numbers.inf) if dtype in FLOATS else integer_range(dtype)
    return low if combine == "max" else high


def combined(f: Function, combine: Combine, dtype: str, total: Value, x: Value) -> Value:
    """The partial result with one more element (or another partial result); NaN wins over any extreme."""
    if combine == "add":
        return total + x
    if combine == "multiply":
        return total * x
    if dtype == "bool":
        return f.binary("or" if combine == "max" else "and", total, x)
    if dtype not in FLOATS:
        return f.call(f"llvm.{'s' if is_signed(dtype) else 'u'}{combine}", total.type, total, x)
    better = f.select(f.compare("ogt" if combine == "max" else "olt", x, total), x, total)
    return f.select(f.compare("uno", x, x), x, better)


def across(f: Function, combine: Combine, dtype: str, vector: Value) -> Value:
    """All lanes combined into one scalar."""
    while lanes_of(vector.type) > 1:
        vector = combined(f, combine, dtype, *halves(f, vector))
    return vector


def halves(f: Function, x: Value) -> tuple[Value, Value]:
    """The lower and the upper lanes."""
    half = lanes_of(x.type) // 2
    if half == 1:
        return f.extract(x, 0), f.extract(x, 1)
    return f.shuffle(x, None, range(half)), f.shuffle(x, None, range(half, 2 * half))


def together(f: Function, combine: Combine, dtype: str, parts: Sequence[Value]) -> Value:
    """Several partial results as one, pairwise."""
    while len(parts) > 1:
        paired = [combined(f, combine, dtype, a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = [*paired, *parts[len(paired) * 2 :]]
    return parts[0]


def finished(f: Function, kind: Kind, dtype: str, total: Value, count: Value, peak: Value | None) -> Value:
    """The result in the type it has before the epilogue; `count` is i64, `peak` what the elements were reduced by."""
    real = f.splat(f.cast("sitofp", count, element_of(total.type)), lanes_of(total.type)) if kind.real else count
    result = kind.finish(f, total, real)
    result = result if peak is None else result + peak
    return convert(f, result, accumulator(kind, dtype), main_dtype(kind, dtype))


def finite_or_zero(f: Function, peak: Value) -> Value:
    """The largest element if it can be subtracted."""
    return f.select(f.compare("olt", magnitude(f, peak), numbers.inf), peak, 0.0)

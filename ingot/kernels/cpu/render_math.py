"""Renderers of transcendental functions and of the activations built on them."""

from __future__ import annotations

import math as numbers

from ingot.ir.expression import Literal
from ingot.kernels.cpu import math, math_double
from ingot.kernels.cpu.llvm import Function, Value, bits_of
from ingot.kernels.cpu.render import Site, render

_DIRECT = {
    "Exp": math.exp, "Log": math.log, "Tanh": math.tanh, "Sigmoid": math.sigmoid, "Erf": math.erf,
    "Softplus": math.softplus, "Sin": math_double.sin, "Cos": math_double.cos, "Tan": math_double.tan,
    "Asin": math_double.asin, "Acos": math_double.acos, "Atan": math_double.atan, "Sinh": math_double.sinh,
    "Cosh": math_double.cosh, "Asinh": math_double.asinh, "Acosh": math_double.acosh, "Atanh": math_double.atanh,
}  # fmt: skip


@render(*_DIRECT)
def direct(f: Function, site: Site, x: Value) -> Value:
    """Functions of one operand."""
    return _DIRECT[site.instruction.op](f, x)


@render("Elu")
def elu(f: Function, site: Site, x: Value) -> Value:
    """x > 0 ? x : alpha (exp(x) - 1)"""
    alpha = float(site.instruction.attribute("alpha"))
    return f.select(f.compare("ogt", x, 0.0), x, math.expm1(f, x) * alpha)


@render("Gelu")
def gelu(f: Function, site: Site, x: Value) -> Value:
    """x (1 + erf(x / √2)) / 2"""
    half = x * 0.5
    return f.fma(half, math.erf(f, x * numbers.sqrt(0.5)), half)


@render("GeluTanh")
def gelu_tanh(f: Function, site: Site, x: Value) -> Value:
    """x (1 + tanh u) / 2 = x / (1 + exp(-2 u)) with u = √(2/π) (x + 0.044715 x³)"""
    twice = 2 * numbers.sqrt(2 / numbers.pi)
    inner = f.fma(x * x, 0.044715 * -twice, f.constant(x.type, -twice))
    return f.binary("fdiv", x, math.exp(f, x * inner) + 1.0)


@render("Pow")
def power(f: Function, site: Site, x: Value, y: Value) -> Value:
    """xʸ; small whole exponents, roots and their reciprocals without a logarithm; integers wrap."""
    if not site.is_float:
        return _integer_power(f, site, x, y)
    exponent = site.instruction.operands[1]
    known = _known_power(f, x, float(exponent.value)) if isinstance(exponent, Literal) else None
    return math_double.pow(f, x, y) if known is None else known


def _known_power(f: Function, x: Value, exponent: float) -> Value | None:
    if exponent < 0:
        positive = _known_power(f, x, -exponent)
        return None if positive is None else f.binary("fdiv", 1.0, positive)
    if exponent == 0.5:
        return f.call("llvm.sqrt", x.type, x)
    if exponent not in (1.0, 2.0, 3.0, 4.0):
        return None
    result = x
    for _ in range(int(exponent) - 1):
        result = result * x
    return result


def _integer_power(f: Function, site: Site, x: Value, y: Value) -> Value:
    """By repeated squaring; negative exponents give 0."""

    def step(index: Value, result: Value, factor: Value, rest: Value) -> tuple[Value, ...]:
        odd = f.compare("ne", f.binary("and", rest, 1), 0)
        return f.select(odd, result * factor, result), factor * factor, f.binary("lshr", rest, 1)

    result, _, _ = f.loop(0, bits_of(x.type), step, (f.constant(x.type, 1), x, y))
    return f.select(f.compare("slt", y, 0), 0, result) if site.is_signed else result

"""Renderers of transcendental functions and of the activations built on them."""

from __future__ import annotations

import math as numbers

from ingot.kernels.cpu import math
from ingot.kernels.cpu.llvm import Function, Value
from ingot.kernels.cpu.render import Site, render

_DIRECT = {"Exp": math.exp, "Log": math.log, "Tanh": math.tanh, "Sigmoid": math.sigmoid, "Erf": math.erf,
           "Softplus": math.softplus}  # fmt: skip


@render(*_DIRECT)
def direct(f: Function, site: Site, x: Value) -> Value:
    """Functions that have a form of their own for float and for double."""
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

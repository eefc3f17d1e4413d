"""Renderers of arithmetic, comparison and logic."""

from __future__ import annotations

from ingot.kernels.cpu.llvm import Function, Value
from ingot.kernels.cpu.render import Site, render


@render("Add")
def add(f: Function, site: Site, a: Value, b: Value) -> Value:
    """a + b; integers wrap."""
    return a + b


@render("Sub")
def subtract(f: Function, site: Site, a: Value, b: Value) -> Value:
    """a - b; integers wrap."""
    return a - b


@render("Mul")
def multiply(f: Function, site: Site, a: Value, b: Value) -> Value:
    """a * b; integers wrap."""
    return a * b


@render("Relu")
def relu(f: Function, site: Site, x: Value) -> Value:
    """max(x, 0); NaN stays NaN."""
    if not site.is_float:
        return f.call("llvm.smax", x.type, x, 0)
    return f.select(f.compare("olt", x, 0.0), 0.0, x)

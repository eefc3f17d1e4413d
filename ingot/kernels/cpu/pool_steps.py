"""What a pool does with one element of its window, with a window's total, and where it starts: a table by kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ingot.ir.expression import parse
from ingot.kernels.cpu.llvm import Function, Value, is_float, lanes_of
from ingot.kernels.cpu.render import can_render, register_element, render_expression
from ingot.kernels.node import Node

FLOATS = ("float32", "float64", "float16", "bfloat16")
MAXIMA = (*FLOATS, "int8", "uint8")


@dataclass(frozen=True)
class Step:
    """`take(f, total, x)` adds an element in register form; an empty window is `start(dtype)`."""

    take: Callable[[Function, str, Value, Value], Value]
    start: Callable[[str], float]


def largest(f: Function, dtype: str, total: Value, x: Value) -> Value:
    """max(total, x); a NaN once met stays."""
    if not is_float(x.type):
        return f.call("llvm.umax" if dtype == "uint8" else "llvm.smax", x.type, total, x)
    greater = f.select(f.compare("ogt", x, total), x, total)
    return f.select(f.compare("uno", x, x), x, greater)


def lowest(dtype: str) -> float:
    """What any element is at least."""
    return {"uint8": 0, "int8": -128}.get(dtype, float("-inf"))


def _power(f: Function, total: Value, x: Value, p: int) -> Value:
    magnitude = f.call("llvm.fabs", x.type, x)
    power = magnitude
    for _ in range(p - 1):
        power = power * magnitude
    return total + power


def step_of(node: Node) -> Step:
    """The node's kind."""
    p = node.attributes.get("p", 2)
    return {
        "max": Step(largest, lowest),
        "average": Step(lambda f, dtype, total, x: total + x, lambda dtype: 0.0),
        "lp": Step(lambda f, dtype, total, x: _power(f, total, x, p), lambda dtype: 0.0),
    }[node.attributes["kind"]]


def root(f: Function, node: Node, total: Value) -> Value:
    """total ** (1 / p)"""
    p = node.attributes.get("p", 2)
    if p == 1:
        return total
    if p == 2:
        return f.call("llvm.sqrt", total.type, total)
    dtype = "float64" if "double" in total.type else "float32"
    return render_expression(f, parse(f"Pow %0 {1 / p!r} -> {dtype}"), [total], [dtype], lanes_of(total.type))


def can_pool(node: Node) -> bool:
    """Whether the node's kind and dtype have vector code."""
    kind, dtype = node.attributes["kind"], node.dtype
    power = kind != "lp" or node.attributes.get("p", 2) <= 2 or can_render(parse("Pow %0 0.5 -> float32"), ["float32"])
    return dtype in (MAXIMA if kind == "max" else FLOATS) and power and isinstance(node.output.shape[1], int)


def register_type(dtype: str) -> str:
    """LLVM element type of a dtype's totals."""
    return register_element(dtype)

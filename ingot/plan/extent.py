"""Sizes known only at run time: an extent is an int or an expression over symbols, e.g. "(H+1)//2".

Grammar: integers, symbol names, + - * // %, unary minus, min(a, b), max(a, b), parentheses.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from ingot.errors import EngineError

Extent = int | str

_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"min": min, "max": max}
_MAX_LENGTH = 2000


@lru_cache(maxsize=65536)
def _tree(extent: str) -> ast.expr:
    if len(extent) > _MAX_LENGTH:
        raise EngineError(f"the size expression {extent[:40]!r}… is longer than {_MAX_LENGTH} characters")
    try:
        return ast.parse(extent, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise EngineError(f"{extent!r} is not a size expression: {error}") from None


def evaluate(extent: Extent, symbols: Mapping[str, int]) -> int:
    """Value of an extent under a binding of its symbols; KeyError names an unbound symbol."""
    return extent if isinstance(extent, int) else _value(_tree(extent), symbols)


def _value(node: ast.expr, symbols: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.Name(id=name):
            return symbols[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, symbols)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            return _OPERATORS[type(operator)](_value(left, symbols), _value(right, symbols))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS and arguments:
            return _FUNCTIONS[name](*(_value(argument, symbols) for argument in arguments))
    raise EngineError(f"a size expression may not contain {ast.dump(node)[:60]}")


def symbols_of(extent: Extent) -> frozenset[str]:
    """Names an extent depends on."""
    if isinstance(extent, int):
        return frozenset()
    nodes = list(ast.walk(_tree(extent)))
    called = {id(n.func) for n in nodes if isinstance(n, ast.Call)}
    return frozenset(n.id for n in nodes if isinstance(n, ast.Name) and id(n) not in called)


def product(extents: Iterable[Extent]) -> Extent:
    """Product with integers folded: product((2, "N", 3)) == "N*6"."""
    constant, factors = 1, []
    for extent in extents:
        if isinstance(extent, int):
            constant *= extent
        else:
            factors.append(_wrapped(extent))
    if constant == 0 or not factors:
        return constant
    return "*".join([*sorted(factors), *([str(constant)] if constant != 1 else [])])


def add(a: Extent, b: Extent) -> Extent:
    """Sum with integers folded."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if a == 0 or b == 0:
        return b if a == 0 else a
    return f"{a}+{_wrapped(b)}"


def ceil_div(a: Extent, b: int) -> Extent:
    """Smallest count of blocks of `b` that covers `a`."""
    return -(-a // b) if isinstance(a, int) else f"({a}+{b - 1})//{b}" if b != 1 else a


def _wrapped(extent: Extent) -> str:
    text = str(extent)
    return text if text.isidentifier() or text.isdigit() else f"({text})"

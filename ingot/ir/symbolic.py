"""Size expressions through sympy: the shape inference's text in the plan's syntax, substitution, simplification."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

import sympy  # type: ignore[import-untyped, unused-ignore]
from onnx_ir._symbolic_shapes import parse_symbolic_expression

from ingot.plan.extent import Extent, symbols_of


def canonical(text: str) -> Extent:
    """The expression in the plan's syntax; ValueError for what that cannot say (square roots, powers of symbols)."""
    extent = translated(text)
    if extent is None:
        raise ValueError(f"{text!r} is not a size expression")
    return extent


_SIGN = re.compile(r"(^|[(,]) *-")  # in front of everything, which onnx_ir takes for a part of a power's base


@cache
def translated(text: str) -> Extent | None:
    """Like `canonical`, but None where it would raise."""
    if text.isidentifier():
        return text
    try:
        return _printed(_expression(text))
    except (ValueError, TypeError, ZeroDivisionError):
        return None


def substituted(extent: Extent, bound: Mapping[str, Extent]) -> Extent:
    """The extent with symbols replaced by sizes or other expressions, all at once."""
    if isinstance(extent, int) or not symbols_of(extent) & bound.keys():
        return extent
    if extent in bound:
        return bound[extent]
    values = {_symbol(name): size if isinstance(size, int) else _expression(size) for name, size in bound.items()}
    return _printed(_expression(extent).subs(values, simultaneous=True))


def _printed(expression: sympy.Expr) -> Extent:
    return int(expression) if expression.is_Integer else _print_top(expression)


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


@cache
def _expression(text: str) -> sympy.Expr:
    parsed = parse_symbolic_expression(_SIGN.sub(r"\g<1>0-", text))
    return parsed.subs({symbol: _symbol(symbol.name) for symbol in parsed.free_symbols})


def _print_top(expression: sympy.Expr) -> str:
    """A quotient outside any floor is exact, so // says the same."""
    numerator, denominator = sympy.together(expression).as_numer_denom()
    return _print(numerator) if denominator == 1 else f"{_factor(numerator)}//{_factor(denominator)}"


def _print(expression: sympy.Expr) -> str:
    if expression.is_Symbol:
        return str(expression.name)
    if expression.is_Integer:
        return str(int(expression))
    if expression.is_Add:
        return _print_sum(expression)
    if expression.is_Mul:
        return _print_product(expression)
    if expression.is_Pow and expression.exp.is_Integer and 0 < int(expression.exp) <= 8:
        return "*".join([_factor(expression.base)] * int(expression.exp))
    match expression:
        case sympy.floor():
            return _print_top(expression.args[0])
        case sympy.ceiling():
            return f"-({_factor(sympy.floor(-expression.args[0]))})"
        case sympy.Mod():
            return f"{_factor(expression.args[0])}%{_factor(expression.args[1])}"
        case sympy.Max() | sympy.Min():
            arguments = sorted(_print_top(argument) for argument in expression.args)
            return f"{'max' if isinstance(expression, sympy.Max) else 'min'}({','.join(arguments)})"
    raise ValueError(f"{expression} has no integer form")


def _print_sum(expression: sympy.Expr) -> str:
    text = ""
    for term in sorted(expression.args, key=lambda term: (term.could_extract_minus_sign(), term.is_number, str(term))):
        negative = term.could_extract_minus_sign()
        part = _print(-term if negative else term)
        if negative and re.search("//|%", part):
            part = f"({part})"  # a minus sign binds tighter than a quotient
        text += ("-" if negative else "+" if text else "") + part
    return text


def _print_product(expression: sympy.Expr) -> str:
    if expression.as_numer_denom()[1] != 1:
        return _print_top(expression)
    if expression.could_extract_minus_sign():
        return f"-{_factor(-expression)}"
    factors = sorted(expression.args, key=lambda factor: (factor.is_number, str(factor)))
    return "*".join(_factor(factor) for factor in factors)


def _factor(expression: sympy.Expr) -> str:
    """Parenthesised unless it binds tighter than a product."""
    text = _print_top(expression)
    return text if re.fullmatch(r"\w+|(max|min)\([^()]*\)", text) else f"({text})"

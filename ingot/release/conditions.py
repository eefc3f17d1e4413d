"""Conditions on a metric's result: `result < 0.05 and result >= 0`. Comparisons and arithmetic, nothing else."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_COMPARE: Mapping[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_UNARY: Mapping[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.Not: operator.not_}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"isnan": math.isnan, "isinf": math.isinf, "abs": abs}
_LEGAL = (ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.Compare, ast.BinOp, ast.UnaryOp, ast.Load)


def parse(text: str) -> ast.Expression:
    """The condition as a tree; ValueError names what is not allowed in it."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"condition {text!r}: {error.msg}") from error
    for node in ast.walk(tree):
        if not _allowed(node):
            raise ValueError(f"condition {text!r}: {ast.unparse(node)!r} is not allowed; `result`, numbers, < > and or")
    return tree


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id == "result" or node.id in _FUNCTIONS
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    return isinstance(node, _LEGAL) or type(node) in {*_BINARY, *_COMPARE, *_UNARY}


def holds(text: str, result: float) -> bool:
    """Whether the condition is true of a result; ValueError if it cannot be computed (a division by zero)."""
    try:
        return bool(_value(parse(text).body, result))
    except ArithmeticError as error:
        raise ValueError(f"condition {text!r} at result={result}: {error}") from error


def _value(node: ast.expr, result: float) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name():
            return result
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](_value(operand, result))
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_value(left, result), _value(right, result))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_value(value, result) for value in values)
        case ast.BoolOp(values=values):
            return any(_value(value, result) for value in values)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            terms = [_value(term, result) for term in (left, *comparators)]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, terms, terms[1:], strict=False))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name](*[_value(argument, result) for argument in arguments])
    raise ValueError(f"{ast.unparse(node)} is no condition")

"""Functions that exporters spell out in primitives: activations, softmax, norms of vectors, log-sum-exp."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ingot.ir.graph import dtype_of
from ingot.passes.facts import attribute, changed, maker, rank_of
from ingot.passes.pattern import Operators, Pattern
from ingot.passes.rewrite import Builder, Result, Table, reject, rewrite


def _unary(op: Builder, text: str, x: ir.Value) -> Result:
    """Pointwise of one operand; `{t}` is its type."""
    return op.Pointwise(x, expression=text.format(t=dtype_of(x)))


# activations


def _gelu_of(op: Operators, x: Any, gate: Pattern) -> Pattern:
    """x * gate / 2 in the orders it is written in"""
    return op.either(op.Mul(op.Mul(x, gate), 0.5), op.Mul(op.Mul(x, 0.5), gate), op.Mul(x, op.Mul(gate, 0.5)))


@rewrite(lambda op, x: _gelu_of(op, x, op.Add(op.Erf(op.either(op.Div(x, 2**0.5), op.Mul(x, 0.5**0.5))), 1)))
def gelu(op: Builder, x: ir.Value) -> Result:
    """x * (erf(x / √2) + 1) / 2 => Gelu(x)"""
    return _unary(op, "Gelu %0 -> {t}", x)


def _tanh_argument(op: Operators, x: Any) -> Pattern:
    """√(2/π) * (x + 0.044715 x³)"""
    square = op.either(op.Pow(x, 2), op.Mul(x, x))
    cube = op.either(op.Pow(x, 3), op.Mul(square, x))
    factored = op.Mul(x, op.Add(op.Mul(square, 0.044715), 1))
    inner = op.either(op.Add(x, op.Mul(cube, 0.044715)), factored)
    scaled_first = op.Mul(op.Mul(x, 0.7978845608), op.Add(op.Mul(square, 0.044715), 1))
    return op.either(op.Mul(inner, 0.7978845608), scaled_first)


@rewrite(lambda op, x: _gelu_of(op, x, op.Add(op.Tanh(_tanh_argument(op, x)), 1)))
def gelu_tanh(op: Builder, x: ir.Value) -> Result:
    """x * (tanh(√(2/π) (x + 0.044715 x³)) + 1) / 2 => GeluTanh(x)"""
    return _unary(op, "GeluTanh %0 -> {t}", x)


@rewrite(lambda op, x: op.either(
    op.Reciprocal(op.Add(op.Exp(op.Neg(x)), 1)), op.Div(1, op.Add(op.Exp(op.Neg(x)), 1))))  # fmt: skip
def sigmoid(op: Builder, x: ir.Value) -> Result:
    """1 / (1 + exp(-x)) => Sigmoid(x)"""
    return _unary(op, "Sigmoid %0 -> {t}", x)


@rewrite(lambda op, x: op.Mul(x, op.Sigmoid(x)))
def silu(op: Builder, x: ir.Value) -> Result:
    """x * Sigmoid(x) => one expression"""
    return _unary(op, "Sigmoid %0 -> {t}; Mul %0 $0 -> {t}", x)


@rewrite(lambda op, x: op.Log(op.Add(op.Exp(x), 1)))
def softplus(op: Builder, x: ir.Value) -> Result:
    """log(exp(x) + 1) => Softplus(x)"""
    return _unary(op, "Softplus %0 -> {t}", x)


def _relu6(op: Operators, x: Any) -> Pattern:
    """Clip(x + 3, 0, 6)"""
    return op.either(op.Clip(op.Add(x, 3), 0, 6), op.Min(op.Relu(op.Add(x, 3)), 6))


def _sixth(op: Operators, x: Pattern) -> Pattern:
    return op.either(op.Div(x, 6), op.Mul(x, 1 / 6))


@rewrite(lambda op, x: op.either(
    op.Mul(x, _sixth(op, _relu6(op, x))), _sixth(op, op.Mul(x, _relu6(op, x)))))  # fmt: skip
def hard_swish(op: Builder, x: ir.Value) -> Result:
    """x * Clip(x + 3, 0, 6) / 6 => HardSwish(x)"""
    return _unary(op, "HardSwish %0 -> {t}", x)


@rewrite(lambda op, x: op.Mul(x, op.HardSigmoid(x, beta=0.5, capture="gate")))
def hard_swish_gated(op: Builder, x: ir.Value, gate: ir.Value) -> Result:
    """x * HardSigmoid(x; 1/6, 1/2) => HardSwish(x)"""
    node = gate.producer()
    assert node is not None
    if "alpha=0.1666" not in attribute(node, "expression"):
        return reject("its slope is not 1/6", gate)
    return _unary(op, "HardSwish %0 -> {t}", x)


@rewrite(lambda op, x: _sixth(op, _relu6(op, x)))
def hard_sigmoid(op: Builder, x: ir.Value) -> Result:
    """Clip(x + 3, 0, 6) / 6 => HardSigmoid(x; 1/6, 1/2)"""
    return _unary(op, f"HardSigmoid:alpha={1 / 6},beta=0.5 %0 -> {{t}}", x)


# softmax


def _normalised(op: Operators, x: Any) -> Pattern:
    powers = op.Exp(x)
    sums = op.Reduce(powers, kind="sum", capture="sums")
    return op.either(op.Div(powers, sums), op.Mul(powers, op.Reciprocal(sums)))


@rewrite(_normalised)
def softmax(op: Builder, x: ir.Value, sums: ir.Value) -> Result:
    """exp(x) / sum(exp(x)) => Softmax(x)"""
    axis = _single_axis(sums)
    return reject("the sum is not along one kept axis", sums) if axis is None else op.Softmax(x, axis=axis)


@rewrite(lambda op, x: op.Sub(x, op.Reduce(x, kind="logsumexp", capture="sums")))
def log_softmax_of_sum(op: Builder, x: ir.Value, sums: ir.Value) -> Result:
    """x - log(sum(exp(x))) => Softmax(x) with log"""
    axis = _single_axis(sums)
    return reject("the sum is not along one kept axis", sums) if axis is None else op.Softmax(x, axis=axis, log=1)


@rewrite(lambda op, x: op.Softmax(op.Sub(x, op.shared(op.Reduce(x, kind="max", capture="peak"))), capture="whole"))
def shifted_softmax(op: Builder, x: ir.Value, peak: ir.Value, whole: ir.Value) -> Result:
    """Softmax(x - max(x)) => Softmax(x), which does that by itself"""
    node = maker(whole, "Softmax")
    if node is None or _single_axis(peak) != attribute(node, "axis"):
        return reject("the maximum is along another axis", peak)
    return op.Softmax(x, **changed(node))


def _single_axis(reduced: ir.Value) -> int | None:
    """The one axis of a plain Reduce that keeps it."""
    node = maker(reduced, "Reduce")
    if node is None or not attribute(node, "keepdims") or attribute(node, "epilogue"):
        return None
    axes = attribute(node, "axes")
    return int(axes[0]) if len(axes) == 1 else None


# reductions


def _reduced(op: Builder, x: ir.Value, sums: ir.Value, kind: str) -> Result:
    node = maker(sums, "Reduce")
    if node is None or attribute(node, "epilogue") or rank_of(x) != rank_of(node.inputs[0] or x):
        return None
    return op.Reduce(x, **changed(node, kind=kind))


@rewrite(lambda op, x: op.Reduce(op.either(op.Mul(x, x), op.Pow(x, 2)), kind="sum", capture="sums"))
def sum_of_squares(op: Builder, x: ir.Value, sums: ir.Value) -> Result:
    """sum(x²) => Reduce(x; sumsquare)"""
    return _reduced(op, x, sums, "sumsquare")


@rewrite(lambda op, x: op.Sqrt(op.Reduce(x, kind="sumsquare", capture="sums")))
def l2_norm(op: Builder, x: ir.Value, sums: ir.Value) -> Result:
    """sqrt(sum(x²)) => Reduce(x; l2)"""
    return _reduced(op, x, sums, "l2")


@rewrite(lambda op, x: op.Reduce(op.Abs(x), kind="sum", capture="sums"))
def l1_norm(op: Builder, x: ir.Value, sums: ir.Value) -> Result:
    """sum(|x|) => Reduce(x; l1)"""
    return _reduced(op, x, sums, "l1")


@rewrite(lambda op, x: op.Log(op.Reduce(op.Exp(x), kind="sum", capture="sums")))
def log_sum_exp(op: Builder, x: ir.Value, sums: ir.Value) -> Result:
    """log(sum(exp(x))) => Reduce(x; logsumexp)"""
    return _reduced(op, x, sums, "logsumexp")


@rewrite(lambda op, x: op.Add(
    op.Reduce(op.Sub(x, op.Reduce(x, kind="max", capture="peak")), kind="logsumexp", capture="sums"),
    op.Reduce(x, kind="max", capture="added")))  # fmt: skip
def stable_log_sum_exp(op: Builder, x: ir.Value, sums: ir.Value, peak: ir.Value, added: ir.Value) -> Result:
    """log(sum(exp(x - max(x)))) + max(x) => Reduce(x; logsumexp)"""
    nodes = [maker(value, "Reduce") for value in (sums, peak, added)]
    if len({attribute(node, "axes") for node in nodes if node is not None}) != 1:
        return reject("the maximum is over other axes than the sum", peak)
    return _reduced(op, x, sums, "logsumexp")


ACTIVATIONS = (gelu, gelu_tanh, sigmoid, silu, softplus, hard_swish, hard_swish_gated, hard_sigmoid)
REDUCTIONS = (
    softmax, log_softmax_of_sum, shifted_softmax, sum_of_squares, l2_norm, l1_norm, stable_log_sum_exp, log_sum_exp,
)  # fmt: skip
IDIOMS = Table("idioms", ACTIVATIONS + REDUCTIONS)

"""Attention from primitives: softmax(scale * q kᵀ + mask) v with one, several or shared key heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.ir.expression import Input, Literal, Operand, apply, format
from ingot.ir.graph import dtype_of, scalar_value
from ingot.ir.shapes import shape_of
from ingot.passes.causal import FORBIDDING, is_causal
from ingot.passes.facts import Shape, attribute, changed, exchanges_last, maker, operands_of, rank_of
from ingot.passes.pattern import Operators, Pattern, instruction_of
from ingot.passes.rewrite import Builder, Rejection, Result, Table, reject, rewrite


@dataclass(frozen=True)
class Parts:
    """What the pattern found: operands, and the values along the way that are there."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    product: ir.Value
    weights: ir.Value
    scaled: ir.Value | None = None
    tanh: ir.Value | None = None
    capped: ir.Value | None = None

    @property
    def scores(self) -> ir.Node:
        return _maker(self.product)

    @property
    def softmax(self) -> ir.Node:
        return _maker(self.weights)


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _times(op: Operators, x: Any, capture: str | None = None) -> Pattern:
    return op.either(op.Mul(x, op.number(), capture=capture), op.Div(x, op.number(), capture=capture))


def _scores(op: Operators, q: Any, k: Any) -> Pattern:
    """scale * q kᵀ, possibly capped: cap * tanh(scores / cap)"""
    product = op.MatMul(op.either(_times(op, q), q), op.either(_times(op, k), k), capture="product")
    scaled = op.either(_times(op, product, "scaled"), product)
    capped = op.either(op.Mul(op.Tanh(_times(op, scaled), capture="tanh"), op.number(), capture="capped"), scaled)
    return op.maybe("Cast", capped)


def _context(op: Operators, scores: Pattern, v: Any) -> Pattern:
    weights = op.Softmax(op.maybe("Cast", scores), capture="weights")
    guarded = op.either(op.Where(op.IsNaN(weights), 0, weights), weights)
    return op.MatMul(op.maybe("Cast", guarded), v)


@rewrite(lambda op, q, k, v: _context(op, _scores(op, q, k), v))
def attention(op: Builder, **found: Any) -> Result:
    """softmax(scale * q kᵀ) v => Attention(q, k, v)"""
    return _attention(op, Parts(**found), None)


@rewrite(lambda op, q, k, v, mask: _context(op, op.Add(_scores(op, q, k), mask), v))
def masked_attention(op: Builder, mask: ir.Value, **found: Any) -> Result:
    """softmax(scale * q kᵀ + mask) v => Attention(q, k, v, mask)"""
    return _attention(op, Parts(**found), _checked(Parts(**found), mask))


@rewrite(lambda op, q, k, v, bias, mask: _context(op, op.Add(op.Add(_scores(op, q, k), bias), mask), v))
def biased_attention(op: Builder, bias: ir.Value, mask: ir.Value, **found: Any) -> Result:
    """softmax(scale * q kᵀ + bias + mask) v => Attention(q, k, v, bias + mask)"""
    parts = Parts(**found)
    for added in (bias, mask):
        if isinstance(problem := _checked(parts, added), Rejection):
            return problem
    dtype = dtype_of(parts.product)
    sum_ = op.Pointwise(bias, mask, expression=format(apply("Add", Input(0), Input(1), dtype=dtype)))
    return _attention(op, parts, sum_)


@rewrite(lambda op, q, k, v, seen, fill: _context(op, op.Where(seen, _scores(op, q, k), op.number(fill)), v))
def allowed_attention(op: Builder, seen: ir.Value, fill: float, **found: Any) -> Result:
    """softmax(where(seen, scores, -inf)) v => Attention(q, k, v, seen)"""
    parts = Parts(**found)
    if fill > FORBIDDING:
        return _not_forbidding(fill, seen)
    plain = fill == -np.inf or is_causal(seen)
    return _attention(op, parts, seen if plain else _additive(op, parts, seen, 0.0, fill))


@rewrite(lambda op, q, k, v, hidden, fill: _context(op, op.Where(hidden, op.number(fill), _scores(op, q, k)), v))
def hidden_attention(op: Builder, hidden: ir.Value, fill: float, **found: Any) -> Result:
    """softmax(where(hidden, -inf, scores)) v => Attention(q, k, v, not hidden)"""
    parts = Parts(**found)
    if fill > FORBIDDING:
        return _not_forbidding(fill, hidden)
    if fill == -np.inf:
        return _attention(op, parts, op.Pointwise(hidden, expression=format(apply("Not", Input(0), dtype="bool"))))
    return _attention(op, parts, _additive(op, parts, hidden, fill, 0.0))


def _additive(op: Builder, parts: Parts, condition: ir.Value, yes: float, no: float) -> ir.Value:
    chosen = apply("Where", Input(0), yes, no, dtype=dtype_of(parts.product))
    mask: ir.Value = op.Pointwise(condition, expression=format(chosen))
    return mask


def _not_forbidding(fill: float, where: ir.Value) -> Rejection:
    return reject(f"the scores are replaced by {fill:g}, which does not forbid", where)


def _checked(parts: Parts, mask: ir.Value) -> ir.Value | Rejection:
    if dtype_of(mask) != dtype_of(parts.product):
        return reject("the mask has another type than the scores", mask)
    return mask


def _attention(op: Builder, parts: Parts, mask: ir.Value | Rejection | None) -> Result:
    problem = mask if isinstance(mask, Rejection) else _problem(op.root, parts)
    if problem is not None or isinstance(mask, Rejection):
        return problem
    scale, softcap = _scale(parts), 0.0
    if parts.capped is not None and parts.tanh is not None:
        softcap, inside = _factor(parts.capped), _factor(_operand(parts.tanh))
        if not np.isclose(softcap * inside, 1, rtol=1e-3):
            return reject("the scores are capped at another value than they are divided by", parts.tanh)
    rank = rank_of(parts.q) or 0
    key = parts.k if attribute(parts.scores, "transpose_b") else _transposed(op, parts.k, rank)
    operands = [_four_axes(op, value, rank) for value in (parts.q, key, parts.v)]
    causal = mask is not None and is_causal(mask)
    if mask is not None and not causal:
        operands.append(_four_axes(op, mask, rank))
    result = op.Attention(*operands, scale=scale, causal=int(causal), softcap=softcap)
    return result if rank == 4 else op.View(result, shape=_shape(op.root.outputs[0]))


def _problem(output: ir.Node, parts: Parts) -> Rejection | None:
    """What about the nodes is not attention over q[B,H,S,D] or q[B,S,D]."""
    shapes = [shape_of(value) for value in (parts.q, parts.k, parts.v)]
    ranks = {0 if shape is None else len(shape) for shape in shapes}
    if len(ranks) != 1 or not ranks <= {3, 4}:
        return reject("query, key and value have not all three or all four axes", parts.product)
    (rank,) = ranks
    if attribute(parts.softmax, "axis") != rank - 1 or attribute(parts.softmax, "log"):
        return reject("the softmax is not over the keys", parts.softmax)
    if attribute(parts.scores, "transpose_a") or attribute(output, "transpose_a") or attribute(output, "transpose_b"):
        return reject("query, weights or value are transposed", output)
    if attribute(parts.scores, "epilogue") or attribute(output, "epilogue"):
        return reject("the products have epilogues of their own", parts.scores)
    query, key, value = (shape[: rank - 2] for shape in shapes if shape is not None)
    if key != value or (key != query and (rank != 4 or key != (query[0], 1))):
        return reject("query, key and value have not the same batch and heads", parts.scores)
    return None


def _operand(value: ir.Value) -> ir.Value:
    """The operand of a unary step."""
    operand = _maker(value).inputs[0]
    assert operand is not None
    return operand


def _factor(value: ir.Value) -> float:
    """The number that `value`'s maker multiplies by."""
    node = _maker(value)
    instruction = instruction_of(node)
    assert instruction is not None
    numbers = [_number(node, operand) for operand in instruction.operands]
    factor = next(number for number in numbers if number is not None)
    return 1 / factor if instruction.op == "Div" else factor


def _number(node: ir.Node, operand: Operand) -> float | None:
    if isinstance(operand, Literal):
        return operand.value
    return scalar_value(node.inputs[operand.index])


def _scale(parts: Parts) -> float:
    pairs = zip(parts.scores.inputs, (parts.q, parts.k), strict=False)
    scale = 1.0 if parts.scaled is None else _factor(parts.scaled)
    for scaled, plain in pairs:
        scale *= 1.0 if scaled is plain or scaled is None else _factor(scaled)
    return scale


def _shape(value: ir.Value) -> Shape:
    shape = shape_of(value)
    assert shape is not None
    return shape


def _transposed(op: Builder, key: ir.Value, rank: int) -> ir.Value:
    """The key with its last two axes exchanged, or what was exchanged to make it."""
    source = maker(key, "Transpose")
    if source is not None and exchanges_last(attribute(source, "perm")):
        return operands_of(source)[0]
    exchanged: ir.Value = op.Transpose(key, perm=(*range(rank - 2), rank - 1, rank - 2))
    return exchanged


def _four_axes(op: Builder, value: ir.Value, rank: int) -> ir.Value:
    """[B,S,D] as [B,1,S,D]; a mask without batch needs nothing."""
    shape = _shape(value)
    if rank == 4 or len(shape) < 3:
        return value
    wide: ir.Value = op.View(value, shape=(shape[0], 1, *shape[1:]))
    return wide


# shared key heads


def _repeated(op: Operators, x: Any, suffix: str) -> Pattern:
    spreads = [spread(op.View(x), capture=f"spread_{suffix}") for spread in (op.Expand, op.Tile)]
    return op.View(op.either(*spreads), capture=f"repeated_{suffix}")


@dataclass(frozen=True)
class Repeated:
    """Key or value heads repeated one by one: [B,G,T,D] -> [B,G,R,T,D] -> [B,G*R,T,D]"""

    x: ir.Value
    spread: ir.Value
    repeated: ir.Value

    def by_heads(self) -> bool:
        source, spread, repeated = shape_of(self.x), shape_of(self.spread), shape_of(self.repeated)
        if source is None or spread is None or len(source) != 4 or len(spread) != 5:
            return False
        groups, times = spread[1:3]
        count = groups * times if isinstance(groups, int) and isinstance(times, int) else None
        return (*spread[:2], *spread[3:]) == source and repeated == (source[0], count, *source[2:])


@rewrite(
    lambda op, q, k, v, mask: op.Attention(
        q, _repeated(op, k, "k"), _repeated(op, v, "v"), op.optional(mask), capture="whole"
    )
)
def shared_heads(
    op: Builder, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, **found: ir.Value
) -> Result:
    """Attention(q, repeat(k), repeat(v)) => Attention(q, k, v) with fewer key heads"""
    keys = Repeated(k, found["spread_k"], found["repeated_k"])
    values = Repeated(v, found["spread_v"], found["repeated_v"])
    for part in (keys, values):
        if not part.by_heads():
            return reject("the heads are not repeated one by one", part.spread)
    if _shape(k)[:3] != _shape(v)[:3]:
        return reject("key and value have not the same heads", k)
    return op.Attention(q, k, v, *([] if mask is None else [mask]), **changed(_maker(found["whole"])))


ATTENTION = Table(
    "attention",
    (attention, masked_attention, biased_attention, allowed_attention, hidden_attention, shared_heads),
)

"""Products of matrices become Linear (constant weight) or MatMul; Einsum becomes Transpose, View, MatMul and Reduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ingot.ir.elementwise import FLOATS, Array
from ingot.ir.graph import constant_of, dtype_of, shape
from ingot.ir.ops import broadcast
from ingot.passes.canonical_table import MICROSOFT, Builder, Result, canonical, reject
from ingot.plan.extent import Extent, product


def multiplied(op: Builder, a: ir.Value, b: ir.Value) -> ir.Value:
    """numpy's matmul of two values, vectors included"""
    left, right = shape(a), shape(b)
    if len(right) == 1 and len(left) == 1:
        return op.view(matrix_product(op, op.view(a, [1, *left]), op.view(b, [*right, 1])), [])
    if len(left) == 1:
        result = matrix_product(op, op.view(a, [1, *left]), b)
        return op.view(result, [*shape(result)[:-2], shape(result)[-1]])
    if len(right) == 1:
        result = matrix_product(op, a, op.view(b, [*right, 1]))
        return op.view(result, shape(result)[:-1])
    return matrix_product(op, a, b)


def matrix_product(op: Builder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Linear where b is a constant matrix, else MatMul"""
    weight = constant_of(b)
    result: ir.Value
    if weight is not None and weight.ndim == 2 and constant_of(a) is None:
        result = op.Linear(a, stored(op, b))
    else:
        result = op.MatMul(a, b)
    return result


def stored(op: Builder, value: ir.Value, array: Array | None = None) -> ir.Value:
    """A constant as an initializer: the value itself if it is one, else a new one."""
    if array is None and value.is_initializer():
        return value
    known = constant_of(value) if array is None else array
    assert known is not None, value.name
    return op.constant(known, value)


@canonical("MatMul")
def matmul(op: Builder) -> Result:
    """MatMul(x, weight) => Linear(x, weight)"""
    return multiplied(op, op.x(0), op.x(1))


@canonical("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(op: Builder) -> Result:
    """alpha * MatMul with transposed operands"""
    if op.attribute("transBatchA", 0) or op.attribute("transBatchB", 0):
        return reject("it transposes batch axes", "use Transpose and MatMul")
    a, b, alpha = op.x(0), op.x(1), op.attribute("alpha", 1.0)
    ranks = len(shape(a)), len(shape(b))
    flip_a, flip_b = (int(bool(op.attribute(name, 0)) and rank > 1) for name, rank in zip(("transA", "transB"), ranks,
                                                                                       strict=True))  # fmt: skip
    weight = constant_of(b)
    if min(ranks) < 2 or (weight is not None and weight.ndim == 2 and not flip_a):
        result = multiplied(op, _swapped(op, a, flip_a), _swapped(op, b, flip_b))
    else:
        result = op.MatMul(a, b, transpose_a=flip_a, transpose_b=flip_b)
    return result if alpha == 1 else op.pointwise(f"Mul %0 {alpha} -> {op.dtype}", result)


def _swapped(op: Builder, x: ir.Value, flip: int) -> ir.Value:
    """x with its last two axes exchanged; a constant is exchanged now."""
    if not flip:
        return x
    array = constant_of(x)
    if array is not None:
        return op.constant(np.ascontiguousarray(np.swapaxes(array, -1, -2)), x)
    rank = len(shape(x))
    return op.transpose(x, [*range(rank - 2), rank - 1, rank - 2])


@canonical("Gemm")
def gemm(op: Builder) -> Result:
    """alpha * a @ b + beta * c => Linear(a, b) and a Pointwise"""
    a, b = op.x(0), op.x(1)
    flip_a, flip_b = op.attribute("transA", 0), op.attribute("transB", 0)
    alpha, beta, t = op.attribute("alpha", 1.0), op.attribute("beta", 1.0), op.dtype
    if constant_of(b) is not None:
        result = matrix_product(op, _swapped(op, a, flip_a), _swapped(op, b, flip_b))
    else:
        result = op.MatMul(a, b, transpose_a=flip_a, transpose_b=flip_b)
    if t not in FLOATS and not (float(alpha).is_integer() and float(beta).is_integer()):
        return reject("its alpha or beta is a fraction while its operands are integers", "cast them to float")
    alpha, beta = (alpha, beta) if t in FLOATS else (int(alpha), int(beta))
    result = result if alpha == 1 else op.pointwise(f"Mul %0 {alpha} -> {t}", result)
    if not op.given(2) or beta == 0:
        return result
    bias = op.x(2)
    if beta == 1:
        return op.pointwise(f"Add %0 %1 -> {t}", result, bias)
    array = constant_of(bias)
    if array is not None:
        return op.pointwise(f"Add %0 %1 -> {t}", result, op.constant((array * beta).astype(array.dtype), bias))
    return op.pointwise(f"Mul %1 {beta} -> {t}; Add %0 $0 -> {t}", result, bias)


# Einsum


@dataclass(frozen=True)
class Term:
    """An operand and the letters of its axes."""

    value: ir.Value
    letters: tuple[str, ...]

    def sizes(self) -> dict[str, Extent]:
        """The extent of every letter."""
        return dict(zip(self.letters, shape(self.value), strict=True))


@canonical("Einsum")
def einsum(op: Builder) -> Result:
    """Pairwise products over shared letters, then a transposition"""
    parsed = _parsed(op.attribute("equation"), [len(shape(value)) for value in op.inputs])
    if isinstance(parsed, str):
        return reject(parsed, "write it with MatMul and Transpose")
    inputs, output = parsed
    terms = [Term(value, letters) for value, letters in zip(op.inputs, inputs, strict=True)]
    while len(terms) > 1:
        kept = {letter for term in terms[2:] for letter in term.letters} | set(output)
        terms = [_contracted(op, _summed(op, terms[0], kept | set(terms[1].letters)),
                             _summed(op, terms[1], kept | set(terms[0].letters)), kept), *terms[2:]]  # fmt: skip
    last = _summed(op, terms[0], set(output))
    return op.transpose(last.value, [last.letters.index(letter) for letter in output])


def _parsed(equation: str, ranks: Sequence[int]) -> tuple[list[tuple[str, ...]], tuple[str, ...]] | str:
    """(letters of every operand, letters of the result), the ellipsis as numbers; or what is in the way."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    parts = left.split(",")
    if len(parts) != len(ranks):
        return f"its equation {equation!r} has {len(parts)} operands"
    widest = max((rank - len(part) + 3 for part, rank in zip(parts, ranks, strict=True) if "..." in part), default=0)
    inputs = [_letters(part, rank - len(part) + 3, widest) for part, rank in zip(parts, ranks, strict=True)]
    if any(len(set(letters)) != len(letters) for letters in inputs):
        return f"its equation {equation!r} takes a diagonal"
    if arrow:
        return inputs, _letters(right, widest, widest)
    flat = [letter for letters in inputs for letter in letters]
    dots = [letter for letter in dict.fromkeys(flat) if letter.isdecimal()]
    single = [letter for letter in set(flat) if letter.isalpha() and flat.count(letter) == 1]
    return inputs, (*sorted(dots), *sorted(single))


def _letters(part: str, count: int, widest: int) -> tuple[str, ...]:
    before, dots, after = part.partition("...")
    middle = [f"{number:03}" for number in range(widest - count, widest)] if dots else []
    return (*before, *middle, *after)


def _summed(op: Builder, term: Term, kept: set[str]) -> Term:
    """Letters that nothing else needs, summed away."""
    gone = [axis for axis, letter in enumerate(term.letters) if letter not in kept]
    if not gone:
        return term
    value = op.Reduce(term.value, kind="sum", axes=gone, keepdims=0)
    return Term(value, tuple(letter for letter in term.letters if letter in kept))


def _contracted(op: Builder, a: Term, b: Term, kept: set[str]) -> Term:
    """One product over the letters of both that are not kept."""
    batch = [letter for letter in a.letters if letter in b.letters and letter in kept]
    inner = [letter for letter in a.letters if letter in b.letters and letter not in kept]
    rows = [letter for letter in a.letters if letter not in b.letters]
    columns = [letter for letter in b.letters if letter not in a.letters]
    sizes_a, sizes_b = a.sizes(), b.sizes()
    sizes = {**sizes_a, **sizes_b, **{letter: broadcast((sizes_a[letter],), (sizes_b[letter],))[0] for letter in batch}}
    letters = (*batch, *rows, *columns)
    if not inner:
        left, right = _aligned(op, a, letters), _aligned(op, b, letters)
        return Term(op.pointwise(f"Mul %0 %1 -> {dtype_of(left)}", left, right), letters)
    left = _matrix(op, a, batch, rows, inner)
    right = _matrix(op, b, batch, inner, columns)
    result = op.MatMul(left, right)
    return Term(op.view(result, [sizes[letter] for letter in letters]), letters)


def _aligned(op: Builder, term: Term, letters: Sequence[str]) -> ir.Value:
    """The operand with an axis for every letter, in that order."""
    own = [letter for letter in letters if letter in term.letters]
    moved = op.transpose(term.value, [term.letters.index(letter) for letter in own])
    sizes = term.sizes()
    return op.view(moved, [sizes.get(letter, 1) for letter in letters])


def _matrix(op: Builder, term: Term, batch: Sequence[str], rows: Sequence[str], columns: Sequence[str]) -> ir.Value:
    """The operand as [*batch, rows, columns]."""
    moved = op.transpose(term.value, [term.letters.index(letter) for letter in (*batch, *rows, *columns)])
    sizes = term.sizes()
    groups = [product(sizes[letter] for letter in group) for group in (rows, columns)]
    return op.view(moved, [*(sizes[letter] for letter in batch), *groups])

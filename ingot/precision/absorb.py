"""Factors of single channels, into the constants that make a tensor: what smooths it costs no operator then.

Behind a norm these are its scale and bias; the values of an attention bring theirs from the columns of their weights,
since weighted sums of rows keep channels apart. Others that read the tensor multiply again, in their own epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.ir.graph import add_constant, constant_of, make_node, onnx_attribute
from ingot.ir.shapes import shape_of

Array = np.ndarray[Any, Any]
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul"})  # readers whose operand can be multiplied on the way
_SUFFIX = "smooth"


@dataclass(frozen=True, eq=False)
class _Edit:
    """An operand of a node that becomes another constant."""

    node: ir.Node
    index: int
    array: Array


@dataclass(frozen=True, eq=False)
class _Changes:
    """What makes a tensor smaller by its factors: edits of constants, and the tensors in between, which change too."""

    edits: tuple[_Edit, ...]
    values: tuple[ir.Value, ...] = ()


def absorb(x: ir.Value, readers: Sequence[ir.Node], factors: Array) -> ir.Value | None:
    """x / factors along its last axis, in place of x for everybody; who is no reader multiplies again. None, and
    nothing is changed, where constants cannot make it."""
    others, shape = [(node, index) for node, index in x.uses() if node not in readers], shape_of(x)
    if any(node.op_type not in _ELEMENTWISE for node, _ in others) or shape is None:
        return None
    changes = _behind(x, factors.reshape([1] * (len(shape) - 1) + [-1]))
    if changes is None:
        return None
    for edit in changes.edits:
        _replace(edit)
    for value in changes.values:
        value.name = f"{value.name}.{_SUFFIX}"
    _rename(x, others, factors)
    return x


def _replace(edit: _Edit) -> None:
    graph, old = edit.node.graph, edit.node.inputs[edit.index]
    assert isinstance(graph, ir.Graph) and old is not None
    constant = add_constant(graph, edit.array.astype(np.float32), f"{old.name}.{_SUFFIX}")
    edit.node.replace_input_with(edit.index, constant)


def _rename(x: ir.Value, others: Sequence[tuple[ir.Node, int]], factors: Array) -> None:
    """The user's name goes to what has the user's numbers."""
    name, maker = x.name, x.producer()
    x.name = f"{name}.{_SUFFIX}"
    if not others or maker is None or not isinstance(maker.graph, ir.Graph):
        return
    node = make_node("Mul", [x, add_constant(maker.graph, factors, f"{name}.factors")], domain="", name=str(name))
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, x.type, x.shape
    maker.graph.insert_after(maker, [node])
    for reader, index in others:
        reader.replace_input_with(index, node.outputs[0])


def _behind(value: ir.Value, factors: Array) -> _Changes | None:
    """What makes `value / factors`; factors have its rank."""
    node = value.producer()
    rule = None if node is None or node.domain not in ("", "ai.onnx") else _RULES.get(node.op_type)
    return None if rule is None or node is None or value.is_graph_output() else rule(node, factors)


def _through(value: ir.Value | None, factors: Array) -> _Changes | None:
    """The same for a tensor that nobody else reads."""
    if value is None or len(value.uses()) != 1 or not _matches(value, factors):
        return None
    found = _behind(value, factors)
    return None if found is None else _Changes(found.edits, (*found.values, value))


def _matches(value: ir.Value, factors: Array) -> bool:
    """Whether each axis of the factors is 1 or the tensor's."""
    shape = shape_of(value)
    return shape is not None and len(shape) == factors.ndim and all(
        n in (1, size) for n, size in zip(factors.shape, shape, strict=True)
    )  # fmt: skip


def _constant_operand(node: ir.Node, size: int) -> tuple[int, Array] | None:
    """(place, array) of the operand that is a constant vector of `size` numbers."""
    for index, value in enumerate(node.inputs):
        array = constant_of(value) if value is not None else None
        if array is not None and array.size == size == array.shape[-1]:
            return index, array
    return None


def _flat(factors: Array) -> Array:
    """Without leading axes of size 1."""
    return factors.reshape(factors.shape[next((i for i, n in enumerate(factors.shape) if n != 1), -1) :])


def _of_add(node: ir.Node, factors: Array) -> _Changes | None:
    """y + c => y / s + c / s"""
    found = _constant_operand(node, factors.shape[-1])
    inner = None if found is None else _through(node.inputs[1 - found[0]], factors)
    if found is None or inner is None or factors.size != factors.shape[-1]:
        return None
    return _Changes((*inner.edits, _Edit(node, found[0], found[1] / _flat(factors))), inner.values)


def _of_mul(node: ir.Node, factors: Array) -> _Changes | None:
    """y * c => y * (c / s)"""
    found = _constant_operand(node, factors.shape[-1])
    if found is None or factors.size != factors.shape[-1]:
        return None
    return _Changes((_Edit(node, found[0], found[1] / _flat(factors)),))


def _of_norm(node: ir.Node, factors: Array) -> _Changes | None:
    """LayerNormalization(x, g, b) => LayerNormalization(x, g / s, b / s)"""
    arrays = [None if value is None else constant_of(value) for value in node.inputs[1:]]
    last = onnx_attribute(node, "axis", -1) in (-1, factors.ndim - 1)
    if not last or factors.size != factors.shape[-1] or not arrays or any(a is None or a.ndim != 1 for a in arrays):
        return None
    return _Changes(tuple(_Edit(node, i + 1, a / _flat(factors)) for i, a in enumerate(arrays) if a is not None))


def _of_matmul(node: ir.Node, factors: Array) -> _Changes | None:
    """x @ W => x @ (W / s); p @ v => p @ (v / s)"""
    right = node.inputs[1]
    weight = None if right is None else constant_of(right)
    if weight is not None and weight.ndim == 2:
        return _Changes((_Edit(node, 1, weight / _flat(factors)),)) if factors.size == factors.shape[-1] else None
    same_rank = right is not None and len(shape_of(right) or ()) == factors.ndim > 1
    return _through(right, factors) if same_rank and factors.shape[-2] == 1 else None


def _of_transpose(node: ir.Node, factors: Array) -> _Changes | None:
    order = onnx_attribute(node, "perm", tuple(reversed(range(factors.ndim))))
    return _through(node.inputs[0], np.transpose(factors, np.argsort(order)))


def _of_reshape(node: ir.Node, factors: Array) -> _Changes | None:
    """Where the last axes of the one are the last axis of the other."""
    inner = () if node.inputs[0] is None else shape_of(node.inputs[0]) or ()
    trailing = _flat(factors).shape
    if (shape_of(node.outputs[0]) or ())[-len(trailing) :] != trailing:
        return None
    for count in range(1, len(inner)):
        sizes = [size for size in inner[-count:] if isinstance(size, int)]
        if len(sizes) == count and np.prod(sizes) == factors.size:
            return _through(node.inputs[0], factors.reshape([1] * (len(inner) - count) + sizes))
    return None


_RULES: dict[str, Callable[[ir.Node, Array], _Changes | None]] = {
    "Add": _of_add, "Mul": _of_mul, "LayerNormalization": _of_norm, "MatMul": _of_matmul, "Transpose": _of_transpose,
    "Reshape": _of_reshape,
}  # fmt: skip

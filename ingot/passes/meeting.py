"""Transpositions, slices and views go across what does not mind them, to where others wait for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ingot.ir.shapes import shape_of
from ingot.passes.facts import (
    Shape,
    are_ones,
    attribute,
    changed,
    exchanges_last,
    extras_of,
    is_op,
    maker,
    only_reader,
    operand_kind,
    operands_of,
)
from ingot.passes.rewrite import Builder, Result, reject, rewrite_node
from ingot.passes.shuffles import axes_of, viewed


def _is_transposed_below(value: ir.Value) -> bool:
    """Whether what reads the value transposes it, perhaps after views and slices."""
    readers = [use.node for use in value.uses()]
    if value.is_graph_output() or not readers:
        return False
    return all(
        (is_op(node, "Transpose") and not _is_free(node))
        or (is_op(node, "View", "Slice") and _is_transposed_below(node.outputs[0]))
        for node in readers
    )


def _is_free(transpose: ir.Node) -> bool:
    """Whether products read the transposed operand as it lies."""
    readers = [use.node for use in transpose.outputs[0].uses()]
    return exchanges_last(attribute(transpose, "perm")) and all(is_op(node, "MatMul") for node in readers)


def _is_transposed_above(value: ir.Value) -> bool:
    """Whether the value, and nothing else, is seen of something transposed."""
    source = maker(value, "View", "Transpose")
    if source is None or only_reader(value) is None:
        return False
    return source.op_type == "Transpose" or _is_transposed_above(operands_of(source)[0])


def _moves_rows(perm: tuple[int, ...]) -> bool:
    return perm[-1] == len(perm) - 1


def _has_residual(linear: ir.Node) -> bool:
    shape = shape_of(linear.outputs[0]) or ()
    return any(operand_kind(shape_of(extra), shape, len(shape) - 1) == "full" for extra in extras_of(linear))


@rewrite_node("Linear")
def transpose_below_linear(op: Builder, node: ir.Node) -> Result:
    """Linear(Transpose(x), w) => Transpose(Linear(x, w)) where rows move and meet another Transpose"""
    x, weight = operands_of(node)[:2]
    source = maker(x, "Transpose")
    if source is None or not _moves_rows(attribute(source, "perm")) or not _is_transposed_below(node.outputs[0]):
        return None
    if only_reader(x) is not node:
        return reject("the transposed input is used elsewhere too", source)
    if _has_residual(node):
        return reject("a residual has the other order", node)
    product_ = op.Linear(operands_of(source)[0], weight, *extras_of(node), **changed(node))
    return op.Transpose(product_, perm=attribute(source, "perm"))


@rewrite_node("Transpose")
def transpose_above_linear(op: Builder, node: ir.Node) -> Result:
    """Transpose(Linear(x, w)) => Linear(Transpose(x), w) where rows move and meet another Transpose"""
    source, perm = maker(operands_of(node)[0], "Linear"), attribute(node, "perm")
    if source is None or not _moves_rows(perm) or not _is_transposed_above(operands_of(source)[0]):
        return None
    if only_reader(source.outputs[0]) is not node:
        return reject("the result is used elsewhere too", source)
    if _has_residual(source):
        return reject("a residual has the other order", source)
    x, weight = operands_of(source)[:2]
    return op.Linear(op.Transpose(x, perm=perm), weight, *extras_of(source), **changed(source))


@rewrite_node("Slice")
def slice_of_transposed(op: Builder, node: ir.Node) -> Result:
    """Slice(Transpose(x)) => Transpose(Slice(x)) where it meets another Transpose"""
    source = maker(operands_of(node)[0], "Transpose")
    if source is None or not _is_transposed_below(source.outputs[0]):
        return None
    perm = attribute(source, "perm")
    back = [perm.index(axis) for axis in range(len(perm))]
    parts = {name: [attribute(node, name)[axis] for axis in back] for name in ("starts", "steps", "sizes")}
    return op.Transpose(op.Slice(operands_of(source)[0], **parts), perm=perm)


@rewrite_node("Slice")
def slice_of_view(op: Builder, node: ir.Node) -> Result:
    """Slice(View(Transpose(x))) => View(Slice(Transpose(x))) where it takes whole pieces of one axis of Transpose(x)"""
    source = maker(operands_of(node)[0], "View")
    if source is None or maker(source.inputs[0], "Transpose") is None or not _is_transposed_below(node.outputs[0]):
        return None
    x = operands_of(source)[0]
    place, sizes = _sliced_axis(node, source), list(shape_of(x) or ())
    if place is None:
        return reject("it does not take whole pieces of one axis", source)
    starts = [0] * len(sizes)
    starts[place.axis], sizes[place.axis] = place.start, place.size
    return op.View(op.Slice(x, starts=starts, steps=[1] * len(sizes), sizes=sizes), shape=shape_of(node.outputs[0]))


@dataclass(frozen=True)
class Piece:
    """Part of one axis."""

    axis: int
    start: int
    size: int


def _sliced_axis(node: ir.Node, view: ir.Node) -> Piece | None:
    """What a Slice of a View takes of the view's input, when it is one piece of one axis."""
    inner, outer = shape_of(operands_of(view)[0]), shape_of(view.outputs[0])
    axes = None if inner is None or outer is None or 0 in outer else viewed(axes_of(inner), outer)
    if axes is None or inner is None or outer is None or any(step != 1 for step in attribute(node, "steps")):
        return None
    sizes = attribute(node, "sizes")
    cut = [axis for axis, size in enumerate(outer) if str(sizes[axis]) != str(size)]
    if len(cut) != 1 or len(axes[cut[0]]) != 1:
        return None
    (factor,), start, size = axes[cut[0]], str(attribute(node, "starts")[cut[0]]), str(sizes[cut[0]])
    axis, whole = factor.place[0], inner[factor.place[0]]
    if any(factor.place[1:]) or not (start.isdecimal() and size.isdecimal() and isinstance(whole, int)):
        return None
    assert isinstance(factor.size, int)
    return Piece(axis, int(start) * (whole // factor.size), int(size) * (whole // factor.size))


# views that meet across products over a joined batch


def _is_viewed_above(value: ir.Value) -> bool:
    """Whether the value is a View, or made of views by products, softmax and elementwise work read once."""
    source = maker(value, "View", "Softmax", "Pointwise", "MatMul")
    if source is None or source.op_type == "View":
        return source is not None
    large = [operand for operand in operands_of(source) if not are_ones(shape_of(operand) or ("",))]
    return only_reader(value) is not None and bool(large) and all(map(_is_viewed_above, large))


def _in_batch(op: Builder, value: ir.Value, old: Shape, shape: Shape) -> ir.Value:
    """An operand over the batch axes `old` seen over those of `shape`; what has one element stays."""
    sizes = shape_of(value) or ()
    if are_ones(sizes):
        return value
    viewed: ir.Value = op.View(value, shape=(*shape[:-2], *sizes[-2:]))
    return viewed


def _only_batches_differ(shape: Shape, old: Shape | None) -> bool:
    return old is not None and min(len(shape), len(old)) > 2 and shape[-2:] == old[-2:]


def _are_viewed(values: Sequence[ir.Value], old: Shape) -> bool:
    """Whether all but single numbers are views, and have the batch axes."""
    return all((shape_of(v) or ("",))[:-2] == old[:-2] and _is_viewed_above(v) for v in values)


@rewrite_node("View")
def view_above_product(op: Builder, node: ir.Node) -> Result:
    """View(MatMul(View(a), View(b))) => MatMul(a, b) where only batch axes are viewed; elementwise work alike"""
    source, shape = maker(operands_of(node)[0], "MatMul", "Pointwise"), shape_of(node.outputs[0]) or ()
    old = None if source is None else shape_of(source.outputs[0])
    if source is None or old is None or not _only_batches_differ(shape, old):
        return None
    large = [value for value in operands_of(source) if not are_ones(shape_of(value) or ("",))]
    if not large or not _are_viewed(large, old):
        return None
    if only_reader(source.outputs[0]) is not node:
        return reject("the result is used elsewhere too", source)
    return op.make(source.op_type, *(_in_batch(op, v, old, shape) for v in operands_of(source)), **changed(source))


@rewrite_node("View")
def view_above_softmax(op: Builder, node: ir.Node) -> Result:
    """View(Softmax(View(x))) => Softmax(x) where the last axis, along which it is, stays"""
    source = maker(operands_of(node)[0], "Softmax")
    shape, old = shape_of(node.outputs[0]) or (), None if source is None else shape_of(source.outputs[0])
    if source is None or not old or not shape or shape[-1] != old[-1] or attribute(source, "axis") != len(old) - 1:
        return None
    if not _is_viewed_above(operands_of(source)[0]):
        return None
    if only_reader(source.outputs[0]) is not node:
        return reject("the probabilities are used elsewhere too", source)
    return op.Softmax(op.View(operands_of(source)[0], shape=shape), **changed(source, axis=len(shape) - 1))


MEETINGS = (
    transpose_below_linear, transpose_above_linear, slice_of_transposed, slice_of_view, view_above_product,
    view_above_softmax,
)  # fmt: skip

"""Reductions, arg-reductions and softmaxes of every opset."""

from __future__ import annotations

from itertools import combinations

from ingot.ir.graph import shape
from ingot.ir.ops_table import Shape
from ingot.passes.canonical_table import (
    Builder,
    Reject,
    Result,
    attribute_or_input,
    axis_of,
    canonical,
    normal_axes,
    reject,
    undetermined,
)
from ingot.plan.extent import product

_KINDS = {
    "ReduceSum": "sum", "ReduceMean": "mean", "ReduceMax": "max", "ReduceMin": "min", "ReduceProd": "prod",
    "ReduceL1": "l1", "ReduceL2": "l2", "ReduceLogSum": "logsum", "ReduceLogSumExp": "logsumexp",
    "ReduceSumSquare": "sumsquare",
}  # fmt: skip
_OVER_NOTHING = {
    "ReduceL1": "Abs %0 -> {t}", "ReduceL2": "Abs %0 -> {t}", "ReduceLogSum": "Log %0 -> {t}",
    "ReduceSumSquare": "Mul %0 %0 -> {t}",
}  # fmt: skip


@canonical(*_KINDS)
def reduce(op: Builder) -> Result:
    """Reduce over the axes; without any over all of them, or none if the node says so"""
    kind, rank = op.node.op_type, len(shape(op.x()))
    axes = attribute_or_input(op, "axes", 1, since=13 if kind == "ReduceSum" else 18)
    if isinstance(axes, Reject):
        found = axes_between(shape(op.x()), shape(op.y), op.attribute("keepdims", 1))
        if not found:
            return axes
        axes = found
    if not axes and op.attribute("noop_with_empty_axes", 0):
        text = _OVER_NOTHING.get(kind)
        return op.pointwise(text.format(t=op.dtype), op.x()) if text else op.x()
    chosen = normal_axes(axes or range(rank), rank)
    if not rank:
        return _of_scalar(op)
    return op.view(op.Reduce(op.x(), kind=_KINDS[kind], axes=chosen, keepdims=op.attribute("keepdims", 1)), shape(op.y))


def axes_between(source: Shape, target: Shape, keepdims: int) -> list[int] | None:
    """The axes that lead from one shape to the other; None where several sets would (axes of size 1 do not matter)."""
    if undetermined(target):
        return None
    if keepdims:
        return [axis for axis, (before, after) in enumerate(zip(source, target, strict=True)) if before != after == 1]
    real = [axis for axis, size in enumerate(source) if size != 1]
    kept = [size for size in target if size != 1]
    ways = [chosen for chosen in combinations(real, len(kept)) if [source[axis] for axis in chosen] == kept]
    if len(ways) != 1 or len(target) - len(kept) > len(source) - len(real):
        return None
    return [axis for axis in range(len(source)) if axis in real and axis not in ways[0]]


def _of_scalar(op: Builder) -> Result:
    text = _OVER_NOTHING.get(op.node.op_type)
    return op.pointwise(text.format(t=op.dtype), op.x()) if text else op.x()


@canonical("ArgMax", "ArgMin")
def arg_reduce(op: Builder) -> Result:
    """Reduce of kind argmax or argmin"""
    rank = len(shape(op.x()))
    if not rank:
        return reject("it has no axis to look along", "give it a tensor of rank 1 at least")
    settings = {"keepdims": op.attribute("keepdims", 1), "select_last_index": op.attribute("select_last_index", 0)}
    return op.Reduce(op.x(), kind=op.node.op_type.lower(), axes=[axis_of(op, 0, rank)], **settings)


@canonical("Softmax", "LogSoftmax")
def softmax(op: Builder) -> Result:
    """Along one axis; before opset 13 along all axes from it on"""
    sizes = shape(op.x())
    rank, log = len(sizes), int(op.node.op_type == "LogSoftmax")
    if not rank:
        return reject("it has no axis to sum along", "give it a tensor of rank 1 at least")
    if op.version >= 13:
        return op.Softmax(op.x(), axis=axis_of(op, -1, rank), log=log)
    axis = axis_of(op, 1, rank)
    if all(size == 1 for size in sizes[axis + 1 :]):
        return op.Softmax(op.x(), axis=axis, log=log)
    flat = op.view(op.x(), [*sizes[:axis], product(sizes[axis:])])
    return op.view(op.Softmax(flat, axis=axis, log=log), sizes)


@canonical("Hardmax")
def hardmax(op: Builder) -> Result:
    """1 at the first largest element, else 0"""
    sizes = shape(op.x())
    axis = axis_of(op, -1 if op.version >= 13 else 1, len(sizes))
    last = axis if op.version >= 13 else len(sizes) - 1
    flat = op.view(op.x(), [*sizes[:axis], product(sizes[axis : last + 1]), *sizes[last + 1 :]])
    best = op.Reduce(flat, kind="argmax", axes=[axis], keepdims=1)
    steps = op.steps(shape(flat)[axis], axis, len(shape(flat)))
    return op.view(op.pointwise(f"Equal %0 %1 -> bool; Cast $0 -> {op.dtype}", best, steps), sizes)

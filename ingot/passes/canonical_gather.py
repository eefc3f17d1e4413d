"""Lookups, scatters, searches and running sums."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ingot.dtypes import numpy_dtype
from ingot.ir.graph import constant_of, dtype_of, scalar_value, shape
from ingot.passes.canonical_table import Builder, Result, axis_of, canonical, reject
from ingot.plan.extent import Extent


@canonical("Gather")
def gather(op: Builder) -> Result:
    """Gather; one constant index is a Slice"""
    sizes = shape(op.x())
    axis = axis_of(op, 0, len(sizes))
    index, size = scalar_value(op.x(1)), sizes[axis]
    if index is None or constant_of(op.x()) is not None or (index < 0 and not isinstance(size, int)):
        return op.Gather(op.x(), _counted(op, sizes[axis]), axis=axis)
    start = int(index) + (size if index < 0 and isinstance(size, int) else 0)
    if isinstance(size, int) and not 0 <= start < size:
        return reject(f"its index {index} lies outside of {size} elements", "correct the index")
    taken = [1 if place == axis else extent for place, extent in enumerate(sizes)]
    starts = [start if place == axis else 0 for place in range(len(sizes))]
    one = op.x() if tuple(taken) == sizes else op.Slice(op.x(), starts=starts, steps=[1] * len(sizes), sizes=taken)
    return op.view(one, shape(op.y))


def _counted(op: Builder, size: Extent) -> ir.Value:
    """The indices; constant ones counted from the start."""
    array = op.constant_input(1)
    if array is None or not isinstance(size, int) or not (array < 0).any():
        return op.x(1)
    return op.constant(np.where(array < 0, array + size, array).astype(array.dtype), op.x(1))


@canonical("GatherElements")
def gather_elements(op: Builder) -> Result:
    """GatherElements"""
    return op.GatherElements(op.x(), op.x(1), axis=axis_of(op, 0, len(shape(op.x()))))


@canonical("GatherND")
def gather_nd(op: Builder) -> Result:
    """GatherND"""
    if not isinstance(shape(op.x(1))[-1], int):
        return reject("the last extent of its indices is symbolic", "give the indices a static last axis")
    return op.GatherND(op.x(), op.x(1), batch_dims=op.attribute("batch_dims", 0))


@canonical("ScatterElements", "Scatter")
def scatter_elements(op: Builder) -> Result:
    """ScatterElements"""
    return op.ScatterElements(op.x(), op.x(1), op.x(2), axis=axis_of(op, 0, len(shape(op.x()))),
                              reduction=op.attribute("reduction", "none"))  # fmt: skip


@canonical("ScatterND")
def scatter_nd(op: Builder) -> Result:
    """ScatterND"""
    if not isinstance(shape(op.x(1))[-1], int):
        return reject("the last extent of its indices is symbolic", "give the indices a static last axis")
    return op.ScatterND(op.x(), op.x(1), op.x(2), reduction=op.attribute("reduction", "none"))


@canonical("TensorScatter")
def tensor_scatter(op: Builder) -> Result:
    """Updates written into a cache from a position on: ScatterElements at write position + step"""
    cache, update, t = op.x(0), op.x(1), "int64"
    rank = len(shape(cache))
    axis, length = axis_of(op, -2, rank), shape(update)[axis_of(op, -2, rank)]
    steps = op.steps(length, axis, rank)
    if op.given(2):
        start = op.view(op.x(2), [shape(op.x(2))[0], *([1] * (rank - 1))])
        circular = op.attribute("mode", "linear") == "circular"
        wrapped = f"; Mod $0 {shape(cache)[axis]} -> {t}" if circular else ""
        if circular and not isinstance(shape(cache)[axis], int):
            return reject("the length of its cache is symbolic", "build for static shapes")
        steps = op.pointwise(f"Add %0 %1 -> {t}{wrapped}", steps, start)
    return op.ScatterElements(cache, op.expand(steps, shape(update)), update, axis=axis)


@canonical("TopK")
def topk(op: Builder) -> Result:
    """TopK with the k that the output's shape tells"""
    axis = axis_of(op, -1, len(shape(op.x())))
    count = shape(op.y)[axis]
    if not isinstance(count, int):
        return reject("its k varies at run time", "make the input 'K' a constant")
    settings = {"largest": op.attribute("largest", 1), "sorted": op.attribute("sorted", 1)}
    values, places = op.make("TopK", op.x(), k=int(count), axis=axis, **settings, _outputs=2)
    return values, places


@canonical("CumSum", "CumProd")
def cumsum(op: Builder) -> Result:
    """CumSum along a constant axis"""
    axis = scalar_value(op.optional(1))
    if axis is None and len(shape(op.x())) == 1:
        axis = 0
    if axis is None:
        return reject("its axis varies at run time", "make the input 'axis' a constant")
    return op.CumSum(op.x(), axis=int(axis) % len(shape(op.x())), exclusive=op.attribute("exclusive", 0),
                     reverse=op.attribute("reverse", 0), kind=op.node.op_type.lower()[3:])  # fmt: skip


@canonical("OneHot")
def one_hot(op: Builder) -> Result:
    """Where(indices = 0, 1, …, on, off) along a new axis"""
    indices, rank = op.x(), len(shape(op.y))
    axis, t = int(op.attribute("axis", -1)) % rank, dtype_of(indices)
    depth = shape(op.y)[axis]
    if not isinstance(depth, int):
        return reject("its depth varies at run time", "make the input 'depth' a constant")
    column = op.view(indices, [*shape(indices)[:axis], 1, *shape(indices)[axis:]])
    whole = op.cast(column, "int64") if t != "int64" else column
    steps = op.steps(depth, axis, rank)
    on, off = (op.Slice(op.x(2), starts=[place], steps=[1], sizes=[1]) for place in (1, 0))
    text = (
        f"Less %0 0 -> bool; Add %0 {depth} -> int64; Where $0 $1 %0 -> int64; Equal $2 %1 -> bool; "
        f"Where $3 %2 %3 -> {op.dtype}"
    )
    return op.pointwise(text, whole, steps, on, off)


@canonical("NegativeLogLikelihoodLoss")
def negative_log_likelihood(op: Builder) -> Result:
    """-weight[target] * x[target], reduced"""
    return _likelihood_loss(op, op.x())


@canonical("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy(op: Builder) -> Result:
    """The likelihood loss of LogSoftmax(scores)"""
    scores = op.Softmax(op.x(), axis=1, log=1)
    loss = _likelihood_loss(op, scores)
    return (loss, scores) if isinstance(loss, ir.Value) else loss


def _likelihood_loss(op: Builder, scores: ir.Value) -> ir.Value:
    sizes, t = shape(op.x(1)), dtype_of(scores)
    target = op.cast(op.view(op.x(1), [sizes[0], 1, *sizes[1:]]), "int64")
    ignored = op.attribute("ignore_index")
    safe = target if ignored is None else op.pointwise(f"Equal %0 {ignored} -> bool; Where $0 0 %0 -> int64", target)
    picked = op.view(op.GatherElements(scores, safe, axis=1), sizes)
    weights = op.view(op.Gather(op.x(2), safe, axis=0), sizes) if op.given(2) else None
    if ignored is not None:
        text = f"Equal %0 {ignored} -> bool; Where $0 0 %1 -> {t}"
        ones = weights if weights is not None else op.constant(np.ones((), numpy_dtype(t)))
        weights = op.pointwise(text, op.view(target, sizes), ones)
    text = f"Neg %0 -> {t}" if weights is None else f"Neg %0 -> {t}; Mul $0 %1 -> {t}"
    loss = op.pointwise(text, picked, *([] if weights is None else [weights]))
    return _reduced_loss(op, loss, weights)


def _reduced_loss(op: Builder, loss: ir.Value, weights: ir.Value | None) -> ir.Value:
    kind, axes = op.attribute("reduction", "mean"), list(range(len(shape(loss))))
    result: ir.Value
    if kind == "none":
        return loss
    if kind == "sum" or weights is None:
        result = op.Reduce(loss, kind=kind, axes=axes, keepdims=0)
        return result
    sums = [op.Reduce(op.expand(value, shape(loss)), kind="sum", axes=axes, keepdims=0) for value in (loss, weights)]
    return op.pointwise(f"Div %0 %1 -> {dtype_of(loss)}", *sums)

"""LayerNorm, RMSNorm, InstanceNorm and GroupNorm from the primitives that exporters write."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.ir.graph import constant_of
from ingot.ir.shapes import shape_of
from ingot.passes.facts import Shape, are_ones, attribute, changed, extras_of, is_float, main_inputs, maker, rank_of
from ingot.passes.pattern import Operators, Pattern
from ingot.passes.rewrite import Builder, Rejection, Result, Table, reject, rewrite, rewrite_node


def _square(op: Operators, x: Pattern) -> Pattern:
    return op.either(op.Pow(x, 2), op.Mul(x, x))


def _divided(op: Operators, x: Pattern, variance: Pattern, epsilon: Any) -> Pattern:
    """x / sqrt(variance + epsilon) as it is written."""
    sum_ = op.Add(variance, op.number(epsilon))
    root = op.Sqrt(sum_)
    return op.either(
        op.Div(x, root), op.Mul(x, op.either(op.Reciprocal(root), op.Div(1, root), op.Pow(sum_, -0.5))),
    )  # fmt: skip


def _layer(op: Operators, x: Any, epsilon: Any) -> Pattern:
    centred = op.Sub(x, op.Reduce(x, kind="mean", capture="mean"))
    squares = _square(op, op.either(centred, op.Cast(centred)))
    return _divided(op, centred, op.Reduce(squares, kind="mean", capture="variance"), epsilon)


@rewrite(_layer)
def layer_norm(op: Builder, x: ir.Value, epsilon: float, mean: ir.Value, variance: ir.Value) -> Result:
    """(x - mean(x)) / sqrt(mean((x - mean(x))²) + epsilon) => Norm(x)"""
    return _norm(op, x, epsilon, "layer", mean, variance)


def _rms(op: Operators, x: Any, epsilon: Any) -> Pattern:
    return _divided(op, x, op.Reduce(_square(op, x), kind="mean", capture="mean"), epsilon)


@rewrite(_rms)
def rms_norm(op: Builder, x: ir.Value, epsilon: float, mean: ir.Value) -> Result:
    """x / sqrt(mean(x²) + epsilon) => Norm(x)"""
    return _norm(op, x, epsilon, "rms", mean)


def _norm(op: Builder, x: ir.Value, epsilon: float, kind: str, *means: ir.Value) -> Result:
    rank, reduces = rank_of(x), [maker(mean, "Reduce") for mean in means]
    if rank is None or not is_float(x):
        return reject("the rank or type of the input is unknown", x)
    axes = {attribute(reduce, "axes") for reduce in reduces if reduce is not None}
    if not all(reduce is not None and attribute(reduce, "keepdims") for reduce in reduces) or len(axes) != 1:
        return reject("the means are not over the same kept axes", means[0])
    (over,) = axes
    if over != tuple(range(rank - len(over), rank)):
        return reject(f"the mean is over the axes {over}, which are not the last ones", means[0])
    return op.Norm(x, kind=kind, axis=rank - len(over), epsilon=epsilon)


# scale and bias


@rewrite(lambda op, x, scale: op.Mul(op.Norm(x, capture="norm"), scale))
def norm_scale(op: Builder, x: ir.Value, scale: ir.Value, norm: ir.Value) -> Result:
    """Norm(x) * scale => Norm(x, scale)"""
    return _affine(op, x, norm, scale, None)


@rewrite(lambda op, x, scale, bias: op.Add(op.Norm(x, op.optional(scale), capture="norm"), bias))
def norm_bias(op: Builder, x: ir.Value, scale: ir.Value | None, bias: ir.Value, norm: ir.Value) -> Result:
    """Norm(x, scale) + bias => Norm(x, scale, bias)"""
    return _affine(op, x, norm, scale, bias)


def _affine(op: Builder, x: ir.Value, norm: ir.Value, scale: ir.Value | None, bias: ir.Value | None) -> Result:
    node, shape = norm.producer(), shape_of(x)
    assert node is not None
    added = scale if bias is None else bias
    array = constant_of(added)
    if array is None or added is None:
        return reject("the scale or bias varies at run time", added)
    if attribute(node, "epilogue") or shape is None:
        return None
    settled = _settled(node, array.shape, shape, scale is not None and bias is not None)
    if isinstance(settled, Rejection):
        return settled
    kind, vector_shape = settled
    vector = op.constant(array.reshape(vector_shape), added) if array.shape != vector_shape else added
    operands = (vector, None) if bias is None else (scale, vector)
    return op.Norm(x, *operands, **changed(node, kind=kind))


_Sizes = tuple[int, ...]


def _settled(node: ir.Node, added: _Sizes, shape: Shape, scaled: bool) -> tuple[str, _Sizes] | Rejection:
    """(the kind of norm that can take a scale or bias of this shape, the shape it takes it in)"""
    axis, kind = attribute(node, "axis"), attribute(node, "kind")
    if kind in ("layer", "rms"):
        inner = shape[axis:]
        trimmed = added[max(0, len(added) - len(inner)) :]
        if are_ones(added[: len(added) - len(trimmed)]) and trimmed == inner:
            return kind, trimmed
        if kind == "layer" and axis == 2 and not scaled and _is_channels(added, shape):
            return "instance", (added[-len(shape) + 1],)
        return reject("the scale or bias has not the shape of the normalised axes")
    return (kind, (max(added),)) if _is_channels(added, shape) else reject("the scale or bias is not one per channel")


def _is_channels(added: _Sizes, shape: Shape) -> bool:
    """Whether it is one per channel of x[N, C, *S]."""
    rank = len(shape)
    aligned = (1,) * (rank - len(added)) + added
    return len(added) in (rank - 1, rank) and aligned[1] == shape[1] and are_ones([*aligned[:1], *aligned[2:]])


@rewrite(lambda op, x, scale, bias: op.View(
    op.Norm(op.View(x, capture="grouped"), op.optional(scale), op.optional(bias), capture="norm")))  # fmt: skip
def group_norm(op: Builder, x: ir.Value, scale: ir.Value | None, bias: ir.Value | None, grouped: ir.Value,
               norm: ir.Value) -> Result:  # fmt: skip
    """View(Norm(View(x, [N, G, …]))) => Norm(x) by groups"""
    node, shape, inner = norm.producer(), shape_of(x), shape_of(grouped)
    assert node is not None
    kind, axis = attribute(node, "kind"), attribute(node, "axis")
    if (kind != "instance" and (kind, axis) != ("layer", 2)) or attribute(node, "epilogue"):
        return None
    if scale is not None or bias is not None:
        return reject("the norm inside has a scale or bias of its own", norm)
    if shape is None or inner is None or shape_of(op.root.outputs[0]) != shape or not _splits_channels(shape, inner):
        return reject("the views do not split the channels into groups", grouped)
    return op.Norm(x, kind="group", groups=inner[1], epsilon=attribute(node, "epsilon"))


def _splits_channels(shape: Shape, grouped: Shape) -> bool:
    """Whether x[N, C, *S] is seen as [N, G, …] with C a multiple of G."""
    if len(shape) < 3 or len(grouped) < 3 or shape[0] != grouped[0]:
        return False
    channels, groups = shape[1], grouped[1]
    return isinstance(channels, int) and isinstance(groups, int) and channels % groups == 0


@rewrite_node("Norm")
def unit_norm(op: Builder, node: ir.Node) -> Result:
    """Norm(x, 1, 0) => Norm(x)"""
    x, scale, bias = main_inputs(node)
    kept = [_unless(scale, 1), _unless(bias, 0)]
    return None if kept == [scale, bias] else op.Norm(x, *kept, *extras_of(node), **changed(node))


def _unless(value: ir.Value | None, number: float) -> ir.Value | None:
    array = constant_of(value)
    return None if array is not None and np.all(array == number) else value


NORM = Table("norms", (layer_norm, rms_norm, unit_norm, norm_scale, norm_bias, group_norm))

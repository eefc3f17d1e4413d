"""Experts: of many feed-forward networks a token passes the few that its router scores highest. Mixture is the same
with the norm before it and whatever is made of its sums behind it, as one operator."""

from __future__ import annotations

import numpy as np

from ingot.errors import GraphError
from ingot.ir import expression as expressions
from ingot.ir import ops_projection
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_table import Attribute, TensorType, narrowed, op

_CHOICE = {"chosen": Attribute("int"), "normalised": Attribute("int"), "activation": Attribute("expression")}


def _type(x: TensorType, scores: TensorType, gate: TensorType, up: TensorType, down: TensorType,
          *scales: TensorType | None, chosen: int, normalised: int, activation: str) -> TensorType:  # fmt: skip
    count, width, inner = gate.shape
    fits = up.shape == gate.shape and down.shape == (count, inner, x.shape[-1]) and width == x.shape[-1]
    if not fits or scores.shape[-1] != count or not 0 < chosen <= int(count):
        raise GraphError(
            f"Experts: {chosen} of {count}: gate {gate.shape}, up {up.shape}, down {down.shape} for {x.shape}"
        )
    for scale, columns in zip(scales, (inner, inner, width), strict=False):
        if scale is not None and scale.shape != (count, columns):
            raise GraphError(f"Experts: scales {scale.shape} are not {(count, columns)}, one of each expert's columns")
    return x


@op("Experts", "x scores gate up down gate_scale? up_scale? down_scale?", _type, **_CHOICE)
def experts(x_TK: Array, scores_TE: Array, gate_EKF: Array, up_EKF: Array, down_EFK: Array,
            gate_scale_EF: Array | None = None, up_scale_EF: Array | None = None, down_scale_EK: Array | None = None,
            *, chosen: int, normalised: int, activation: str) -> Array:  # fmt: skip
    """Σ over the `chosen` best e of softmax(scores)[e] * (activation(x gate[e]) * (x up[e])) down[e]

    normalised: the shares of the chosen are scaled to add up to 1. Of equal scores the first is taken. Where there are
    scales, columns of the weights are multiplied by them.
    """
    weights = ((gate_EKF, gate_scale_EF), (up_EKF, up_scale_EF), (down_EFK, down_scale_EK))
    act, result = expressions.parse(activation), np.zeros(x_TK.shape, wide(x_TK).dtype)
    for t, (x, scores) in enumerate(zip(wide(x_TK), wide(scores_TE), strict=True)):
        powers = np.exp(scores - scores.max())
        picked = np.argsort(-scores, kind="stable")[:chosen]
        shares = powers[picked] / (powers[picked].sum() if normalised else powers.sum())
        for e, share in zip(picked, shares, strict=True):
            gate, up, down = (_scaled(weight, scale, e) for weight, scale in weights)
            inner = expressions.evaluate(act, [x @ gate]) * (x @ up)
            result[t] += share * (inner @ down)
    return narrowed(result, x_TK.dtype.name)


def _scaled(weight: Array, scale: Array | None, number: int) -> Array:
    """One expert's weights."""
    own = weight[number].astype(np.float32)
    return own if scale is None else own * scale[number].astype(np.float32)


def _mixture_type(x: TensorType, scores: TensorType, gate: TensorType, up: TensorType, down: TensorType,
                  gate_scale: TensorType | None, up_scale: TensorType | None, down_scale: TensorType | None,
                  norm: TensorType | None, *operands: TensorType, chosen: int, normalised: int, activation: str,
                  epsilon: float, expression: str) -> TensorType:  # fmt: skip
    _type(x, scores, gate, up, down, gate_scale, up_scale, down_scale, chosen=chosen, normalised=normalised,
          activation=activation)  # fmt: skip
    dtypes = ["float32", *(operand.dtype for operand in operands)]
    return TensorType(expressions.result_dtype(expressions.parse(expression), dtypes), x.shape)


@op("Mixture", "x scores gate up down gate_scale? up_scale? down_scale? norm? *operands", _mixture_type,
    epsilon=Attribute("float", 1e-6), expression=Attribute("expression", ""), **_CHOICE)  # fmt: skip
def mixture(x_TK: Array, scores_TE: Array, gate_EKF: Array, up_EKF: Array, down_EFK: Array,
            gate_scale_EF: Array | None = None, up_scale_EF: Array | None = None, down_scale_EK: Array | None = None,
            norm_K: Array | None = None, *operands: Array, chosen: int, normalised: int, activation: str,
            epsilon: float, expression: str) -> Array:  # fmt: skip
    """expression(Experts(x'), operands) in float32, where x' is x / rms(x) * norm if there is a norm, else x. Where
    weights have eight bits, x' and what lies between the products may be rounded to them too, row by row with a scale
    """
    rows = ops_projection.normalised(x_TK, norm_K, epsilon)
    sums = experts(rows, scores_TE, gate_EKF, up_EKF, down_EFK, gate_scale_EF, up_scale_EF, down_scale_EK,
                   chosen=chosen, normalised=normalised, activation=activation)  # fmt: skip
    return ops_projection.finished(sums, operands, 1, expression)

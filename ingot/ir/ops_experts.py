"""Experts: of many feed-forward networks a token passes the few that its router scores highest."""

from __future__ import annotations

import numpy as np

from ingot.errors import GraphError
from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_table import Attribute, TensorType, narrowed, op


def _type(x: TensorType, scores: TensorType, gate: TensorType, up: TensorType, down: TensorType, *, chosen: int,
          normalised: int, activation: str) -> TensorType:  # fmt: skip
    count, width, inner = gate.shape
    fits = up.shape == gate.shape and down.shape == (count, inner, x.shape[-1]) and width == x.shape[-1]
    if not fits or scores.shape[-1] != count or not 0 < chosen <= int(count):
        raise GraphError(
            f"Experts: {chosen} of {count}: gate {gate.shape}, up {up.shape}, down {down.shape} for {x.shape}"
        )
    return x


@op("Experts", "x scores gate up down", _type, chosen=Attribute("int"), normalised=Attribute("int"),
    activation=Attribute("expression"))  # fmt: skip
def experts(x_TK: Array, scores_TE: Array, gate_EKF: Array, up_EKF: Array, down_EFK: Array, *, chosen: int,
            normalised: int, activation: str) -> Array:  # fmt: skip
    """Σ over the `chosen` best e of softmax(scores)[e] * (activation(x gate[e]) * (x up[e])) down[e]

    normalised: the shares of the chosen are scaled to add up to 1. Of equal scores the first is taken.
    """
    act, result = expressions.parse(activation), np.zeros(x_TK.shape, wide(x_TK).dtype)
    for t, (x, scores) in enumerate(zip(wide(x_TK), wide(scores_TE), strict=True)):
        powers = np.exp(scores - scores.max())
        picked = np.argsort(-scores, kind="stable")[:chosen]
        shares = powers[picked] / (powers[picked].sum() if normalised else powers.sum())
        for e, share in zip(picked, shares, strict=True):
            inner = expressions.evaluate(act, [x @ wide(gate_EKF[e])]) * (x @ wide(up_EKF[e]))
            result[t] += share * (inner @ wide(down_EFK[e]))
    return narrowed(result, x_TK.dtype.name)

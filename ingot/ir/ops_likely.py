"""Likely: what log-probabilities of some rows' tokens are made of, in whole numbers and logits as they are, so that the
same logits give the same log-probabilities anywhere (weights: ingot/ir/ops_sample.py).

A row's answer (`LIKELY` words, int32): the sum of all tokens' weights in two words, the chosen token's logit (float32),
then `MOST` tokens, the likeliest first and of equal ones the first, -1 where there is none, and their logits.
"""

from __future__ import annotations

import math

import numpy as np

from ingot.errors import GraphError
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_sample import UNIT, by_lanes, distances, weights
from ingot.ir.ops_table import TensorType, op

MOST = 20  # that OpenAI's clients may ask for
LIKELY = 3 + 2 * MOST
PACE = float(np.float32(UNIT / math.log(2)))  # of distances between probabilities


def _likely_type(logits: TensorType, chosen: TensorType, told: TensorType) -> TensorType:
    for name, given in (("chosen", chosen), ("told", told)):
        if given.dtype != "int32" or len(given.shape) != 1:
            raise GraphError(f"Likely: {name} is a row of int32, this is {given.dtype} {given.shape}")
    return TensorType("int32", (*told.shape, LIKELY))


@op("Likely", "logits chosen told", _likely_type)
def likely(logits_RV: Array, chosen_R: Array, told_L: Array) -> Array:
    """Words [L, LIKELY] about the rows `told` and the tokens chosen there; zeros for a row or a token -1, and where the
    likeliest is no number"""
    words = np.zeros((len(told_L), LIKELY), np.int32)
    for place, row in enumerate(told_L.tolist()):
        if row >= 0 and chosen_R[row] >= 0:
            words[place] = _of_row(wide(logits_RV[row]), int(chosen_R[row]))
    return words


def _of_row(logits_V: Array, token: int) -> Array:
    words, best = np.zeros(LIKELY, np.int32), logits_V[logits_V.argmax()]  # a NaN, if there is one
    if not np.isfinite(best):
        return words
    found = _first(logits_V)
    words[:2] = by_lanes(weights(distances(logits_V, best, np.float32(PACE)))).sum(keepdims=True).view(np.int32)
    words[2:3] = logits_V[token : token + 1].view(np.int32)
    words[3 : 3 + MOST] = -1
    words[3 : 3 + len(found)] = found
    words[3 + MOST : 3 + MOST + len(found)] = (logits_V[found] + np.float32(0)).view(np.int32)  # no negative zero
    return words


def _first(logits_V: Array) -> Array:
    """The likeliest tokens, MOST or fewer."""
    least = np.partition(logits_V, -MOST)[-MOST] if len(logits_V) > MOST else -np.inf
    found = np.flatnonzero((logits_V >= least) & (logits_V > -np.inf))
    return found[np.lexsort((found, -logits_V[found]))][:MOST]


_WHOLE = int(weights(np.zeros(1, np.int32))[0])  # the likeliest token's weight


def log_probabilities(words_LW: Array) -> tuple[Array, Array]:
    """Of the chosen tokens [L] and of the likeliest ones [L, MOST], float64; NaN in rows of zeros."""
    totals = np.ascontiguousarray(words_LW[:, :2]).view(np.uint64).astype(np.float64)
    logits = np.ascontiguousarray(words_LW[:, [2, *range(3 + MOST, LIKELY)]]).view(np.float32).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = logits - (logits[:, 1:2] + np.log(totals / _WHOLE))
    found[totals[:, 0] == 0] = np.nan
    return found[:, 0], found[:, 1:]


def tokens_of(words_LW: Array) -> Array:
    """The likeliest tokens [L, MOST], -1 where there is none."""
    return words_LW[:, 3 : 3 + MOST]

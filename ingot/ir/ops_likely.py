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


def log_probabilities(words: Array) -> tuple[float, list[tuple[int, float]]]:
    """The chosen token's log-probability, and the likeliest tokens with theirs; NaN and none for words of zeros."""
    total = int(np.ascontiguousarray(words[:2]).view(np.uint64)[0])
    if not total:
        return math.nan, []
    chosen, *logits = np.ascontiguousarray(np.append(words[2], words[3 + MOST :])).view(np.float32).tolist()
    under = logits[0] + math.log(total / _WHOLE)
    tokens = [token for token in words[3 : 3 + MOST].tolist() if token >= 0]
    return chosen - under, [(token, logit - under) for token, logit in zip(tokens, logits, strict=False)]

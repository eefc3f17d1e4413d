"""Rows of weights as integers with scales per group: each rounded alone, or so that the errors of a row make up for
each other in what the row is multiplied with.

The latter is GPTQ (Frantar et al., 2022): after a column of weights is rounded, the columns to come take over what can
be taken over of its error, which the correlations of their inputs tell.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.dtypes import LARGEST_HALF

Array = np.ndarray[Any, Any]
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the largest magnitude, tried for four bits
_SPAN = 1024  # columns that take over errors from each other: more cost their square, and gain nothing that shows
_DAMPING = 0.05  # of the inputs' mean square: correlations of few tokens are not taken at their word


def rounded(rows: Array, bits: int, group: int) -> tuple[Array, Array]:
    """(integers [row, column], scales per group) of rows, each number the nearest."""
    count, depth = rows.shape
    groups = -(-depth // group)
    padded = np.zeros((count, groups * group), np.float32)
    padded[:, :depth] = rows
    blocks = padded.reshape(count, groups, group)
    scales = _scales(blocks, bits)
    whole = _to_integers(blocks, scales, bits).astype(np.int8)
    return whole.reshape(count, -1)[:, :depth], scales[..., 0]


def compensated(rows: Array, successors: list[Array], bits: int, group: int) -> tuple[Array, Array]:
    """The same with errors taken over by later columns, as `successors` of the inputs tells."""
    rest = np.array(rows.T, np.float32, order="C")
    depth, count = rest.shape
    whole, scales = np.empty((depth, count), np.int8), np.empty((-(-depth // group), count), np.float32)
    for part, start in zip(successors, range(0, depth, _SPAN), strict=True):
        stop = min(start + _SPAN, depth)
        for first in range(start, stop, group):
            last = min(first + group, stop)
            among = part[first - start : last - start, first - start :]
            scale = _scales(rest[first:last].T, bits)[:, 0]
            whole[first:last], errors = _group(rest[first:last], among, scale, bits)
            rest[last:stop] -= among[:, last - first :].T @ errors
            scales[first // group] = scale
    return whole.T, scales.T


def _group(rest: Array, among: Array, scale: Array, bits: int) -> tuple[Array, Array]:
    """(integers, errors as the columns to come want them) of a group's columns, which are changed on the way."""
    whole, errors = np.empty(rest.shape, np.int8), np.empty_like(rest)
    for column in range(len(rest)):
        whole[column] = _to_integers(rest[column], scale, bits)
        errors[column] = (rest[column] - whole[column] * scale) / among[column, column]
        rest[column + 1 :] -= among[column, column + 1 : len(rest), None] * errors[column]
    return whole, errors


def successors_of(inputs: Array) -> list[Array]:
    """For each span of columns the upper triangle that says how a column's error passes to later ones, from what rows
    are multiplied with [token, column]: the Cholesky factor of the inverse of the inputs' correlations."""
    found = []
    for start in range(0, inputs.shape[1], _SPAN):
        seen = np.asarray(inputs[:, start : start + _SPAN], np.float32)
        squares = (seen.T @ seen).astype(np.float64)
        mean = float(squares.trace()) / len(squares)
        squares[np.diag_indices(len(squares))] += _DAMPING * mean if mean > 0 else 1.0
        found.append(np.linalg.cholesky(np.linalg.inv(squares)).T.astype(np.float32))
    return found


def _scales(blocks: Array, bits: int) -> Array:
    """Scales [..., 1] of groups [..., group], exact in float16. With four bits the number of largest magnitude becomes
    the lowest integer, which is one further from zero than the highest, or lies beyond it, where that errs less in the
    squares."""
    low = -(1 << (bits - 1))
    place = np.abs(blocks).argmax(-1)[..., None]
    extreme = np.take_along_axis(blocks, place, -1) / (low if bits < 8 else low + 1)
    best = _half(extreme)
    if bits < 8:
        least = np.full(extreme.shape, np.inf, np.float32)
        for share in _SHARES:
            scale = _half(extreme * np.float32(share))
            error = ((_to_integers(blocks, scale, bits) * scale - blocks) ** 2).sum(-1, keepdims=True)
            best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def _half(scale: Array) -> Array:
    """The nearest float16 numbers, and 1 where that is 0."""
    near = np.clip(scale, -LARGEST_HALF, LARGEST_HALF).astype(np.float16).astype(np.float32)
    return np.where(near == 0, np.float32(1), near)


def _to_integers(blocks: Array, scale: Array, bits: int) -> Array:
    low = -(1 << (bits - 1))
    return np.clip(np.rint(blocks / scale), low, -low - 1)

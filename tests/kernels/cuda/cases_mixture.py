"""Mixtures of one row, a few and many, with weights of 32, 16 and eight bits."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from tests.kernels.cuda.case import Array, Case

_WIDTH, _INNER, _EXPERTS, _CHOSEN = 256, 192, 32, 4
_SILU = "Sigmoid %0 -> float32; Mul %0 $0 -> float32"
_JOINED = "Mul %0 {} -> float32; Cast %1 -> float32; Add $0 $1 -> float32; Cast $2 -> {}"
_WEIGHTS, _SCALES = (2, 3, 4), (5, 6, 7)


def _eighths(rng: np.random.Generator, index: int, shape: tuple[int, ...]) -> Array:
    if index in _SCALES:
        return rng.uniform(0.5, 1.5, shape).astype(np.float16)
    x = rng.standard_normal(shape)
    return (x * shape[1] ** -0.5).astype(ml_dtypes.float8_e4m3fn) if index in _WEIGHTS else x


def _floats(rng: np.random.Generator, index: int, shape: tuple[int, ...]) -> Array:
    x = rng.standard_normal(shape)
    return np.asarray(x * shape[1] ** -0.5) if index in _WEIGHTS else x


def _mixtures() -> Iterator[Case]:
    stacks = [(_EXPERTS, _WIDTH, _INNER), (_EXPERTS, _WIDTH, _INNER), (_EXPERTS, _INNER, _WIDTH)]
    scales: list[tuple[int, ...] | None] = [(_EXPERTS, shape[2]) for shape in stacks]
    attributes = {"chosen": _CHOSEN, "normalised": 1, "activation": _SILU, "epsilon": 1e-5}
    kinds = (
        ("floats", "float32", _floats, 1.0, (1, 40)), ("halves", "float16", _floats, 1.0, (1, 3, 40, 300, 1200)),
        ("eighths", "float16", _eighths, 0.1, (1, 3, 40, 300, 1200)),  # rows' rounding is allowed
    )  # fmt: skip
    for name, dtype, draw, factor, counts in kinds:
        for rows in counts:
            kept = scales if draw is _eighths else [None] * 3
            shapes = [(rows, _WIDTH), (rows, _EXPERTS), *stacks, *kept, (_WIDTH,), (rows, _WIDTH)]
            yield Case(f"Mixture {rows} of {name}", "Mixture", shapes, attributes, _JOINED.format(factor, dtype),
                       (*_WEIGHTS, *_SCALES, 8), dtype, True, draw)  # fmt: skip


MIXTURES = tuple(_mixtures())

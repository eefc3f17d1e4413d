"""Projections with weights of four and eight bits, of one row, few and many."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.kernels.cuda.case import Array, Case

_DEPTH, _COLUMNS = 1056, 200
_GATED = "Sigmoid %0 -> float32; Mul $0 %0 -> float32; Mul $1 %1 -> float32; Cast $2 -> float16"
_SMALL = "Mul %0 0.0005 -> float32; Cast $0 -> float16"


def _drawn(bits: int, zeros: bool) -> object:
    """Rows, integers, the norm, scales, zeros."""

    def draw(rng: np.random.Generator, index: int, shape: tuple[int, ...]) -> Array:
        if index == 1 or (index == 4 and zeros):
            whole = rng.integers(0, 1 << bits, shape)
            return whole.astype(np.uint8) if zeros else (whole - (1 << bits - 1)).astype(np.int8)
        if index == 3:
            return (rng.uniform(0.5, 1.5, shape) / (8 << bits)).astype(np.float16)
        return rng.standard_normal(shape)

    return draw


def _quantized() -> Iterator[Case]:
    for bits, group, zeros, normed in ((4, 32, False, True), (4, 96, True, False), (8, 128, False, True)):
        for rows in (1, 5, 24, 150):
            groups = -(-_DEPTH // group)
            shapes = [(rows, _DEPTH), (_DEPTH, 2 * _COLUMNS), (_DEPTH,) if normed else None, (groups, 2 * _COLUMNS),
                      (groups, 2 * _COLUMNS) if zeros else None]  # fmt: skip
            attributes = {"parts": 2, "epsilon": 1e-5, "bits": bits, "group": group}
            yield Case(f"QuantizedProjection {rows} of {bits} bits{' and zeros' if zeros else ''}",
                       "QuantizedProjection", shapes, attributes, _GATED, (1, 2, 3, 4), "float16", True,
                       _drawn(bits, zeros))  # type: ignore[arg-type] # fmt: skip


def _integers() -> Iterator[Case]:
    def draw(rng: np.random.Generator, index: int, shape: tuple[int, ...]) -> Array:
        return rng.integers(-9, 10, shape).astype(np.int8) if index == 1 else rng.standard_normal(shape)

    for rows in (1, 24, 300, 1200):
        shapes = [(rows, _DEPTH), (_DEPTH, _COLUMNS), (_DEPTH,)]
        yield Case(f"Projection {rows} of int8", "Projection", shapes, {"parts": 1, "epsilon": 1e-5}, _SMALL, (1, 2),
                   "float16", True, draw)  # fmt: skip


PROJECTIONS = (*_quantized(), *_integers())

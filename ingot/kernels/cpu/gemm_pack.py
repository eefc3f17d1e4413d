"""Packed weights: panels of columns, K-major within a panel, groups of K side by side in each lane.

Sums of 8-bit integers: Σ (x - a)(w - b) = Σ x w' - a Σ (w' - b') - b' Σ x with w' = w - shift, b' = b - shift.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.kernels.cpu.gemm_dot import Dot

Array = np.ndarray[Any, Any]


def pack_panels(weight: Array, dot: Dot, vectors: int) -> Array:
    """w[..., K, N] → [..., panel, step, vectors·lanes, group], zeros where there is no weight."""
    *batch, depth, columns = weight.shape
    width = vectors * dot.lanes
    panels, steps = -(-columns // width), -(-depth // dot.group)
    padded = np.zeros((*batch, steps * dot.group, panels * width), numpy_dtype(dot.right))
    padded[..., :depth, :columns] = weight
    split = padded.reshape(*batch, steps, dot.group, panels, width)
    rank = len(batch)
    order = (*range(rank), rank + 2, rank, rank + 3, rank + 1)
    return np.ascontiguousarray(split.transpose(order))


def byte_shift(weight: Array, zero_point: int) -> int:
    """What to subtract from 8-bit weights to have int8: the zero point where that fits, so that it vanishes."""
    low, high = (int(weight.min()), int(weight.max())) if weight.size else (0, 0)
    if low - zero_point >= -128 and high - zero_point <= 127:
        return zero_point
    return 128 if weight.dtype == np.uint8 else 0


def column_corrections(weight: Array, x_zero_point: int, weight_zero_point: int, width: int) -> Array:
    """-a Σ (w - b) for each column, zeros up to whole panels."""
    depth, columns = weight.shape
    sums = weight.astype(np.int64).sum(axis=0) - depth * weight_zero_point
    padded = np.zeros(-(-columns // width) * width, np.int32)
    padded[:columns] = (-x_zero_point * sums).astype(np.int32)
    return padded

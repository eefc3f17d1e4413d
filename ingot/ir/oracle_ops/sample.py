"""GridSample, which onnx.reference computes one element at a time, and before opset 20 under names it does not know."""

from __future__ import annotations

from itertools import product

import numpy as np

from ingot.ir.oracle_ops.table import meaning

_CUBIC = -0.75
_NEIGHBOURS = {"nearest": (0,), "linear": (0, 1), "cubic": (-1, 0, 1, 2)}
_NAMES = {"bilinear": "linear", "bicubic": "cubic"}


@meaning("GridSample")
def grid_sample(x: np.ndarray, grid: np.ndarray, *, mode: str = "linear", padding_mode: str = "zeros",
                align_corners: int = 0) -> np.ndarray:  # fmt: skip
    """x[N, C, *sizes] at grid[N, *out, rank], whose last position runs along the last axis: [N, C, *out]."""
    mode, sizes = _NAMES.get(mode, mode), x.shape[2:]
    batch, *out, _ = grid.shape
    positions = grid.reshape(batch, -1, len(sizes))[..., ::-1]
    axes = [_weighed(positions[..., i], size, mode, padding_mode, bool(align_corners)) for i, size in enumerate(sizes)]
    result = np.zeros((*x.shape[:2], positions.shape[1]), np.float64)
    image = np.arange(batch)[:, None]
    for neighbour in product(*axes):
        places, shares = zip(*neighbour, strict=True)
        found = x[(image, slice(None), *places)]  # [N, positions, C]
        result += np.moveaxis(found * np.prod(shares, axis=0)[..., None], -1, 1)
    return result.astype(x.dtype).reshape(*x.shape[:2], *out)


def _weighed(
    grid: np.ndarray, size: int, mode: str, padding: str, corners: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(element, share) of every neighbour along an axis."""
    low, high = (0.0, size - 1.0) if corners else (-0.5, size - 0.5)
    g = grid.astype(np.float64)
    position = (g + 1) / 2 * (size - 1) if corners else ((g + 1) * size - 1) / 2
    position = position.astype(np.float32)
    position = _padded(np.rint(position) if mode == "nearest" else position, low, high, size, padding)
    first = np.rint(position) if mode == "nearest" else np.floor(position)
    neighbours = []
    for offset in _NEIGHBOURS[mode]:
        share = _share(np.abs(position - first - offset), mode)
        place = _padded(first + offset, low, high, size, padding)
        if padding == "zeros":
            share = share * ((place >= 0) & (place <= size - 1))
        neighbours.append((np.clip(place, 0, size - 1).astype(np.int64), share))
    return neighbours


def _padded(position: np.ndarray, low: float, high: float, size: int, padding: str) -> np.ndarray:
    """Positions outside clipped to the last elements, or reflected about the edges; with zeros around they stay."""
    outside = (position < low) | (position > high)
    if padding == "border":
        return np.where(outside, np.clip(position, 0, size - 1), position)
    if padding == "reflection" and high > low:
        walked = (position - low) % (2 * (high - low))
        return np.where(outside, low + np.minimum(walked, 2 * (high - low) - walked), position)
    return position


def _share(distance: np.ndarray, mode: str) -> np.ndarray:
    d, a = distance.astype(np.float64), _CUBIC
    if mode == "nearest":
        return np.ones_like(d)
    if mode == "linear":
        return 1 - d
    return np.where(d <= 1, ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a)

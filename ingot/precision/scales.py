"""Ranges to scales and zero points."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_SMALLEST = 1e-30


def affine(low: float, high: float) -> tuple[float, int]:
    """(scale, zero point) of uint8 over low..high, which is widened to hold 0 exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, _SMALLEST)
    return float(np.float32(scale)), int(np.clip(round(-low / scale), 0, 255))


def symmetric(magnitude: float, largest: int = 127) -> float:
    """The scale of signed integers up to `largest` over -magnitude..magnitude."""
    return float(np.float32(max(magnitude / largest, _SMALLEST)))


def per_channel(weight: Array, axis: int, largest: int = 127) -> Array:
    """Symmetric scales of a weight's output channels; a channel of zeros has scale 1."""
    other = tuple(i for i in range(weight.ndim) if i != axis)
    magnitude = np.abs(weight).max(axis=other)
    return np.where(magnitude > 0, magnitude / largest, 1.0).astype(np.float32)

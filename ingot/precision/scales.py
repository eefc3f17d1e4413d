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
    """Symmetric scales of a weight's output channels; a channel of zeros has scale 1.

    Weights that are multiples of one step, as training with quantization leaves them, keep it where it reaches.
    """
    other = tuple(i for i in range(weight.ndim) if i != axis)
    magnitude = np.abs(weight).max(axis=other)
    scale = np.where(magnitude > 0, magnitude / largest, 1.0)
    step = step_of(weight)
    if step is not None:
        scale = np.where((magnitude > 0) & (magnitude < (largest + 0.5) * step), step, scale)
    return scale.astype(np.float32)


def step_of(weight: Array) -> float | None:
    """The step all weights are multiples of, of which they have at most 255; None where they are not so."""
    values = np.unique(weight)
    if not 2 <= len(values) <= 256:
        return None
    gaps = np.diff(values.astype(np.float64))
    near = gaps[gaps > 1e-5 * np.abs(values).max()]
    steps = values / near.min() if len(near) else np.array([np.inf])
    whole = np.rint(steps)
    if np.abs(whole).max() > 255 or np.abs(steps - whole).max() > 0.01:
        return None
    largest = int(np.abs(whole).argmax())
    return float(values[largest] / whole[largest])

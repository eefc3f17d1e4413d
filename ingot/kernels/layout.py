"""Physical layouts of feature maps: "plain" is row-major; "blocked" groups channels: [N, ceil(C/b), *spatial, b];
"channels_last" is [N, *spatial, C]; "heads_inside" has the second and third axis exchanged: [B, S, H, D] in memory is
seen as [B, H, S, D]."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.plan.extent import Extent, ceil_div

Array = np.ndarray[Any, Any]


def physical_shape(shape: tuple[Extent, ...], layout: str, lanes: int) -> tuple[Extent, ...]:
    """Shape of the stored array."""
    if layout == "plain":
        return shape
    if layout == "channels_last":
        return (shape[0], *shape[2:], shape[1])
    if layout == "heads_inside":
        return (shape[0], shape[2], shape[1], *shape[3:])
    return (shape[0], ceil_div(shape[1], lanes), *shape[2:], lanes)


def to_blocked(x: Array, lanes: int, fill: float = 0) -> Array:
    """x[N, C, *S] → [N, ceil(C/lanes), *S, lanes]; lanes beyond C hold `fill`."""
    batch, channels, *spatial = x.shape
    blocks = -(-channels // lanes)
    padded = np.full((batch, blocks * lanes, *spatial), fill, x.dtype)
    padded[:, :channels] = x
    grouped = padded.reshape(batch, blocks, lanes, *spatial)
    return np.ascontiguousarray(np.moveaxis(grouped, 2, -1))


def from_blocked(x: Array, channels: int) -> Array:
    """[N, blocks, *S, lanes] → [N, channels, *S]."""
    grouped = np.moveaxis(x, -1, 2)
    return np.ascontiguousarray(grouped.reshape(x.shape[0], x.shape[1] * x.shape[-1], *grouped.shape[3:])[:, :channels])

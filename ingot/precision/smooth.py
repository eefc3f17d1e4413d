"""SmoothQuant: magnitudes of single channels move from a tensor into the weights that multiply it.

x @ W => (x / s) @ (s W) with s = max|x|^a / max|W|^(1 - a) per channel (Xiao et al., 2023). The readers of one tensor
share s. Where a norm's scale makes x, 1 / s disappears into its epilogue; elsewhere it is one multiplication more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.ir.graph import add_constant, make_node
from ingot.precision import nodes
from ingot.precision.nodes import Target
from ingot.precision.ranges import TensorRange

Array = np.ndarray[Any, Any]
_SMALLEST = 1e-5


def smooth(targets: Sequence[Target], ranges: Mapping[str, TensorRange], strength: float) -> dict[str, TensorRange]:
    """Smooth all targets that are no convolutions and whose channels calibration has seen; their new ranges."""
    found: dict[str, TensorRange] = {}
    for x in {target.x: None for target in targets if not target.is_convolution}:
        readers = [target for target in targets if target.x is x and not target.is_convolution]
        known = ranges[readers[0].name]
        if known.channels is not None and known.channels.shape == (readers[0].array.shape[readers[0].sum_axis],):
            factors = factors_of(known.channels, [r.array for r in readers], [r.sum_axis for r in readers], strength)
            divide_and_multiply(x, readers, factors)
            found.update(dict.fromkeys((reader.name for reader in readers), _divided(known, factors)))
    return found


def factors_of(channels: Array, weights: Sequence[Array], axes: Sequence[int], strength: float) -> Array:
    """s per channel of x; 1 for channels that are never active."""
    largest = np.max([np.abs(w).max(axis=1 - axis) for w, axis in zip(weights, axes, strict=True)], axis=0)
    factors = np.maximum(channels, _SMALLEST) ** strength / np.maximum(largest, _SMALLEST) ** (1 - strength)
    usable = (channels > 0) & (largest > 0)
    return np.where(usable, np.clip(factors, _SMALLEST, None), 1.0).astype(np.float32)


def divide_and_multiply(x: ir.Value, readers: Sequence[Target], factors: Array) -> None:
    """The readers read x / factors, their weights are multiplied by them."""
    graph, anchor, behind = nodes.place_after(x, readers[0].node)
    inverse = add_constant(graph, (1 / factors).astype(np.float32), f"{x.name}.smooth")
    node = make_node("Mul", [x, inverse], domain="", name=f"{x.name}.smooth")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{x.name}.smooth", x.type, x.shape
    (graph.insert_after if behind else graph.insert_before)(anchor, [node])
    for reader in readers:
        column = (-1, 1) if reader.sum_axis == 0 else (1, -1)
        nodes.replace_weight(reader, reader.array * factors.reshape(column))
        reader.node.replace_input_with(0, node.outputs[0])


def _divided(known: TensorRange, factors: Array) -> TensorRange:
    """The range of x / factors, channel by channel; the ends keep the share that the calibrator gave them."""
    assert known.channels is not None
    channels = known.channels / factors
    largest, before = float(channels.max()), float(known.channels.max())
    share = min(1.0, known.magnitude / before) if before else 1.0
    low = 0.0 if known.low == 0 else -largest * share
    return replace(known, low=low, high=largest * share if known.high > 0 else 0.0, channels=channels, energy=None)

"""SmoothQuant: magnitudes of single channels move from a tensor into the weights that multiply it.

x @ W => (x / s) @ (s W) with s = max|x|^a / max|W|^(1 - a) per channel (Xiao et al., 2023). The readers of one tensor
share s. Of several strengths a the one is taken for each tensor whose 8-bit product is expected to err least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.ir.graph import add_constant, make_node
from ingot.precision import nodes, scales
from ingot.precision.absorb import absorb
from ingot.precision.nodes import Target
from ingot.precision.ranges import TensorRange

Array = np.ndarray[Any, Any]
_SMALLEST = 1e-5
_WORTH = 0.9  # of the error without: a multiplication more has to gain something


@dataclass(frozen=True, eq=False)
class Channels:
    """What calibration knows of a tensor's channels."""

    lows: Array
    highs: Array
    energy: Array

    @property
    def largest(self) -> Array:
        """Of each channel, the largest magnitude."""
        return np.maximum(-self.lows, self.highs)


def smooth(
    targets: Sequence[Target], ranges: Mapping[str, TensorRange], strengths: Sequence[float]
) -> dict[str, TensorRange]:
    """Smooth what targets that are no convolutions read, where it is expected to help; their new ranges by node."""
    found: dict[str, TensorRange] = {}
    for x in {target.x: None for target in targets if not target.is_convolution}:
        readers = [target for target in targets if target.x is x and not target.is_convolution]
        known = ranges[readers[0].name]
        channels = _channels(known, readers)
        factors = None if channels is None else best_factors(channels, known, readers, strengths)
        if factors is not None:
            divide_and_multiply(x, readers, factors)
            found.update(dict.fromkeys((reader.name for reader in readers), divided(known, factors)))
    return found


def _channels(known: TensorRange, readers: Sequence[Target]) -> Channels | None:
    """None where calibration does not tell, or saw another axis."""
    count = readers[0].array.shape[readers[0].sum_axis]
    if known.lows is None or known.highs is None or known.energy is None or len(known.lows) != count:
        return None
    return Channels(known.lows, known.highs, known.energy)


def best_factors(
    channels: Channels, known: TensorRange, readers: Sequence[Target], strengths: Sequence[float]
) -> Array | None:
    """s of the strength with the least expected error; None where that of no smoothing is as good."""
    rows = [np.moveaxis(reader.array, reader.sum_axis, 0) for reader in readers]
    offers = [factors_of(channels.largest, rows, strength) for strength in strengths]
    errors = [expected_error(channels, known, rows, factors) for factors in offers]
    without = expected_error(channels, known, rows, np.ones_like(channels.energy))
    best = int(np.argmin(errors))
    return offers[best] if errors[best] < _WORTH * without else None


def factors_of(largest: Array, rows: Sequence[Array], strength: float) -> Array:
    """s per channel of x, with a geometric mean of 1; 1 for channels that are never active."""
    weight = np.max([np.abs(row).max(1) for row in rows], axis=0)
    usable = (largest > 0) & (weight > 0)
    factors = np.maximum(largest, _SMALLEST) ** strength / np.maximum(weight, _SMALLEST) ** (1 - strength)
    mean = np.exp(np.log(factors[usable]).mean()) if usable.any() else 1.0
    return np.where(usable, factors / mean, 1.0).astype(np.float32)


def expected_error(channels: Channels, known: TensorRange, rows: Sequence[Array], factors: Array) -> float:
    """Mean square error of (x / s) @ (s W) in 8 bits, roundings taken as independent, beside each product's size."""
    after = divided(known, factors)
    step = (after.high - after.low) / 255
    energy = channels.energy / factors**2
    total = 0.0
    for row in rows:
        enlarged = row * factors[:, None]
        weight_step = scales.per_channel(enlarged, 1)
        of_x = step**2 / 12 * float((enlarged**2).sum())
        of_weight = float(energy.sum()) * float((weight_step**2).sum()) / 12
        total += (of_x + of_weight) / max(float((energy[:, None] * enlarged**2).sum()), _SMALLEST**2)
    return total


def divide_and_multiply(x: ir.Value, readers: Sequence[Target], factors: Array) -> None:
    """The readers read x / factors, their weights are multiplied by them."""
    divided_x = absorb(x, [reader.node for reader in readers], factors)
    if divided_x is None:
        divided_x = _divided(x, readers[0].node, factors)
    for reader in readers:
        column = (-1, 1) if reader.sum_axis == 0 else (1, -1)
        nodes.replace_weight(reader, reader.array * factors.reshape(column))
        reader.node.replace_input_with(0, divided_x)


def _divided(x: ir.Value, reader: ir.Node, factors: Array) -> ir.Value:
    """A multiplication by the inverse, right behind what makes x."""
    graph, anchor, behind = nodes.place_after(x, reader)
    inverse = add_constant(graph, (1 / factors).astype(np.float32), f"{x.name}.smooth")
    node = make_node("Mul", [x, inverse], domain="", name=f"{x.name}.smooth")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{x.name}.smooth", x.type, x.shape
    (graph.insert_after if behind else graph.insert_before)(anchor, [node])
    return node.outputs[0]


def divided(known: TensorRange, factors: Array) -> TensorRange:
    """The range of x / factors, channel by channel; the ends keep the share that the calibrator gave them."""
    assert known.lows is not None and known.highs is not None
    lows, highs = known.lows / factors, known.highs / factors
    low = min(float(lows.min()), 0.0) * _share(known.low, known.lows.min())
    high = max(float(highs.max()), 0.0) * _share(known.high, known.highs.max())
    return replace(known, low=low, high=high, lows=lows, highs=highs, energy=None)


def _share(end: float, seen: float) -> float:
    """How much of what was seen a range covers."""
    return min(1.0, end / float(seen)) if seen else 1.0

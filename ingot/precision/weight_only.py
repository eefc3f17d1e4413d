"""Weights alone in 8 or 4 bits, restored as they are read: a smaller model, and less to load where it is read once.

Scales are per output channel (int8) or per block of `block` values that are summed (int4). AWQ-style scaling enlarges
channels of x that matter before rounding (Lin et al., 2023); the strength is searched by the error of x @ W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ingot.dtypes import LARGEST_HALF
from ingot.errors import ConfigError
from ingot.precision import nodes
from ingot.precision.formats import precision_format
from ingot.precision.nodes import Target
from ingot.precision.quantize import Writer
from ingot.precision.ranges import Ranges
from ingot.precision.smooth import divide_and_multiply

Array = np.ndarray[Any, Any]
_BLOCKS_OPSET = 21
_STRENGTHS = np.linspace(0, 1, 11)
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_SMALLEST = 1e-5
_SMALLEST_HALF = 2.0**-14  # normal number of float16


@dataclass(frozen=True)
class Int8Weights:
    """Symmetric, a scale an output channel."""


@dataclass(frozen=True)
class Int4Weights:
    """Blocks of `block` values along the summed axis share a scale; awq: channels that matter are enlarged before."""

    block: int = 32
    awq: bool = False

    def __post_init__(self) -> None:
        if self.block < 16 or self.block & (self.block - 1):
            raise ConfigError(f"int4 blocks have a power of two of values, 16 or more, not {self.block}")


@precision_format("int8_weights", Int8Weights(), calibrated=False)
def int8_weights(config: Int8Weights, model: ir.Model, targets: Sequence[Target], ranges: Ranges) -> None:
    """weight => DQ(int8 weight)."""
    writer = Writer(model)
    for target in targets:
        target.node.replace_input_with(1, writer.weight(target))


@precision_format("int4", Int4Weights(), calibrated=False, opset=_BLOCKS_OPSET)
def int4(config: Int4Weights, model: ir.Model, targets: Sequence[Target], ranges: Ranges) -> None:
    """weight => DQ(int4 weight, scales per block), rounded to nearest."""
    _int4(config, model, targets, ranges)


@precision_format("int4_awq", Int4Weights(awq=True), opset=_BLOCKS_OPSET)
def int4_awq(config: Int4Weights, model: ir.Model, targets: Sequence[Target], ranges: Ranges) -> None:
    """The same after AWQ-style scaling."""
    _int4(config, model, targets, ranges)


def _int4(config: Int4Weights, model: ir.Model, targets: Sequence[Target], ranges: Ranges) -> None:
    """Convolutions have windows, not rows, to sum over: their weights are in 8 bits, a scale a channel."""
    if config.awq:
        known = {t.name: ranges.of(str(t.x.name), t.name) for t in targets if not t.is_convolution}
        targets = _scaled(model, targets, {name: r.energy for name, r in known.items() if r.energy is not None}, config)
    writer = Writer(model)
    for target in targets:
        if target.is_convolution:
            target.node.replace_input_with(1, writer.weight(target))
            continue
        narrow, scale = rounded(target.array, target.sum_axis, config.block)
        placed = {"axis": target.sum_axis, "block_size": config.block}
        restored = writer.restored(target, narrow.astype(ml_dtypes.int4), scale, None, placed)
        target.node.replace_input_with(1, restored)


def rounded(weight: Array, axis: int, block: int, energy: Array | None = None) -> tuple[Array, Array]:
    """(integers -7..7 as int8, scales with `axis` in blocks) of a matrix; each scale the best of a few by the square
    error, weighted by the energy of what is multiplied."""
    rows = np.moveaxis(weight, axis, 0)
    size, count = len(rows), -(-len(rows) // block)
    padded = np.zeros((count * block, rows.shape[1]), np.float32)
    padded[:size] = rows
    blocks = padded.reshape(count, block, -1)
    weights = np.zeros(count * block, np.float32)
    weights[:size] = 1.0 if energy is None else energy
    scale = _best_scales(blocks, weights.reshape(count, block, 1))
    whole = np.clip(np.rint(blocks / scale[:, None]), -7, 7).reshape(count * block, -1)[:size]
    return np.moveaxis(whole.astype(np.int8), 0, axis), np.ascontiguousarray(np.moveaxis(scale, 0, axis))


def _best_scales(blocks: Array, weights: Array) -> Array:
    """[block, column]: the share of the largest magnitude whose rounding and clipping err least."""
    largest = np.abs(blocks).max(1)
    best, least = np.ones(largest.shape, np.float32), np.full(largest.shape, np.inf, np.float32)
    for share in _SHARES:
        scale = _short(np.where(largest > 0, largest * share / 7, 1.0).astype(np.float32))
        restored = np.clip(np.rint(blocks / scale[:, None]), -7, 7) * scale[:, None]
        error = (weights * (restored - blocks) ** 2).sum(1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def _short(scale: Array) -> Array:
    """As float16 has it, so that kernels may keep it in two bytes; what would lose digits there stays as it is."""
    fits = (scale >= _SMALLEST_HALF) & (scale < LARGEST_HALF)
    return np.where(fits, np.where(fits, scale, 1).astype(np.float16).astype(np.float32), scale)


def _scaled(
    model: ir.Model, targets: Sequence[Target], energies: dict[str, Array], config: Int4Weights
) -> list[Target]:
    """Targets with the channels of x divided, and the weights multiplied, by what makes their rounding err least."""
    for x in {target.x: None for target in targets if target.name in energies}:
        readers = [target for target in targets if target.x is x and target.name in energies]
        energy = energies[readers[0].name]
        if len(energy) == readers[0].array.shape[readers[0].sum_axis]:
            divide_and_multiply(x, readers, _factors(readers, energy, config.block))
    named = {target.name for target in targets}
    return [target for target in nodes.targets(model) if target.name in named]


def _factors(readers: Sequence[Target], energy: Array, block: int) -> Array:
    """energy^(a / 2), scaled to a geometric mean of 1, with the a of least error over all readers."""
    magnitude = np.sqrt(np.maximum(energy, _SMALLEST**2))
    offers = [(magnitude**a / np.exp(np.log(magnitude**a).mean())).astype(np.float32) for a in _STRENGTHS]
    errors = [sum(_error(reader, factors, energy, block) for reader in readers) for factors in offers]
    return offers[int(np.argmin(errors))]


def _error(reader: Target, factors: Array, energy: Array, block: int) -> float:
    """Expected square of x @ (restored weight - weight), channels taken as independent."""
    column = (-1, 1) if reader.sum_axis == 0 else (1, -1)
    enlarged = reader.array * factors.reshape(column)
    whole, scale = rounded(enlarged, reader.sum_axis, block)
    spread = np.repeat(scale, block, reader.sum_axis).take(np.arange(len(factors)), reader.sum_axis)
    apart = (whole * spread - enlarged) / factors.reshape(column)
    return float((energy.reshape(column) * apart**2).sum())

"""What a direct convolution is made of: channel blocks, panels of packed weights, tiles of a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.kernels.cpu.conv_window import Axis, Tile, conv_axes, flattened, tiles_of
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, ceil_div, product

Array = np.ndarray[Any, Any]
STEPS_PER_ITEM = 1 << 14  # multiply-add vectors that make a work item worth its decoding
EDGE_LIMIT = 1500  # multiply-adds written out for the clipped ends of a row; beyond, they take the loop for any size


@dataclass(frozen=True)
class Direct:
    """One convolution as the generator sees it; counts are per group.

    `block` input channels lie side by side in memory; `element` is the bytes of an element of x, `tap` those of the
    packed weights of one panel, input block and tap."""

    axes: tuple[Axis, ...]
    batch: Extent
    groups: int
    inputs: int
    outputs: int
    block: int
    lanes: int
    columns: int
    vectors: int
    tap: int
    element: int = 4
    accumulator: str = "float"

    @property
    def input_blocks(self) -> int:
        """Blocks of input channels per group."""
        return -(-self.inputs // self.block)

    @property
    def output_blocks(self) -> int:
        """Channel vectors of the output per group."""
        return -(-self.outputs // self.lanes)

    @property
    def panels(self) -> int:
        """Groups of `vectors` channel vectors, over all groups."""
        return self.groups * self.panels_per_group

    @property
    def panels_per_group(self) -> int:
        """Groups of `vectors` channel vectors per group."""
        return -(-self.output_blocks // self.vectors)

    @property
    def width(self) -> int:
        """Output channels of a panel."""
        return self.vectors * self.lanes

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps per axis."""
        return tuple(axis.kernel for axis in self.axes)

    @property
    def row(self) -> Axis:
        """The last axis."""
        return self.axes[-1]

    @property
    def outer(self) -> tuple[Axis, ...]:
        """All axes but the last."""
        return self.axes[:-1]

    @property
    def panel_bytes(self) -> int:
        """Packed weights of one panel."""
        return self.input_blocks * math.prod(self.kernel) * self.tap

    @property
    def steps_per_tile(self) -> int:
        """Multiply-adds of vectors that make one tile."""
        return self.columns * self.vectors * self.inputs * max(math.prod(self.kernel), 1)

    @property
    def unroll(self) -> int:
        """Channels per loop iteration: a power of two that divides every block's channel count."""
        return math.gcd(self.block, self.inputs % self.block or self.block, 4)

    @property
    def steps(self) -> tuple[Extent, ...]:
        """Bytes of x from one channel block to the next, then from one position to the next along each axis."""
        inner: list[Extent] = [self.block * self.element]
        for axis in reversed(self.axes):
            inner.append(product((inner[-1], axis.input)))
        return tuple(reversed(inner))

    @property
    def output_area(self) -> Extent:
        """Output pixels of one channel."""
        return product(axis.extent for axis in self.axes)

    def tap_bytes(self, axis: int) -> int:
        """Packed weights from a tap to the next along a spatial axis."""
        return math.prod(self.kernel[axis + 1 :]) * self.tap


def direct_of(node: Node, isa: Isa, columns: int = 1, vectors: int = 1) -> Direct:
    """The node's convolution; its input port's layout says how channels lie in memory."""
    outputs, inputs, *kernel = (int(size) for size in node.input(1).shape)
    groups = node.attributes["group"]
    axes = conv_axes(node, kernel)
    block = isa.lanes if node.input(0).layout == "blocked" else 1
    per_group = outputs // groups
    tap = block * vectors * isa.lanes * 4
    counts = groups, inputs, per_group, block, isa.lanes
    return Direct(flattened(axes), node.output.shape[0], *counts, columns, vectors, tap)


def pack_weights(weight: Array, shape: Direct) -> Array:
    """w[O, I/g, *K] → [panel][I/block][*K][block][vectors·lanes], zeros where channels do not exist."""
    taps, blocks = math.prod(shape.kernel), shape.input_blocks
    rows = shape.panels_per_group * shape.width
    padded = weight.reshape(shape.groups, shape.outputs, shape.inputs, taps)
    if (rows, blocks * shape.block) != (shape.outputs, shape.inputs):
        padded = np.zeros((shape.groups, rows, blocks * shape.block, taps), weight.dtype)
        padded[:, : shape.outputs, : shape.inputs] = weight.reshape(shape.groups, shape.outputs, shape.inputs, taps)
    split = padded.reshape(shape.panels, shape.width, blocks, shape.block, taps)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 3, 1))


@dataclass(frozen=True)
class RowPlan:
    """How a row (or a flattened map) splits: tiles with clipped taps at its ends, `count` whole tiles from `first` on,
    `group` of them a work item. Where the ends are not spelled out, single columns with computed taps replace them."""

    left: tuple[Tile, ...]
    right: tuple[Tile, ...]
    first: int
    count: Extent
    group: int
    spelled: bool

    @property
    def items(self) -> Extent:
        """Work items of a row."""
        count = ceil_div(self.count, self.group)
        return max(count, 1) if isinstance(count, int) else f"max({count}, 1)"


def row_plan(shape: Direct) -> RowPlan:
    """The row of a convolution cut into tiles of its `columns`."""
    group = max(1, round(STEPS_PER_ITEM / shape.steps_per_tile))
    if isinstance(shape.row.output, int) and isinstance(shape.row.input, int):
        tiles = tiles_of(shape.row, shape.columns)
        whole = [i for i, tile in enumerate(tiles) if tile.whole and tile.width == shape.columns]
        first, last = (whole[0], whole[-1] + 1) if whole else (len(tiles), len(tiles))
        left, right = tuple(tiles[:first]), tuple(tiles[last:])
        if _spelled_size(shape, (*left, *right)) <= EDGE_LIMIT:
            return RowPlan(left, right, first * shape.columns, last - first, group, True)
    first, count = _inside(shape.row, shape.columns)
    return RowPlan((), (), first, count, group, False)


def _spelled_size(shape: Direct, tiles: tuple[Tile, ...]) -> int:
    bodies = sum(len(set(tile.taps)) * tile.width for tile in tiles)
    return bodies * shape.vectors * shape.unroll


def _inside(row: Axis, columns: int) -> tuple[int, Extent]:
    """First column whose taps all lie inside, and how many whole tiles follow."""
    first = max(-(-row.begin // row.stride), 0)
    reach = (row.kernel - 1) * row.dilation - row.begin
    if isinstance(row.input, int) and isinstance(row.output, int):
        last = min((row.input - 1 - reach) // row.stride + 1, row.output)
        return first, max(last - first, 0) // columns
    last_text = f"min(({row.input}-{reach + 1})//{row.stride}+1, {row.output})".replace("--", "+")
    return first, f"max({last_text}-{first}, 0)//{columns}"

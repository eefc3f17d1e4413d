"""Matrix products in tile registers (Intel AMX): eight registers of 16 rows by 64 bytes.

Four of them hold the sums of 32 rows by 32 columns, two the rows, two the packed weights; one instruction adds 16 × 16
sums of 32 products of bfloat16, or 64 of bytes, each. Measured here on one core: 2,500 GFLOP/s in bfloat16 (3,400 with
zeros, which heat less) where vectors of float32 reach 170 to 240. Source: Intel 64 and IA-32 Architectures Software
Developer's Manual, TDPBF16PS.

float32 is multiplied as two bfloat16 parts, x = high + low (16 bits of mantissa): high·high + high·low + low·high,
which leaves out low·low and what lies below: 2^-16 of the magnitudes multiplied. Infinities become NaN. Where the build
allows bfloat16 it is rounded to one part, a third of the work for 2^-8 of the magnitudes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.kernels.cpu.build import Handle, PhaseFunction
from ingot.kernels.cpu.llvm import Function, Index, Value
from ingot.plan.extent import Extent, ceil_div

Array = np.ndarray[Any, Any]
ROWS, COLUMNS, ROW_BYTES = 16, 16, 64
TILE_BYTES = ROWS * ROW_BYTES
TALLEST = 2 * ROWS
SECOND_CACHE = 2  # LLVM's word for how near a prefetch shall bring a line
SUMS, LEFT, RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)  # registers: of [16 rows][16 columns], of rows, of columns


@dataclass(frozen=True)
class TileDot:
    """`instruction` adds products of `group` values of K to each sum; `parts` bfloat16 numbers stand for one value, one
    alone for a weight where these are `exact`."""

    instruction: str
    group: int
    parts: int = 1
    source: int = 1  # bytes of x for each byte of a part
    exact: bool = False

    @property
    def depth(self) -> int:
        """Values of K in a step: what one tile holds."""
        return ROWS * self.group

    @property
    def right_parts(self) -> int:
        """Numbers that stand for a weight."""
        return 1 if self.exact else self.parts

    @property
    def right_bytes(self) -> int:
        """Bytes of a step of packed weights for 16 columns."""
        return TILE_BYTES * self.right_parts

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(part of the rows, part of the weights) in the order that reloads least."""
        if self.parts == 1:
            return ((0, 0),)
        return ((0, 0), (1, 0)) if self.exact else ((0, 1), (0, 0), (1, 0))


BFLOAT16 = TileDot("tdpbf16ps", 2)
SPLIT = TileDot("tdpbf16ps", 2, parts=2, source=2)
ROUNDED = TileDot("tdpbf16ps", 2, source=2)
HALVED = TileDot("tdpbf16ps", 2, parts=2, source=2, exact=True)  # rows of float32, weights that are bfloat16
BYTES = TileDot("tdpbusd", 4)


@dataclass(frozen=True)
class TileGemm:
    """`rows` by `columns` over `steps` tiles of K: blocks of `height` rows (16 or 32) by `wide` × 16 columns."""

    dot: TileDot
    rows: Extent
    columns: Extent
    steps: int
    height: int
    wide: int
    depth: int  # tiles of K after which the next block of rows has its turn: their weights stay in the first cache
    run: int  # blocks of rows that share a panel of weights

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.wide * COLUMNS

    @property
    def panels(self) -> Extent:
        """Panels of columns."""
        return ceil_div(self.columns, self.width)

    @property
    def blocks(self) -> Extent:
        """Blocks of rows."""
        return ceil_div(self.rows, self.height)

    @property
    def step_bytes(self) -> int:
        """Packed weights of a step of a panel."""
        return self.wide * self.dot.right_bytes

    @property
    def panel_bytes(self) -> int:
        """Packed weights of a panel."""
        return self.steps * self.step_bytes

    @property
    def groups(self) -> Extent:
        """Groups of blocks that share a panel."""
        return ceil_div(self.blocks, self.run)

    @property
    def share(self) -> int:
        """Bytes of the next part of the weights that a block fetches in a step, so that its group fetches all."""
        return -(-self.step_bytes // (self.run * ROW_BYTES)) * ROW_BYTES

    @property
    def slot_bytes(self) -> int:
        """Scratch for a block's sums, a row after the other."""
        return TALLEST * self.wide * ROW_BYTES


# registers


def configuration() -> Array:
    """What ldtilecfg reads: rows and bytes per row of every register, here all there are."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32:2], config[48:56] = ROW_BYTES, ROWS
    return config


def configure(f: PhaseFunction, handle: Handle) -> None:
    """Shape the registers by a packed configuration."""
    f.intrinsic("llvm.x86.ldtilecfg", "void", f.pointer(handle))


def release(f: Function) -> None:
    """Give the registers back, so that a change of threads need not save them."""
    f.intrinsic("llvm.x86.tilerelease", "void")


def _number(f: Function, register: int) -> Value:
    return Value(f, "i8", str(register))


def load(f: Function, register: int, pointer: Value, offset: Index, stride: Index) -> None:
    """16 rows of 64 bytes, `stride` bytes from row to row."""
    f.intrinsic("llvm.x86.tileloadd64", "void", _number(f, register), f.at(pointer, offset), f.index(stride))


def store(f: Function, register: int, pointer: Value, offset: Index, stride: Index) -> None:
    """A register as 16 rows of 64 bytes, `stride` bytes from row to row."""
    f.intrinsic("llvm.x86.tilestored64", "void", _number(f, register), f.at(pointer, offset), f.index(stride))


def add_product(f: Function, instruction: str, top: int, j: int) -> None:
    """The products of 16 rows by 16 columns that are loaded, to their sums."""
    registers = (SUMS[2 * top + j], LEFT[top], RIGHT[j])
    f.intrinsic(f"llvm.x86.{instruction}", "void", *(_number(f, r) for r in registers))


# products


def multiply(f: Function, gemm: TileGemm, left: Value, group_bytes: int, right: Value, steps: Index, slot: Value,
             started: bool, ahead: Value) -> None:  # fmt: skip
    """Sums of a block to `slot`: packed rows at `left`, 16 to a group, times packed weights at `right`, `steps` tiles
    of K; `started`: the slot holds sums already. Weights from `ahead` on are fetched meanwhile."""
    tops = gemm.height // ROWS
    begin(f, tops, gemm.wide, slot if started else None)
    groups = [f.at(left, top * group_bytes) for top in range(tops)]

    def step(_: Value, *pointers: Value) -> list[Value]:
        *tall, weights, far = pointers
        add_products(f, gemm.dot, gemm.wide, Rows(tall, TILE_BYTES, ROW_BYTES), weights, far, gemm.share)
        moved = [f.at(pointer, gemm.dot.parts * TILE_BYTES) for pointer in tall]
        return [*moved, f.at(weights, gemm.step_bytes), f.at(far, gemm.share)]

    f.loop(0, steps, step, [*groups, right, ahead])
    end(f, tops, gemm.wide, slot)


def places(tops: int, wide: int) -> Iterator[tuple[int, int]]:
    """(register, its place in a slot) of every tile of sums."""
    for top in range(tops):
        yield from ((SUMS[2 * top + j], (top * ROWS * wide + j) * ROW_BYTES) for j in range(wide))


def begin(f: Function, tops: int, wide: int, slot: Value | None) -> None:
    """Sums from a slot, or zero."""
    for register, place in places(tops, wide):
        if slot is None:
            f.intrinsic("llvm.x86.tilezero", "void", _number(f, register))
        else:
            load(f, register, slot, place, wide * ROW_BYTES)


def begin_alike(f: Function, tops: int, wide: int, row: Value) -> None:
    """All rows of sums from one, [tile of columns][16]."""
    for top in range(tops):
        for j in range(wide):
            load(f, SUMS[2 * top + j], row, j * ROW_BYTES, 0)


def end(f: Function, tops: int, wide: int, slot: Value) -> None:
    """Sums to a slot: [row][tile of columns][16]."""
    for register, place in places(tops, wide):
        store(f, register, slot, place, wide * ROW_BYTES)


@dataclass(frozen=True)
class Rows:
    """Where the rows of a step lie: a pointer per 16 of them, bytes from part to part and from row to row."""

    pointers: Sequence[Value]
    part_bytes: int
    pitch: int


def add_products(f: Function, dot: TileDot, wide: int, rows: Rows, weights: Value, far: Value, share: int) -> None:
    """The products of one tile of K. A register is loaded right before its first use, while products of others run; so
    are `share` bytes prefetched from `far` on, spread, since in a burst they would fill the line buffers."""
    lines = range(0, share, ROW_BYTES)
    order = list(_product_order(dot, wide, len(rows.pointers)))
    held: dict[int, tuple[int, int]] = {}
    for number, (part, other, top, j) in enumerate(order):
        if held.get(RIGHT[j]) != (other, j):
            load(f, RIGHT[j], weights, (other * wide + j) * TILE_BYTES, ROW_BYTES)
        if held.get(LEFT[top]) != (part, top):
            load(f, LEFT[top], rows.pointers[top], part * rows.part_bytes, rows.pitch)
        held |= {RIGHT[j]: (other, j), LEFT[top]: (part, top)}
        add_product(f, dot.instruction, top, j)
        for line in lines[len(lines) * number // len(order) : len(lines) * (number + 1) // len(order)]:
            f.prefetch(far, line, SECOND_CACHE)


def _product_order(dot: TileDot, wide: int, tops: int) -> Iterator[tuple[int, int, int, int]]:
    """(part of the rows, part of the weights, upper or lower rows, tile of columns): those that share what was loaded
    last follow each other."""
    previous = None
    for part, other in dot.products:
        pairs = [(top, j) for j in range(wide) for top in range(tops)]
        if previous is not None and previous[0] != part:
            pairs = [(top, j) for top in range(tops) for j in range(wide)]
        yield from ((part, other, top, j) for top, j in pairs)
        previous = (part, other)


# packed weights


def pack_tiles(weight: Array, dot: TileDot, wide: int) -> Array:
    """w[K, N] → [panel, step, part, tile, 16 groups of K, 16 columns, group], zeros where there is no weight."""
    depth, columns = weight.shape
    steps, panels = -(-depth // dot.depth), -(-columns // (wide * COLUMNS))
    parts = split(weight) if dot.parts == 2 else (rounded(weight),) if weight.dtype == np.float32 else (weight,)
    made = np.zeros((panels, steps, len(parts), wide, ROWS, COLUMNS, dot.group), parts[0].dtype)
    for number, part in enumerate(parts):
        padded = part
        if part.shape != (steps * dot.depth, panels * wide * COLUMNS):
            padded = np.zeros((steps * dot.depth, panels * wide * COLUMNS), part.dtype)
            padded[:depth, :columns] = part
        cut = padded.reshape(steps, ROWS, dot.group, panels, wide, COLUMNS)
        made[:, :, number] = cut.transpose(3, 0, 4, 1, 5, 2)
    return made


def split(x: Array) -> tuple[Array, Array]:
    """float32 as the bits of two bfloat16 numbers whose sum it nearly is."""
    high = rounded(x)
    rest = x - (high.astype(np.uint32) << 16).view(np.float32)
    return high, rounded(rest)


def rounded(x: Array) -> Array:
    """Bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)

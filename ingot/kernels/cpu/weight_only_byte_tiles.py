"""Integer weights times rows in bytes by tile registers (AMX), for many rows where rounding to eight bits is allowed.

A block of 128 numbers along K has one scale for each row and one for each column, so that integers add up its products
without loss. Weights need no conversion where they have one scale for a block and fit in a signed byte; those of
several groups are rounded to what has the scale of the largest. While tiles multiply a block, vectors scale the sums of
the one before, line by line in between: one after the other takes as long as both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm import Gemm, Tile
from ingot.kernels.cpu.gemm_dot import bfloat16_dot
from ingot.kernels.cpu.gemm_epilogue import RowEpilogue, finish_tile
from ingot.kernels.cpu.gemm_tiles import (
    COLUMNS,
    LEFT,
    RIGHT,
    ROW_BYTES,
    ROWS,
    TALLEST,
    TILE_BYTES,
    add_product,
    begin,
    configuration,
    configure,
    load,
    places,
    release,
    store,
)
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.cpu.weight_only_byte_unpack import ByteWeights, unpack
from ingot.kernels.cpu.weight_only_bytes import TILES, ByteRows, byte_rows
from ingot.kernels.cpu.weight_only_pack import Digits, Weights
from ingot.kernels.cpu.weight_only_product import PackedWeights
from ingot.plan.extent import Extent, ceil_div, product

_FLOATS, _INTEGERS = "<16 x float>", "<16 x i32>"
_PART = 4  # blocks of K whose weights and rows, 16 KB each, stay in the first cache
_KEPT_ROWS = 512  # whose sums wait in scratch
_MOST_PANELS = 8  # that share the reading of x
_FEWEST_BUNDLES = 16  # where there are as many panels: threads take whole ones, so that weights are unpacked once


@dataclass(frozen=True, eq=False)
class _Job:
    weights: ByteWeights
    x: ByteRows
    rows: Extent
    epilogue: RowEpilogue
    like: Gemm
    shape: Handle
    run: int  # blocks of rows whose sums wait
    bundle: int  # panels that x passes together
    part: int  # blocks of K that are made tiles at a time
    tiles: int
    slots: int
    sums: int
    nothing: int

    @property
    def slot_bytes(self) -> int:
        """Sums of a block of rows by a panel."""
        return self.x.height * self.weights.wide * ROW_BYTES

    @property
    def part_bytes(self) -> int:
        """A part of a panel as tiles."""
        return self.part * self.weights.block_bytes

    @property
    def panels(self) -> int:
        return -(-self.weights.weights.columns // (self.weights.wide * COLUMNS))

    @property
    def bundles(self) -> int:
        return -(-self.panels // self.bundle)


def multiply_bytes(build: KernelBuilder, weights: Weights, digits: Digits, stored: PackedWeights, rows: Extent,
                   count: Extent, epilogue: RowEpilogue, runs: Extent = 1) -> None:  # fmt: skip
    """Phases: epilogue(x[rows, K] @ weights[K, N]) of input 0, where `runs` is 1 and count is rows; nothing where both
    are 0."""
    height = ROWS if isinstance(rows, int) and rows <= ROWS else TALLEST
    x = byte_rows(build, weights.depth, rows, count, height)
    wide = 2 if stored.vectors % 2 == 0 else 1
    run = _KEPT_ROWS // height if isinstance(rows, str) else max(min(-(-rows // height), _KEPT_ROWS // height), 1)
    bundle = min(-(-weights.columns // (wide * COLUMNS * _FEWEST_BUNDLES)), _MOST_PANELS)
    part = -(-x.blocks // -(-x.blocks // _PART))
    made = ByteWeights(weights, digits, stored, wide)
    slot = height * wide * ROW_BYTES
    job = _Job(
        made, x, rows, epilogue, Gemm(bfloat16_dot(build.isa), Tile(height, wide), rows, weights.columns, 1, 1, 1),
        build.pack(configuration()), run, bundle, part, build.scratch(part * made.block_bytes * bundle),
        build.scratch(slot * run * bundle), build.scratch(2 * slot), build.scratch(slot),
    )  # fmt: skip

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        configure(f, job.shape)
        f.loop(begin, end, lambda number: _visit(f, job, number))
        release(f)

    build.phase(product((runs, ceil_div(rows, height * run), job.bundles)), body)


@dataclass(frozen=True, eq=False)
class _Area:
    """Blocks of rows [first, last) by `panels` panels from `panel` on."""

    first: Value
    last: Value
    panel: Value
    panels: Value


def _visit(f: PhaseFunction, job: _Job, number: Value) -> None:
    """Rows whose sums wait, by a bundle of panels: part of K for part, then what the epilogue makes of them."""
    group, bundle = f.index(f.divide(number, job.bundles)), f.index(f.remainder(number, job.bundles))
    first, panel = group * job.run, bundle * job.bundle
    last = f.minimum(first + job.run, f.index(f.extent(ceil_div(job.rows, job.x.height))))
    area = _Area(first, f.index(last), panel, f.index(f.minimum(job.bundle, job.panels - panel)))
    _each(f, job, area, lambda _, __, slot: _clear(f, job, slot))
    f.loop(0, job.x.blocks, lambda block: _multiply_part(f, job, area, block), step=job.part)

    def finish(index: Value, panel: Value, slot: Value) -> None:
        row = index * job.x.height
        there = f.minimum(job.x.height, f.index(f.extent(job.rows)) - row)
        finish_tile(f, job.like, job.epilogue, job.like.tile, row, area.panel + panel, None, slot, there)

    _each(f, job, area, finish)


def _each(f: PhaseFunction, job: _Job, area: _Area, act: Callable[[Value, Value, Value], None]) -> None:
    """act(block of rows, panel of the area, its slot) for all."""

    def block(index: Value) -> None:
        f.loop(0, area.panels, lambda p: act(index, p, _slot(f, job, area, index, p)))

    f.loop(area.first, area.last, block)


def _slot(f: PhaseFunction, job: _Job, area: _Area, block: Value, panel: Value) -> Value:
    return f.at(f.scratch, ((block - area.first) * job.bundle + panel) * job.slot_bytes + job.slots)


def _clear(f: PhaseFunction, job: _Job, slot: Value) -> None:
    zero = f.constant(_FLOATS, 0.0)
    for place in range(0, job.slot_bytes, ROW_BYTES):
        f.store(zero, slot, place)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """Sums of a block that wait to be scaled and added to a slot: `sums` as integers; `other` is free for the next."""

    sums: Value
    other: Value
    slot: Value
    columns: Value  # scales of columns
    rows: Value  # of rows

    @property
    def state(self) -> list[Value]:
        return [self.sums, self.other, self.slot, self.columns, self.rows]


def _multiply_part(f: PhaseFunction, job: _Job, area: _Area, block: Value) -> None:
    """Blocks of K from `block` on, `job.part` of them, by all rows and panels."""
    weights, x, tiles = job.weights, job.x, f.at(f.scratch, job.tiles)
    last = f.index(f.minimum(block + job.part, x.blocks))
    f.loop(0, area.panels, lambda p: unpack(f, weights, area.panel + p, block, last, f.at(tiles, p * job.part_bytes)))
    sums, nothing = f.at(f.scratch, job.sums), f.at(f.scratch, job.nothing)
    waiting = _Waiting(sums, f.at(sums, job.slot_bytes), nothing, f.at(tiles, weights.scales), nothing)

    def rows(index: Value, *state: Value) -> tuple[Value, ...]:
        group = f.at(f.pointer(x.handle), index * x.bytes)
        begin, end = x.begins(f, group, block), x.begins(f, group, last)

        def panel(p: Value, *state: Value) -> tuple[Value, ...]:
            slot, right = _slot(f, job, area, index, p), f.at(tiles, p * job.part_bytes)

            def entry(number: Value, *state: Value) -> list[Value]:
                left, before = x.entry(f, group, number), _Waiting(*state)
                place = f.cast("sext", f.load("i32", left, x.number), "i64") - block
                these = f.at(right, place * weights.block_bytes)
                _multiply(f, job, left, these, before)
                scales = f.at(these, weights.scales), f.at(left, x.scales)
                return _Waiting(before.other, before.sums, slot, *scales).state

            return f.loop(begin, end, entry, state)

        return f.loop(0, area.panels, panel, state)

    _add(f, job, _Waiting(*f.loop(area.first, area.last, rows, waiting.state)), 0, x.height)


def _multiply(f: PhaseFunction, job: _Job, left: Value, right: Value, waiting: _Waiting) -> None:
    """A block's products to `waiting.other`, while what waits is added."""
    tops, wide = job.x.tops, job.weights.wide
    begin(f, tops, wide, None)
    order = [(k, top, j) for k in range(TILES) for top in range(tops) for j in range(wide)]
    share, done = job.x.height // len(order), iter(_stores(f, job, waiting.other))
    for number, (k, top, j) in enumerate(order):
        if j == 0:
            load(f, LEFT[top], left, (top * TILES + k) * TILE_BYTES, ROW_BYTES)
        if top == 0:
            load(f, RIGHT[j], right, (k * wide + j) * TILE_BYTES, ROW_BYTES)
        add_product(f, "tdpbssd", top, j)
        _add(f, job, waiting, number * share, (number + 1) * share)
        if number > len(order) - tops * wide:
            next(done)
    next(done, None)


def _stores(f: PhaseFunction, job: _Job, target: Value) -> Iterator[None]:
    """Sums to [row][tile of columns][16], a register at a time."""
    wide = job.weights.wide
    for register, place in places(job.x.tops, wide):
        store(f, register, target, place, wide * ROW_BYTES)
        yield


def _add(f: PhaseFunction, job: _Job, waiting: _Waiting, first: int, last: int) -> None:
    """Rows [first, last) of what waits, scaled, to its slot."""
    wide = job.weights.wide
    columns = [f.load(_FLOATS, waiting.columns, j * ROW_BYTES) for j in range(wide)]
    for r in range(first, last):
        factor = f.splat(f.load("float", waiting.rows, r * 4), COLUMNS)
        for j in range(wide):
            place = (r * wide + j) * ROW_BYTES
            whole = f.cast("sitofp", f.load(_INTEGERS, waiting.sums, place), "float")
            f.store(f.fma(whole, columns[j] * factor, f.load(_FLOATS, waiting.slot, place)), waiting.slot, place)

"""Integer weights by tile registers, for many rows: a part of a panel becomes bfloat16 in the first cache, then all
rows pass it.

In two parts products of x and weights are within 2^-15; weights that are not scaled before are exact in one part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm import Gemm, Tile
from ingot.kernels.cpu.gemm_dot import bfloat16_dot
from ingot.kernels.cpu.gemm_epilogue import RowEpilogue, finish_tile
from ingot.kernels.cpu.gemm_plan import known
from ingot.kernels.cpu.gemm_tiles import (
    COLUMNS,
    ROWS,
    TALLEST,
    TILE_BYTES,
    TileDot,
    TileGemm,
    configuration,
    configure,
    multiply,
    release,
)
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.tile_rows import TileRows
from ingot.kernels.cpu.weight_only_groups import Products, add_groups, scale_all, scaled_together
from ingot.kernels.cpu.weight_only_pack import Digits, Weights
from ingot.kernels.cpu.weight_only_product import PackedWeights
from ingot.kernels.cpu.weight_only_unpack import Job, in_groups, table_of, unpack
from ingot.plan.extent import Extent, ceil_div, product

_PARTS_BYTES = 16 << 10  # of a panel's part as tiles: it stays in the first cache beside the rows that pass
_KEPT_ROWS = 512  # whose sums wait in scratch
_GROUPED_BYTES = 4 << 10  # the same of narrow panels, of which several pass beside each other
_MOST_PANELS = 8  # that share the reading of x
_FEWEST_BUNDLES = 8  # where there are as many panels: threads take whole ones, so that weights are unpacked once


def multiply_tiles(build: KernelBuilder, weights: Weights, digits: Digits, stored: PackedWeights, dot: TileDot,
                   x: TileRows, rows: Extent, epilogue: RowEpilogue, runs: Extent = 1) -> None:  # fmt: skip
    """A phase: epilogue(x[rows, K] @ weights[K, N]) where `runs` is 1; nothing where it is 0."""
    grouped = dot.exact and in_groups(weights)
    wide = 2 if stored.vectors % 2 == 0 and not grouped else 1
    height = ROWS if grouped or (isinstance(rows, int) and rows <= ROWS) else TALLEST
    steps = -(-weights.depth // dot.depth)
    most = _GROUPED_BYTES // dot.right_bytes if grouped else _PARTS_BYTES // (wide * dot.right_bytes)
    alike = scaled_together(weights, dot, most) if grouped else 1
    parts = -(-steps // most)
    depth = alike * -(-steps // (parts * alike))
    run = max(min(known(ceil_div(rows, height)), _KEPT_ROWS // height), 1)
    together = min(-(-weights.columns // (wide * COLUMNS * _FEWEST_BUNDLES)), _MOST_PANELS)
    gemm = TileGemm(dot, rows, weights.columns, steps, height, wide, depth, together)
    like = Gemm(bfloat16_dot(build.isa), Tile(height, wide), rows, weights.columns, steps, steps, 1)
    job = Job(
        weights, digits, stored, gemm, like, x, epilogue, build.pack(configuration()), run,
        build.scratch(gemm.slot_bytes * run * gemm.run), build.scratch(depth * gemm.step_bytes * gemm.run),
        table_of(build, weights, digits, dot), build.scratch(2 * TILE_BYTES), alike,
    )  # fmt: skip

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        configure(f, job.shape)
        last = f.divide(end + (run - 1), run)
        f.loop(f.divide(begin, run), last, lambda number: _visit(f, job, number, begin, end))
        release(f)

    build.phase(product((runs, ceil_div(gemm.blocks, run), job.bundles, run)), body, grain=run)


def _visit(f: PhaseFunction, job: Job, number: Value, begin: Value, end: Value) -> None:
    """The blocks of rows among items [begin, end) of a bundle of panels: part of K for part."""
    gemm, run = job.gemm, job.run
    limit = f.index(f.extent(gemm.blocks))
    group, bundle = f.index(f.divide(number, job.bundles)), f.index(f.remainder(number, job.bundles))
    first = group * run + f.maximum(begin - number * run, 0)
    last = f.index(f.minimum(group * run + f.minimum(end - number * run, run), limit))
    panel = bundle * job.bundle
    part = _Part(panel, f.index(f.minimum(job.bundle, job.panels - panel)), first, last, group * run)
    if gemm.depth >= gemm.steps:
        _multiply_part(f, job, part, f.index(0), gemm.steps, False, lambda finish: finish())
        return
    _multiply_part(f, job, part, f.index(0), gemm.depth, False, lambda finish: None)

    def later(tile: Value) -> None:
        count = f.minimum(gemm.depth, f.index(gemm.steps) - tile)
        is_last = f.compare("sge", tile + gemm.depth, gemm.steps)
        _multiply_part(f, job, part, tile, count, True, lambda finish: f.when(is_last, finish))

    f.loop(gemm.depth, gemm.steps, later, step=gemm.depth)


@dataclass(frozen=True, eq=False)
class _Part:
    """`panels` panels from `panel` on, blocks of rows [first, last), of which `kept` has the first slot."""

    panel: Value
    panels: Value
    first: Value
    last: Value
    kept: Value


def _multiply_part(f: PhaseFunction, job: Job, part: _Part, tile: Value, count: Index, started: bool,
                   final: Callable[[Callable[[], None]], object]) -> None:  # fmt: skip
    """The products of `count` tiles of K: all blocks of rows pass all panels, so that x comes once for several."""
    gemm, x = job.gemm, job.x
    tiles, panel_bytes = f.at(f.scratch, job.tiles), gemm.depth * gemm.step_bytes
    f.loop(0, part.panels, lambda p: unpack(f, job, part.panel + p, tile, count, f.at(tiles, p * panel_bytes)))

    def block(index: Value) -> None:
        row = index * gemm.height
        left = f.at(f.pointer(x.handle), row * (x.group_bytes // ROWS) + tile * (gemm.dot.parts * TILE_BYTES))
        there = f.minimum(gemm.height, f.index(f.extent(gemm.rows)) - row)

        def panel(p: Value) -> None:
            slot = f.at(f.scratch, ((index - part.kept) * job.bundle + p) * gemm.slot_bytes + job.slots)
            ahead = f.at(left, p * (gemm.share * gemm.depth) + (gemm.height // ROWS) * x.group_bytes)
            place, right = part.panel + p, f.at(tiles, p * panel_bytes)
            if job.grouped:
                add_groups(f, job, Products(place, left, right, ahead, tile, count), slot, started)
            else:
                multiply(f, gemm, left, x.group_bytes, right, count, slot, started, ahead)
            final(lambda: _finish(f, job, place, row, slot, there))

        f.loop(0, part.panels, panel)

    f.loop(part.first, part.last, block)


def _finish(f: PhaseFunction, job: Job, panel: Value, row: Value, slot: Value, there: Index) -> None:
    """What the epilogue makes of a block's sums, `there` rows of them."""
    if job.gemm.dot.exact and not job.grouped:
        scale_all(f, job, panel, slot)
    finish_tile(f, job.like, job.epilogue, job.like.tile, row, panel, None, slot, there)

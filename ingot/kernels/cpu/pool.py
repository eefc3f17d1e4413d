"""Pool in blocked layout, and Reduce over all spatial axes of blocked maps.

A pool is a convolution without weights: the same rows and tiles (conv_tile.py); a loaded pixel serves each window along
the row that holds it.
"""

from __future__ import annotations

import math

from ingot.dtypes import size_of
from ingot.ir.expression import Expression
from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import KernelBuilder
from ingot.kernels.cpu.conv_epilogue import Epilogue
from ingot.kernels.cpu.conv_shape import Direct
from ingot.kernels.cpu.conv_tile import Clip, Method, Row, Site, Sums, Taps, emit_phase, walk
from ingot.kernels.cpu.conv_window import Tile, balanced, conv_axes
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.pool_steps import can_pool, register_type, root, step_of
from ingot.kernels.cpu.render import load
from ingot.kernels.node import Node

WIDEST = 8  # columns of a tile
ASSUMED = 64  # positions along a symbolic axis, for estimates
CYCLES_PER_MICROSECOND = 2600
BYTES_PER_MICROSECOND = 15_000


def pool_shape(node: Node, isa: Isa) -> Direct:
    """The pool as a convolution within each channel block."""
    channels, dtype = node.output.shape[1], node.dtype
    assert isinstance(channels, int)
    axes, lanes = conv_axes(node, node.attributes["kernel"]), isa.lanes
    width = axes[-1].output
    columns = balanced(width, WIDEST) if isinstance(width, int) else WIDEST
    blocks = -(-channels // lanes)
    return Direct(axes, node.output.shape[0], blocks, lanes, lanes, lanes, lanes, max(columns, 1), 1, 0,
                  size_of(dtype), register_type(dtype))  # fmt: skip


def pool_cost(node: Node, cycles_per_tap: float) -> float:
    """Microseconds of one core: a few cycles for each vector and tap, or the bytes."""
    sizes = [size if isinstance(size, int) else ASSUMED for size in node.output.shape]
    read = [size if isinstance(size, int) else ASSUMED for size in node.input(0).shape]
    moved = (math.prod(sizes) + math.prod(read)) * size_of(node.dtype) / BYTES_PER_MICROSECOND
    taps = math.prod(sizes) / 16 * math.prod(node.attributes["kernel"])
    return 1 + max(taps * cycles_per_tap / CYCLES_PER_MICROSECOND, moved)


def _applies(node: Node, isa: Isa) -> bool:
    return len(node.outputs) == 1 and can_pool(node)


@kernel("Pool", on="cpu", when=_applies, cost=lambda node, isa: pool_cost(node, 3),
        layouts=lambda node, isa: (Ports(("blocked",), ("blocked",)),))  # fmt: skip
def pool_blocked(build: KernelBuilder, node: Node) -> None:
    """A work item is a run of tiles of one row of one channel block."""
    shape = pool_shape(node, build.isa)
    x, channels = build.input(0), shape.panels * shape.lanes
    epilogue = Epilogue(Expression(()), (), node.dtype, build.output(), node.dtype, channels, shape.lanes)
    emit_phase(build, shape, x, x, epilogue, _method(node), ("image", "panel", "row"))


def _method(node: Node) -> Method:
    step, dtype = step_of(node), node.dtype

    def initial(site: Site, row: Row, tile: Tile, clip: Clip) -> Sums:
        return [site.f.constant(site.type, step.start(dtype))] * tile.width

    def pixel(site: Site, x: Value, position: int) -> Value:
        return load(site.f, dtype, x, position * site.shape.lanes * site.shape.element, site.shape.lanes)

    def accumulate(site: Site, taps: Taps, sums: Sums) -> Sums:
        if taps.clip is None:
            return written_out(site, taps, sums)

        def tap(index: Index, x: Value, weights: Value, *sums: Value) -> Sums:
            return [step.take(site.f, dtype, sums[0], pixel(site, x, 0))]

        steps = site.shape.row.dilation * site.shape.lanes * site.shape.element, 0
        return walk(site.f, taps.clip, tap, (taps.x, taps.weights), steps, sums)

    def written_out(site: Site, taps: Taps, sums: Sums) -> Sums:
        row, result = site.shape.row, list(sums)
        loaded: dict[int, Value] = {}
        for place, column in sorted((column * row.stride + tap * row.dilation, column)
                                    for tap, columns in enumerate(taps.tile.taps) for column in columns):  # fmt: skip
            if place not in loaded:
                loaded[place] = pixel(site, taps.x, place)
            result[column] = step.take(site.f, dtype, result[column], loaded[place])
        return result

    def complete(site: Site, row: Row, tile: Tile, clip: Clip, sums: Sums) -> Sums:
        if node.attributes["kind"] == "lp":
            return [root(site.f, node, total) for total in sums]
        return _averages(site, node, row, tile, clip, sums) if node.attributes["kind"] == "average" else sums

    return Method(initial, accumulate, complete)


def _averages(site: Site, node: Node, row: Row, tile: Tile, clip: Clip, sums: Sums) -> Sums:
    """Each total divided by how many elements it sums, padding included or not."""
    f = site.f
    if node.attributes.get("count_include_pad", 0):
        count = float(math.prod(node.attributes["kernel"]))
        return [f.binary("fdiv", total, count) for total in sums]
    outer: Index = 1
    for first, last in row.taps:
        outer = outer * (last - first)
    along: list[Index] = [sum(column in columns for columns in tile.taps) for column in range(tile.width)]
    if clip is not None:
        along = [clip[1] - clip[0]]
    return [_divided(site, total, outer * count) for total, count in zip(sums, along, strict=True)]


def _divided(site: Site, total: Value, count: Index) -> Value:
    f = site.f
    if isinstance(count, int):
        return f.binary("fdiv", total, float(count))
    scalar = f.cast("sitofp", count, site.shape.accumulator)
    return f.binary("fdiv", total, f.splat(scalar, site.shape.lanes))

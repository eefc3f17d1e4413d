"""Conv, fp32, blocked output: direct convolution with a register tile of `columns` pixels × `vectors` channel vectors.

    y[n, o, row, column] = epilogue(Σ over i, taps of x[n, i, row·s − p + k·d, column·s − p + k·d] · w[o, i, k])

Weights are packed [O/(vectors·lanes)][I/block][*K][block][vectors·lanes]. A plain input is a blocked one with blocks of
one channel. There is no halo: taps of all axes but the last are clipped by loop bounds; tiles at the ends of a row have
their clipped taps written out for the columns that remain, so that padding costs nothing.
"""

from __future__ import annotations

import math
from functools import partial

from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import KernelBuilder
from ingot.kernels.cpu.conv_epilogue import can_finish, epilogue_of, extra_layouts, residuals
from ingot.kernels.cpu.conv_shape import Direct, direct_of, pack_weights
from ingot.kernels.cpu.conv_tile import Method, Order, Site, Sums, Taps, emit_phase, fetch_ahead, row_taps, walk, zeros
from ingot.kernels.cpu.conv_window import balanced, conv_axes, flattened
from ingot.kernels.cpu.gemm_dot import Product
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Function, Index, Value, vector
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

FLOAT, LINE = 4, 64  # bytes
PREFETCH = 4096  # bytes of weights ahead
FIRST_CACHE = 64 << 10  # bytes of a panel that is passed again and again without being fetched again
SMALL_CHANNELS = 8  # up to here a plain input is read as it is
ASSUMED = 64  # positions along a symbolic axis, for estimates
TILE_CYCLES = 60  # of a tile, beside its multiply-adds
CYCLES_PER_MICROSECOND = 2600
BYTES_PER_MICROSECOND = 40_000


# what applies and what it costs


def _applies(node: Node, isa: Isa) -> bool:
    x, weight = node.input(0), node.input(1)
    static = all(isinstance(size, int) for size in node.output.shape[1:2])
    floats = x.dtype == weight.dtype == "float32"
    return floats and static and weight.constant is not None and bool(_layouts(node, isa)) and can_finish(node, 2)


def _layouts(node: Node, isa: Isa) -> list[Ports]:
    outputs, inputs = (int(size) for size in node.input(1).shape[:2])
    groups = node.attributes["group"]
    if groups > 1 and (outputs // groups) % isa.lanes:
        return []
    extras = extra_layouts(node, 2)
    plain = [Ports(("plain", "", *extras), ("blocked",))] if inputs <= SMALL_CHANNELS else []
    blocked = groups == 1 or inputs % isa.lanes == 0
    return [*plain, *([Ports(("blocked", "", *extras), ("blocked",))] if blocked else [])]


# Widest tile for so many channel vectors, by registers: sums, weights and one broadcast fit (with 32 registers the
# broadcast may be an operand in memory).
WIDEST = {32: {1: 28, 2: 14, 3: 9, 4: 6, 6: 4}, 16: {1: 14, 2: 6, 3: 4, 4: 2}}
# Often as good or better: the widest spill at the ends of some loops.
NARROWER: dict[int, dict[int, tuple[int, ...]]] = {32: {1: (26,), 2: (13, 12)}, 16: {1: (12,)}}


def _vector_choices(node: Node, isa: Isa) -> tuple[int, ...]:
    return tuple(WIDEST[isa.registers])


def _column_choices(node: Node, isa: Isa) -> tuple[int, ...]:
    return tuple(sorted({width for v in WIDEST[isa.registers] for width in _widths(node, isa, v)}))


def _widths(node: Node, isa: Isa, vectors: int) -> set[int]:
    size = flattened(conv_axes(node, tuple(map(int, node.input(1).shape[2:]))))[-1].output
    return widths_for(size, isa, vectors)


def widths_for(size: Extent, isa: Isa, vectors: int) -> set[int]:
    """Tile widths worth trying for rows of `size`: as wide as the registers allow, equal parts, a divisor."""
    limit = WIDEST[isa.registers][vectors]
    if not isinstance(size, int) or size == 0:
        return {limit, *NARROWER[isa.registers].get(vectors, ())}
    divisors = [width for width in range(limit * 3 // 4, limit + 1) if size % width == 0]
    narrower = [width for width in NARROWER[isa.registers].get(vectors, ()) if width < size]
    return {min(limit, size), balanced(size, limit), *divisors[-1:], *narrower}


def _prune(node: Node, isa: Isa, vectors: int, columns: int) -> bool:
    return vectors > direct_of(node, isa).output_blocks or columns not in _widths(node, isa, vectors)


def cycles(shape: Direct, isa: Isa) -> float:
    """Cycles of one core for one image if nothing waits for memory."""
    *outer, last = (axis.output if isinstance(axis.output, int) else ASSUMED for axis in shape.axes)
    widths = [min(shape.columns, last - start) for start in range(0, last, shape.columns)]
    spills = shape.columns * shape.vectors + shape.vectors + 1 > isa.registers - isa.registers // 16
    step = sum(max(w * shape.vectors / 2, (w + shape.vectors) / 2, 4) for w in widths) * (1.25 if spills else 1)
    rows = shape.panels * math.prod(outer)
    return rows * (math.prod(shape.kernel) * shape.inputs * step + TILE_CYCLES * len(widths))


def _cost(node: Node, isa: Isa, vectors: int, columns: int) -> float:
    shape = direct_of(node, isa, columns, vectors)
    batch = shape.batch if isinstance(shape.batch, int) else 1
    weights = shape.panels * shape.panel_bytes
    return 1 + batch * cycles(shape, isa) / CYCLES_PER_MICROSECOND + weights / BYTES_PER_MICROSECOND


# the kernel


@kernel("Conv", on="cpu", when=_applies, layouts=_layouts, prune=_prune, cost=_cost, in_place=residuals,
        space={"vectors": _vector_choices, "columns": _column_choices})  # fmt: skip
def conv_direct(build: KernelBuilder, node: Node, vectors: int, columns: int) -> None:
    """A work item is a run of tiles of one row (or of the flattened map) for one panel of output channels."""
    shape = direct_of(node, build.isa, columns, vectors)
    weight = node.input(1).constant
    assert weight is not None
    x, packed = build.input(0), build.pack(pack_weights(weight, shape))
    emit_phase(build, shape, x, packed, epilogue_of(build, node, 2), DIRECT, direct_order(shape))


def direct_order(shape: Direct) -> Order:
    """All images for a panel of weights where those are the larger part, else all panels for a row of an image."""
    image = product((shape.inputs * shape.groups * shape.element, *(axis.input for axis in shape.axes)))
    large = isinstance(image, int) and shape.panels * shape.panel_bytes > image
    return ("panel", "image", "row") if large else ("image", "row", "panel")


def accumulate(site: Site, taps: Taps, sums: Sums, multiply: Product) -> Sums:
    """All channels of an input block at every tap along the row; the last block may hold fewer."""
    f, shape = site.f, site.shape
    tail, last = shape.inputs % shape.block, shape.input_blocks - 1
    count: Index = tail if tail and last == 0 else shape.block
    if tail and last:
        count = f.select(f.compare("eq", f.index(taps.block), last), f.index(tail), shape.block)

    def at_tap(columns: range, x: Value, weights: Value, sums: Sums) -> Sums:
        def channels(first: Index, x: Value, weights: Value, *sums: Value) -> Sums:
            result: Sums = sums
            if taps.ahead is not None:
                fetch_ahead(f, taps, site, weights, shape.unroll * shape.width * FLOAT // LINE)
            for channel in range(shape.unroll):
                result = _multiply(site, columns, (x, weights), channel, result, multiply)
            return result

        return walk(f, (0, count), channels, (x, weights), (FLOAT, shape.width * FLOAT), sums, by=shape.unroll)

    return row_taps(site, taps, sums, at_tap)


def _multiply(site: Site, columns: range, pointers: tuple[Value, Value], channel: int, sums: Sums,
              multiply: Product) -> Sums:  # fmt: skip
    """sums[column, v] += x[column, channel] · weights[channel, v]"""
    f, shape, (x, weights) = site.f, site.shape, pointers
    result, base = list(sums), channel * shape.width * FLOAT
    places = [base + v * shape.lanes * FLOAT for v in range(shape.vectors)]
    packed = [f.load(vector(shape.accumulator, shape.lanes), weights, place) for place in places]
    kept = site.passes_shift is not None and shape.panel_bytes <= FIRST_CACHE
    for place in () if kept else places:
        f.prefetch(weights, place + PREFETCH)
    pixel = shape.row.stride * shape.block * FLOAT
    for column in columns:
        scalar = f.splat(f.load(shape.accumulator, x, column * pixel + channel * FLOAT), shape.lanes)
        for v, weight in enumerate(packed):
            place = column * shape.vectors + v
            result[place] = multiply(f, scalar, weight, result[place])
    return result


def _fused(f: Function, x: Value, weight: Value, total: Value) -> Value:
    return f.fma(x, weight, total)


DIRECT = Method(zeros, partial(accumulate, multiply=_fused))

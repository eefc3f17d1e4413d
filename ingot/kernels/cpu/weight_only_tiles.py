"""Integer weights by tile registers, for many rows: a part of a panel becomes bfloat16 in the first cache, then all
rows pass it.

Rounded, weight and x take one bfloat16 number each; in two parts their products are within 2^-15. An unsigned number n
of `bits` bits becomes a float without a conversion: as the upper bits of a mantissa it reads 2^bits + n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm import Gemm, Tile
from ingot.kernels.cpu.gemm_dot import bfloat16_dot
from ingot.kernels.cpu.gemm_epilogue import RowEpilogue, finish_tile
from ingot.kernels.cpu.gemm_plan import known
from ingot.kernels.cpu.gemm_tiles import (
    COLUMNS,
    ROW_BYTES,
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
from ingot.kernels.cpu.llvm import Function, Index, Value
from ingot.kernels.cpu.render import load
from ingot.kernels.cpu.tile_rows import TileRows, interleaved
from ingot.kernels.cpu.weight_only_pack import Digits, Weights
from ingot.kernels.cpu.weight_only_product import PackedWeights
from ingot.plan.extent import Extent, ceil_div, product

_FLOATS, _BITS, _LINE = "<16 x float>", "<16 x i32>", 64
_PARTS_BYTES = 16 << 10  # of a panel's part as tiles: it stays in the first cache beside the rows that pass
_KEPT_BLOCKS = 16  # whose sums wait in scratch
_MOST_PANELS = 8  # that share the reading of x
_FEWEST_BUNDLES = 8  # where there are as many panels: threads take whole ones, so that weights are unpacked once
_MANTISSA, _BIAS = 23, 127
_AHEAD_BYTES = 2048


@dataclass(frozen=True, eq=False)
class _Job:
    weights: Weights
    digits: Digits
    stored: PackedWeights
    gemm: TileGemm
    like: Gemm
    x: TileRows
    epilogue: RowEpilogue
    shape: Handle
    run: int
    slots: int
    tiles: int

    @property
    def panels(self) -> int:
        """Panels of columns."""
        return -(-self.weights.columns // self.gemm.width)

    @property
    def bundle(self) -> int:
        """Panels that x passes together."""
        return self.gemm.run

    @property
    def bundles(self) -> int:
        """How many of these there are."""
        return -(-self.panels // self.bundle)

    @property
    def groups(self) -> int:
        return int(self.weights.scale_GN.shape[0])


def multiply_tiles(build: KernelBuilder, weights: Weights, digits: Digits, stored: PackedWeights, dot: TileDot,
                   x: TileRows, rows: Extent, epilogue: RowEpilogue, runs: Extent = 1) -> None:  # fmt: skip
    """A phase: epilogue(x[rows, K] @ weights[K, N]) where `runs` is 1; nothing where it is 0."""
    wide = 2 if stored.vectors % 2 == 0 else 1
    height = ROWS if isinstance(rows, int) and rows <= ROWS else TALLEST
    steps = -(-weights.depth // dot.depth)
    parts = -(-steps * wide * dot.right_bytes // _PARTS_BYTES)
    depth, run = -(-steps // parts), max(min(known(ceil_div(rows, height)), _KEPT_BLOCKS), 1)
    together = min(-(-weights.columns // (wide * COLUMNS * _FEWEST_BUNDLES)), _MOST_PANELS)
    gemm = TileGemm(dot, rows, weights.columns, steps, height, wide, depth, together)
    like = Gemm(bfloat16_dot(build.isa), Tile(height, wide), rows, weights.columns, steps, steps, 1)
    job = _Job(
        weights, digits, stored, gemm, like, x, epilogue, build.pack(configuration()), run,
        build.scratch(gemm.slot_bytes * run * gemm.run), build.scratch(depth * gemm.step_bytes * gemm.run),
    )  # fmt: skip

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        configure(f, job.shape)
        last = f.divide(end + (run - 1), run)
        f.loop(f.divide(begin, run), last, lambda number: _visit(f, job, number, begin, end))
        release(f)

    build.phase(product((runs, ceil_div(gemm.blocks, run), job.bundles, run)), body, grain=run)


def _visit(f: PhaseFunction, job: _Job, number: Value, begin: Value, end: Value) -> None:
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


def _multiply_part(f: PhaseFunction, job: _Job, part: _Part, tile: Value, count: Index, started: bool,
                   final: Callable[[Callable[[], None]], object]) -> None:  # fmt: skip
    """The products of `count` tiles of K: all blocks of rows pass all panels, so that x comes once for several."""
    gemm, x = job.gemm, job.x
    tiles, panel_bytes = f.at(f.scratch, job.tiles), gemm.depth * gemm.step_bytes
    f.loop(0, part.panels, lambda p: _unpack(f, job, part.panel + p, tile, count, f.at(tiles, p * panel_bytes)))

    def block(index: Value) -> None:
        row = index * gemm.height
        left = f.at(f.pointer(x.handle), row * (x.group_bytes // ROWS) + tile * (gemm.dot.parts * TILE_BYTES))
        there = f.minimum(gemm.height, f.index(f.extent(gemm.rows)) - row)

        def panel(p: Value) -> None:
            slot = f.at(f.scratch, ((index - part.kept) * job.bundle + p) * gemm.slot_bytes + job.slots)
            ahead = f.at(left, p * (gemm.share * gemm.depth) + (gemm.height // ROWS) * x.group_bytes)
            multiply(f, gemm, left, x.group_bytes, f.at(tiles, p * panel_bytes), count, slot, started, ahead)
            place = part.panel + p
            final(lambda: finish_tile(f, job.like, job.epilogue, job.like.tile, row, place, None, slot, there))

        f.loop(0, part.panels, panel)

    f.loop(part.first, part.last, block)


# weights to tiles


@dataclass(frozen=True, eq=False)
class _Scale:
    """scale, and -(2^bits + zero) * scale, of a vector of columns."""

    factor: Value
    shift: Value


def _unpack(f: PhaseFunction, job: _Job, panel: Value, tile: Value, count: Index, target: Value) -> None:
    """`count` tiles of K from `tile` on: [tile][part][vector][16 pairs of K][16 columns][2]."""
    gemm, stored, wide = job.gemm, job.stored, job.gemm.wide
    halves = stored.vectors // wide
    whole, half = f.index(f.divide(panel, halves)), f.index(f.remainder(panel, halves))
    words_of_tile, row_bytes = gemm.dot.depth // job.digits.count, stored.vectors * _LINE
    words = f.at(f.pointer(stored.words), whole * (stored.rows * row_bytes) + half * (wide * _LINE))
    words = f.at(words, tile * (words_of_tile * row_bytes))
    shared = job.groups == 1 or job.weights.group % gemm.dot.depth == 0

    def one(t: Value, words: Value, target: Value) -> list[Value]:
        k = (tile + t) * gemm.dot.depth
        scales = _scales(f, job, whole, half, k) if shared else []
        for j in range(words_of_tile):
            own = scales or _scales(f, job, whole, half, k + j * job.digits.count)
            for i in range(wide):
                word = f.load(_BITS, words, j * row_bytes + i * _LINE)
                f.prefetch(words, j * row_bytes + i * _LINE + _AHEAD_BYTES)
                _pairs(f, job, word, own[i], target, j * job.digits.count // 2, i)
        return [f.at(words, words_of_tile * row_bytes), f.at(target, gemm.step_bytes)]

    f.loop(0, count, one, [words, target])


def _scales(f: PhaseFunction, job: _Job, panel: Value, half: Value, k: Value) -> list[_Scale]:
    """Of the columns, at number `k` along K."""
    stored, wide = job.stored, job.gemm.wide
    group = f.index(0) if job.groups == 1 else f.minimum(f.index(f.divide(k, job.weights.group)), job.groups - 1)
    vectors = (panel * job.groups + group) * stored.vectors + half * wide
    size, found = size_of(stored.scale_dtype), []
    place = f.at(f.pointer(stored.scales), vectors * (COLUMNS * size))
    for i in range(wide):
        factor = load(f, stored.scale_dtype, place, i * COLUMNS * size, COLUMNS)
        raised = f.constant(_FLOATS, float((1 << job.digits.bits) + job.weights.zero))
        if stored.zeros is not None:
            zeros = f.at(f.pointer(stored.zeros), vectors * (COLUMNS * 4))
            raised = load(f, "float32", zeros, i * COLUMNS * 4, COLUMNS) + float(1 << job.digits.bits)
        found.append(_Scale(factor, factor * raised * -1.0))
    return found


def _pairs(f: Function, job: _Job, word: Value, scale: _Scale, target: Value, row: int, vector: int) -> None:
    """A word of 16 columns as rows of pairs, from row `row` of a tile on."""
    dot, wide = job.gemm.dot, job.gemm.wide
    for pair in range(job.digits.count // 2):
        first, second = (_number(f, job.digits, word, 2 * pair + k, scale) for k in range(2))
        for part, value in enumerate(interleaved(f, dot.right_parts, first, second)):
            f.store(value, target, (part * wide + vector) * TILE_BYTES + (row + pair) * ROW_BYTES)


def _number(f: Function, digits: Digits, word: Value, k: int, scale: _Scale) -> Value:
    """Number `k` of every word, scaled."""
    distance = _MANTISSA - digits.bits - digits.place(k)
    moved = f.binary("shl" if distance > 0 else "lshr", word, abs(distance)) if distance else word
    mask = ((1 << digits.bits) - 1) << (_MANTISSA - digits.bits)
    bits = f.binary("or", f.binary("and", moved, mask), (_BIAS + digits.bits) << _MANTISSA)
    return f.fma(f.bitcast(bits, _FLOATS), scale.factor, scale.shift)

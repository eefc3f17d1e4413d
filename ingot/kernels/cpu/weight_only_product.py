"""Integer weights times integer rows by vectors: what few rows wait for is the memory that the weights come from.

Lanes are columns. A vector of words comes apart into vectors of bytes (or 16-bit integers), each multiplied with what
it meets of a row and added up; at the end of a block the sums become floats and are scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm import Gemm, Tile
from ingot.kernels.cpu.gemm_dot import Dot, dot_for
from ingot.kernels.cpu.gemm_epilogue import RowEpilogue, finish_tile
from ingot.kernels.cpu.llvm import Function, Index, Value, vector
from ingot.kernels.cpu.render import load
from ingot.kernels.cpu.weight_only_pack import Digits, Weights, pack_groups
from ingot.kernels.cpu.weight_only_rows import IntegerRows
from ingot.plan.extent import Extent, ceil_div

TALLEST = 8
_HEIGHTS = (8, 4, 2, 1)  # tiles for run-time row counts
_SUMS = 16  # vectors of integer sums at once
_UNROLLED = 48  # products of a loop's body
_AHEAD_BYTES = 16384  # into the second cache: the first one waits for few lines at a time


@dataclass(frozen=True)
class PackedWeights:
    """Handles of words, scales and zero points; panels of `vectors` × lanes columns, `words` of them along K."""

    words: Handle
    scales: Handle
    scale_dtype: str
    zeros: Handle | None
    vectors: int
    rows: int


def packed(build: KernelBuilder, weights: Weights, words: Handle, rows: int, vectors: int) -> PackedWeights:
    """Scales and zero points beside words that are packed already."""
    width = vectors * build.isa.lanes
    scales = build.pack(pack_groups(weights.scale_GN, width, 0))
    zeros = None
    if weights.zero_GN is not None:
        zeros = build.pack(pack_groups(weights.zero_GN.astype("float32"), width, 0))
    return PackedWeights(words, scales, weights.scale_GN.dtype.name, zeros, vectors, rows)


@dataclass(frozen=True, eq=False)
class _Job:
    weights: Weights
    digits: Digits
    stored: PackedWeights
    rows: IntegerRows
    count: Extent
    epilogue: RowEpilogue
    dot: Dot
    slots: int

    @property
    def lanes(self) -> int:
        return self.dot.lanes

    @property
    def line(self) -> int:
        """Bytes of a vector of words."""
        return self.lanes * 4

    @property
    def groups(self) -> int:
        return int(self.weights.scale_GN.shape[0])


@dataclass(frozen=True, eq=False)
class _Part:
    """Where a tile of `tile.rows` × `tile.vectors` stands: its first row, its panel and the vector it begins with."""

    tile: Tile
    row: Value
    panel: Value
    first: Value


def multiply_rows(build: KernelBuilder, weights: Weights, digits: Digits, stored: PackedWeights, rows: IntegerRows,
                  count: Extent, epilogue: RowEpilogue, runs: Extent = 1) -> None:  # fmt: skip
    """A phase: epilogue(rows[count, K] @ weights[K, N]), panel by panel, where `runs` is 1; nothing where it is 0."""
    dot = dot_for("float32", build.isa)
    assert dot is not None
    slots = build.scratch(TALLEST * stored.vectors * dot.sum_bytes)
    job = _Job(weights, digits, stored, rows, count, epilogue, dot, slots)
    panels = ceil_div(weights.columns, stored.vectors * dot.lanes)
    items = panels if runs == 1 else f"({runs})*{panels}"

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def panel(number: Value) -> None:
            _for_heights(f, count, lambda height: _panel(f, job, number, height))

        f.loop(begin, end, panel)

    build.phase(items, body)


def _for_heights(f: PhaseFunction, count: Extent, emit: Callable[[int], None]) -> None:
    """Emit for equal tiles, or for the tallest of several that has no more rows than there are."""
    if isinstance(count, int):
        emit(-(-count // -(-count // TALLEST)) if count else 1)
        return
    rows = f.index(f.extent(count))

    def choose(heights: Sequence[int]) -> None:
        if len(heights) == 1:
            emit(heights[0])
        else:
            enough = f.compare("sge", rows, heights[0])
            f.when(enough, lambda: emit(heights[0]), lambda: choose(heights[1:]))

    choose(_HEIGHTS)


def _panel(f: PhaseFunction, job: _Job, panel: Value, height: int) -> None:
    """All rows of a panel; the last tile overlaps the one before it. Tiles beyond the last column are left out."""
    vectors, count = job.stored.vectors, f.index(f.extent(job.count))
    width = vectors
    while width > 1 and (height * width * job.rows.parts > _SUMS or vectors % width):
        width -= 1
    tile, tiles = Tile(height, width), -(-job.weights.columns // (width * job.lanes))
    there = f.minimum(vectors // width, f.index(tiles) - panel * (vectors // width))

    def rows(t: Value) -> None:
        row = f.index(f.minimum(t * height, count - height))

        def part(number: Value) -> None:
            _tile(f, job, _Part(tile, row, panel, number))

        f.loop(0, there, part)

    f.loop(0, f.divide(count + (height - 1), height), rows)


def _tile(f: PhaseFunction, job: _Job, part: _Part) -> None:
    """Sums of a tile over all blocks, and what its epilogue makes of them."""
    tile, stored = part.tile, job.stored
    totals = [f.constant(job.dot.sums, 0.0)] * (tile.rows * tile.vectors)
    row_bytes = stored.vectors * job.line
    words = f.at(f.pointer(stored.words), part.panel * (stored.rows * row_bytes))
    words = f.at(words, part.first * (tile.vectors * job.line))
    numbers = f.at(f.pointer(job.rows.numbers), part.row * job.rows.pitch)
    steps = job.weights.block // job.digits.count

    def block(b: Value, *state: Value) -> list[Value]:
        *sums, words, numbers = state
        found = _block_sums(f, job, part, words, numbers, steps, b)
        scaled = _scaled(f, job, part, found, sums, b)
        return [*scaled, f.at(words, steps * row_bytes), f.at(numbers, job.weights.block * job.digits.unit // 8)]

    totals = list(f.loop(0, job.weights.blocks, block, [*totals, words, numbers]))[: len(totals)]
    like = Gemm(job.dot, tile, job.count, job.weights.columns, 1, 1, 1)
    panel = part.panel * (stored.vectors // tile.vectors) + part.first
    finish_tile(f, like, job.epilogue, tile, part.row, panel, totals, f.at(f.scratch, job.slots))


def _block_sums(f: PhaseFunction, job: _Job, part: _Part, words: Value, numbers: Value, steps: int,
                block: Value) -> list[Value]:  # fmt: skip
    """Integer sums of a block, [part][row][vector]."""
    tile, digits = part.tile, job.digits
    per_step = digits.fields * tile.rows * tile.vectors * job.rows.parts
    unroll = max(u for u in range(1, steps + 1) if steps % u == 0 and (u == 1 or u * per_step <= _UNROLLED))
    row_bytes = job.stored.vectors * job.line
    start = _starts(f, job, part, block)

    def some(_: Value, *state: Value) -> list[Value]:
        *sums, words, numbers = state
        for u in range(unroll):
            sums = _step(f, job, tile, f.at(words, u * row_bytes), numbers, u * digits.count, sums)
        moved = unroll * digits.count * digits.unit // 8
        return [*sums, f.at(words, unroll * row_bytes), f.at(numbers, moved)]

    if unroll == steps:
        return some(block, *start, words, numbers)[: len(start)]
    return list(f.loop(0, steps // unroll, some, [*start, words, numbers]))[: len(start)]


def _starts(f: PhaseFunction, job: _Job, part: _Part, block: Value) -> list[Value]:
    """Zeros, but for the lowest part what the zero point takes off."""
    type_, tile = vector("i32", job.lanes), part.tile
    zeros = [f.constant(type_, 0)] * (tile.rows * tile.vectors)
    if job.rows.starts is None or job.weights.zero_GN is not None:
        return zeros * job.rows.parts
    places = [job.rows.starts_at(f, part.row + r, block) for r in range(tile.rows)]
    lowest = [value for p in places for value in [f.splat(f.load("i32", p), job.lanes)] * tile.vectors]
    return [*(zeros * (job.rows.parts - 1)), *lowest]


def _step(f: Function, job: _Job, tile: Tile, words: Value, numbers: Value, k: int, sums: list[Value]) -> list[Value]:
    """The products of a word of every column; `k`: its first number's place in the rows."""
    out, digits, type_ = list(sums), job.digits, vector("i32", job.lanes)
    loaded = [f.load(type_, words, i * job.line) for i in range(tile.vectors)]
    for i in range(tile.vectors):
        f.prefetch(words, _AHEAD_BYTES + i * job.line, locality=2)
    for field in range(digits.fields):
        parts = [field_of(f, digits, word, field) for word in loaded]
        place = (k + field * digits.group) * digits.unit // 8
        for p in range(job.rows.parts):
            for r in range(tile.rows):
                x = f.splat(f.load("i32", numbers, r * job.rows.pitch + p * job.rows.part_bytes + place), job.lanes)
                for i, weight in enumerate(parts):
                    at = (p * tile.rows + r) * tile.vectors + i
                    out[at] = _products(f, digits, out[at], weight, x)
    return out


def field_of(f: Function, digits: Digits, word: Value, field: int) -> Value:
    """Field `field` of every unit of a vector of words."""
    shifted = f.binary("lshr", word, field * digits.bits) if field else word
    return shifted if digits.fields == 1 else f.binary("and", shifted, digits.mask)


def _products(f: Function, digits: Digits, sums: Value, weight: Value, x: Value) -> Value:
    """Unsigned weights by signed numbers of a row, those of a lane added together."""
    if digits.unit == 8:
        return f.intrinsic("llvm.x86.avx512.vpdpbusd.512", sums.type, sums, weight, x)
    lanes = int(sums.type[1:].split()[0])
    words = vector("i16", 2 * lanes)
    name = "llvm.x86.avx512.pmaddw.d.512" if lanes == 16 else "llvm.x86.avx2.pmadd.wd"
    return f.intrinsic(name, sums.type, f.bitcast(weight, words), f.bitcast(x, words)) + sums


def _scaled(f: PhaseFunction, job: _Job, part: _Part, sums: Sequence[Value], totals: Sequence[Value],
            block: Value) -> list[Value]:  # fmt: skip
    """The totals plus a block's sums, scaled."""
    tile, lanes = part.tile, job.lanes
    scales, zeros = _of_group(f, job, part, block)
    out = list(totals)
    for r in range(tile.rows):
        factor = f.splat(f.load("float", job.rows.scales_at(f, part.row + r, block)), lanes)
        start = None if zeros is None else f.splat(f.load("float", job.rows.starts_at(f, part.row + r, block)), lanes)
        for i in range(tile.vectors):
            at = r * tile.vectors + i
            whole = sums[at]
            if job.rows.parts == 2:
                whole = f.binary("shl", whole, 7) + sums[tile.rows * tile.vectors + at]
            found = f.cast("sitofp", whole, "float")
            if zeros is not None and start is not None:
                found = f.fma(start, zeros[i] * -1.0, found)
            out[at] = f.fma(found, scales[i] * factor, out[at])
    return out


def _of_group(f: PhaseFunction, job: _Job, part: _Part, block: Index) -> tuple[list[Value], list[Value] | None]:
    """Scales and zero points of a block's columns."""
    stored, tile, lanes = job.stored, part.tile, job.lanes
    group = f.index(f.divide(block, job.weights.blocks_of_group)) if job.groups > 1 else f.index(0)
    vectors = (part.panel * job.groups + group) * stored.vectors + part.first * tile.vectors
    size = size_of(stored.scale_dtype)
    place = f.at(f.pointer(stored.scales), vectors * (lanes * size))
    scales = [load(f, stored.scale_dtype, place, i * lanes * size, lanes) for i in range(tile.vectors)]
    if stored.zeros is None:
        return scales, None
    place = f.at(f.pointer(stored.zeros), vectors * (lanes * 4))
    return scales, [load(f, "float32", place, i * lanes * 4, lanes) for i in range(tile.vectors)]

"""Integer weights as tiles of signed bytes, a scale for a block of 128 along K and a column.

Bytes whose zero point is 128 everywhere need their upper bit turned, where a group covers a block. Others are
multiplied by what their group's scale is of the block's, in 16 bits, and rounded: a whole number for one group a block
and weights of four bits, so that these stay exact; at most half a unit of the largest group's otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels.cpu.build import PhaseFunction
from ingot.kernels.cpu.gemm_tiles import COLUMNS, ROW_BYTES, TILE_BYTES
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.cpu.render import load
from ingot.kernels.cpu.weight_only_bytes import BLOCK, TILES
from ingot.kernels.cpu.weight_only_pack import Digits, Weights
from ingot.kernels.cpu.weight_only_product import PackedWeights

_FLOATS, _WORDS, _HALVES, _LINE = "<16 x float>", "<16 x i32>", "<32 x i16>", 64
_LARGEST = 127
_AHEAD_BYTES = 2048
_ROWS_OF_TILE = 16  # of four bytes of each column


@dataclass(frozen=True, eq=False)
class ByteWeights:
    """Panels of `wide` × 16 columns. A block as tiles: [step of K][tile of columns][16 × 4 of K][16 columns][4], then
    the columns' scales."""

    weights: Weights
    digits: Digits
    stored: PackedWeights
    wide: int

    @property
    def scales(self) -> int:
        """Where a block's scales lie."""
        return TILES * self.wide * TILE_BYTES

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.scales + self.wide * _LINE

    @property
    def together(self) -> int:
        """Numbers along K that have one scale within a block."""
        return BLOCK if self.weights.group >= self.weights.depth else min(self.weights.group, BLOCK)

    @property
    def plain(self) -> bool:
        """Whether bytes are what is stored, but for their upper bit."""
        weights = self.weights
        return weights.bits == 8 and weights.zero_GN is None and weights.zero == 128 and self.together == BLOCK

    @property
    def lifted(self) -> int:
        """Bits that numbers are shifted up before they are multiplied."""
        return 4 if self.weights.bits == 4 else 0

    @property
    def units(self) -> float:
        """Units of a byte that one of the numbers with the largest scale takes."""
        zero, most = self.weights.zero, (1 << self.weights.bits) - 1
        largest = most if self.weights.zero_GN is not None else max(zero, most - zero)
        return float(_LARGEST // largest) if largest <= _LARGEST else _LARGEST / largest


def blocks_fit(group: int, depth: int) -> bool:
    """Whether blocks consist of whole groups, or groups of whole blocks."""
    return group >= depth or group % BLOCK == 0 or BLOCK % group == 0


def unpack(f: PhaseFunction, job: ByteWeights, panel: Value, first: Value, last: Value, target: Value) -> None:
    """Blocks [first, last) of a panel."""
    stored, count = job.stored, job.digits.count
    parts, row_bytes = stored.vectors // job.wide, stored.vectors * _LINE
    place = f.index(f.divide(panel, parts)), f.index(f.remainder(panel, parts))
    words = f.at(f.pointer(stored.words), place[0] * (stored.rows * row_bytes) + place[1] * (job.wide * _LINE))

    def block(number: Value) -> None:
        read = f.at(words, number * (BLOCK // count * row_bytes))
        write = f.at(target, (number - first) * job.block_bytes)
        for j in range(job.wide):
            column = _Column(f.at(read, j * _LINE), f.at(write, j * TILE_BYTES), f.at(write, job.scales + j * _LINE))
            _column(f, job, column, place[0] * (_groups(job) * stored.vectors) + place[1] * job.wide + j, number)

    f.loop(first, last, block)


@dataclass(frozen=True, eq=False)
class _Column:
    """16 columns of a block: their words, and where tiles and scales go."""

    words: Value
    tiles: Value
    scales: Value


def _groups(job: ByteWeights) -> int:
    return int(job.weights.scale_GN.shape[0])


def _column(f: PhaseFunction, job: ByteWeights, column: _Column, vector: Value, block: Value) -> None:
    """16 columns of a block; `vector`: where scales of their first group lie, in vectors."""
    groups = [_group(f, job, block, k) for k in range(0, BLOCK, job.together)]
    scales = [_scale(f, job, vector, group) for group in groups]
    if job.plain:
        f.store(scales[0], column.scales)
        _turned(f, job, column)
        return
    largest = scales[0] if len(scales) == 1 else _largest(f, scales)
    f.store(largest * (1 / job.units), column.scales)
    for number, (group, scale) in enumerate(zip(groups, scales, strict=True)):
        share = f.constant(_FLOATS, 1.0) if len(scales) == 1 else f.binary("fdiv", scale, largest)
        factor = _twice(f, f.cast("fptosi", share * (job.units * 2.0 ** (15 - job.lifted)) + 0.5, "i32"))
        _multiplied(f, job, column, number, factor, _zero(f, job, vector, group))


def _group(f: PhaseFunction, job: ByteWeights, block: Value, k: int) -> Value:
    """The group that number k of a block belongs to; of what is beyond K, the last one."""
    if _groups(job) == 1:
        return f.index(0)
    number = f.index(f.divide(block * BLOCK + k, job.weights.group))
    return f.index(f.minimum(number, _groups(job) - 1))


def _scale(f: PhaseFunction, job: ByteWeights, vector: Value, group: Value) -> Value:
    size = COLUMNS * size_of(job.stored.scale_dtype)
    place = f.at(f.pointer(job.stored.scales), (vector + group * job.stored.vectors) * size)
    return load(f, job.stored.scale_dtype, place, 0, COLUMNS)


def _zero(f: PhaseFunction, job: ByteWeights, vector: Value, group: Value) -> Value:
    """Zero points, shifted as the numbers are, in both halves of a word."""
    if job.stored.zeros is None:
        return f.constant(_HALVES, job.weights.zero << job.lifted)
    place = f.at(f.pointer(job.stored.zeros), (vector + group * job.stored.vectors) * (COLUMNS * 4))
    return _twice(f, f.cast("fptosi", f.load(_FLOATS, place) * float(1 << job.lifted), "i32"))


def _largest(f: PhaseFunction, scales: list[Value]) -> Value:
    """The largest magnitude of each lane, at least the smallest number that can be divided by."""
    best = f.constant(_FLOATS, 2.0**-126)
    for scale in scales:
        magnitude = f.call("llvm.fabs", _FLOATS, scale)
        best = f.select(f.compare("ogt", magnitude, best), magnitude, best)
    return best


def _twice(f: PhaseFunction, numbers: Value) -> Value:
    """The lower 16 bits of words in both halves of each."""
    lower = f.binary("and", numbers, 0xFFFF)
    return f.bitcast(f.binary("or", lower, f.binary("shl", numbers, 16)), _HALVES)


def _turned(f: PhaseFunction, job: ByteWeights, column: _Column) -> None:
    """Bytes without their offset of 128."""
    row_bytes = job.stored.vectors * _LINE

    def row(r: Value) -> None:
        for tile in range(TILES):
            read = f.at(column.words, (r + tile * _ROWS_OF_TILE) * row_bytes)
            f.prefetch(read, _AHEAD_BYTES)
            f.store(f.binary("xor", f.load(_WORDS, read), -0x7F7F7F80), _row(f, job, column, tile, r))

    f.loop(0, _ROWS_OF_TILE, row)


def _row(f: PhaseFunction, job: ByteWeights, column: _Column, tile: int, row: Value | int) -> Value:
    return f.at(column.tiles, f.index(row) * ROW_BYTES + tile * job.wide * TILE_BYTES)


def _multiplied(f: PhaseFunction, job: ByteWeights, column: _Column, group: int, factor: Value, zero: Value) -> None:
    """The numbers of a group, of which a block has several, centred and multiplied by `factor`."""
    count = job.digits.count
    for number in range(group * job.together // count, (group + 1) * job.together // count):
        words = f.at(column.words, number * (job.stored.vectors * _LINE))
        f.prefetch(words, _AHEAD_BYTES)
        for field, pairs in enumerate(_pairs(f, job, f.load(_WORDS, words))):
            even, odd = (_product(f, f.bitcast(pair, _HALVES) - zero, factor) for pair in pairs)
            upper = f.binary("shl", f.bitcast(odd, _HALVES), 8)
            merged = f.binary("or", f.binary("and", f.bitcast(even, _WORDS), 0x00FF00FF), f.bitcast(upper, _WORDS))
            tile, row = divmod(number * job.digits.fields + field, _ROWS_OF_TILE)
            f.store(merged, _row(f, job, column, tile, row))


def _pairs(f: PhaseFunction, job: ByteWeights, word: Value) -> list[tuple[Value, Value]]:
    """Even and odd numbers of every four of a word, each in 16 bits and shifted by `lifted`."""
    if job.weights.bits == 8:
        mask = 0x00FF00FF
        return [(f.binary("and", word, mask), f.binary("and", f.binary("lshr", word, 8), mask))]
    mask, moved = 0x00F000F0, f.binary("shl", word, 4)
    raised = [f.binary("and", f.binary("lshr", word, distance), mask) for distance in (4, 8)]
    return [(f.binary("and", moved, mask), raised[0]), (f.binary("and", word, mask), raised[1])]


def _product(f: PhaseFunction, numbers: Value, factor: Value) -> Value:
    """numbers * factor / 2^15, rounded."""
    return f.intrinsic("llvm.x86.avx512.pmul.hr.sw.512", _HALVES, numbers, factor)

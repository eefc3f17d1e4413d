"""Integer weights as tiles of bfloat16: scaled, in two parts, or as they are, which one part holds exactly.

An unsigned number n of `bits` bits becomes a float without a conversion: as the upper bits of a mantissa it reads
2^bits + n. Four bits are looked up in a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ingot.dtypes import size_of
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm import Gemm
from ingot.kernels.cpu.gemm_epilogue import RowEpilogue
from ingot.kernels.cpu.gemm_tiles import COLUMNS, ROW_BYTES, TILE_BYTES, TileDot, TileGemm
from ingot.kernels.cpu.llvm import Function, Index, Value
from ingot.kernels.cpu.render import load
from ingot.kernels.cpu.tile_rows import TileRows, interleaved
from ingot.kernels.cpu.weight_only_pack import Digits, Weights
from ingot.kernels.cpu.weight_only_product import PackedWeights

FLOATS = "<16 x float>"
_BITS, _HALVES, _LINE = "<16 x i32>", "<32 x i16>", 64
_MANTISSA, _BIAS = 23, 127
_AHEAD_BYTES = 2048
_PLACES = (0, 8, 4, 12)  # bits to the pairs of a word, whose bytes then lie in this order:
_NEIGHBOURS = [4 * i + k for i in range(16) for k in (0, 2, 1, 3)]

Place = tuple[Value, Value]


@dataclass(frozen=True, eq=False)
class Job:
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
    table: Handle | None
    fresh: int
    together: int  # tiles of K whose products are scaled at once

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
        """Scales of a column."""
        return int(self.weights.scale_GN.shape[0])

    @property
    def grouped(self) -> bool:
        """Whether sums are scaled group by group."""
        return self.gemm.dot.exact and in_groups(self.weights)


def in_groups(weights: Weights) -> bool:
    """Whether a column has more than one scale."""
    return weights.group < weights.depth


def table_of(build: KernelBuilder, weights: Weights, digits: Digits, dot: TileDot) -> Handle | None:
    """What four bits stand for, as bfloat16, where all zero points are the same; twice, since a place has five bits."""
    if not dot.exact or digits.bits != 4 or digits.unit != 8 or weights.zero_GN is not None:
        return None
    numbers = (np.arange(32) & 15).astype(np.float32) - weights.zero
    return build.pack((numbers.view(np.uint32) >> 16).astype(np.uint16))


@dataclass(frozen=True, eq=False)
class _Scale:
    """scale, and -(2^bits + zero) * scale, of a vector of columns; without a scale it is 1."""

    factor: Value | None
    shift: Value


def unpack(f: PhaseFunction, job: Job, panel: Value, tile: Value, count: Index, target: Value) -> None:
    """`count` tiles of K from `tile` on: [tile][part][vector][16 pairs of K][16 columns][2]."""
    gemm, stored, wide = job.gemm, job.stored, job.gemm.wide
    place = place_of(f, job, panel)
    words_of_tile, row_bytes = gemm.dot.depth // job.digits.count, stored.vectors * _LINE
    words = f.at(f.pointer(stored.words), place[0] * (stored.rows * row_bytes) + place[1] * (wide * _LINE))
    words = f.at(words, tile * (words_of_tile * row_bytes))
    shared = job.groups == 1 or job.weights.group % gemm.dot.depth == 0
    table = None if job.table is None else f.load(_HALVES, f.pointer(job.table))

    def one(t: Value, words: Value, target: Value) -> list[Value]:
        k = (tile + t) * gemm.dot.depth
        scales = _scales(f, job, place, k) if shared else []
        for j in range(words_of_tile):
            own = scales or _scales(f, job, place, k + j * job.digits.count)
            for i in range(wide):
                word = f.load(_BITS, words, j * row_bytes + i * _LINE)
                f.prefetch(words, j * row_bytes + i * _LINE + _AHEAD_BYTES)
                row = f.at(target, i * TILE_BYTES + j * (job.digits.count // 2 * ROW_BYTES))
                if table is not None:
                    _looked_up(f, table, word, row)
                else:
                    _pairs(f, job, word, own[i], row)
        return [f.at(words, words_of_tile * row_bytes), f.at(target, gemm.step_bytes)]

    f.loop(0, count, one, [words, target])


def _scales(f: PhaseFunction, job: Job, place: Place, k: Value) -> list[_Scale]:
    """Of the columns, at number `k` along K."""
    stored, wide, found = job.stored, job.gemm.wide, []
    group = group_of(f, job, k)
    factors = [None] * wide if job.gemm.dot.exact else factors_of(f, job, place, group)
    raised = f.constant(FLOATS, float((1 << job.digits.bits) + job.weights.zero))
    for i, factor in enumerate(factors):
        if stored.zeros is not None:
            zeros = f.at(f.pointer(stored.zeros), _vectors(job, place, group) * (COLUMNS * 4))
            raised = load(f, "float32", zeros, i * COLUMNS * 4, COLUMNS) + float(1 << job.digits.bits)
        found.append(_Scale(factor, raised * -1.0 if factor is None else factor * raised * -1.0))
    return found


def group_of(f: PhaseFunction, job: Job, k: Value) -> Value:
    """The group that has number `k` of K."""
    if job.groups == 1:
        return f.index(0)
    return f.index(f.minimum(f.index(f.divide(k, job.weights.group)), job.groups - 1))


def place_of(f: PhaseFunction, job: Job, panel: Value) -> Place:
    """A panel's place among the packed ones, which may be wider: which of them, and which part of it."""
    parts = job.stored.vectors // job.gemm.wide
    return f.index(f.divide(panel, parts)), f.index(f.remainder(panel, parts))


def _vectors(job: Job, place: Place, group: Value) -> Value:
    """Where the scales, or zero points, of a group begin, in vectors."""
    return (place[0] * job.groups + group) * job.stored.vectors + place[1] * job.gemm.wide


def factors_of(f: PhaseFunction, job: Job, place: Place, group: Value) -> list[Value]:
    """Scales of a group."""
    dtype = job.stored.scale_dtype
    size = COLUMNS * size_of(dtype)
    first = f.at(f.pointer(job.stored.scales), _vectors(job, place, group) * size)
    return [load(f, dtype, first, i * size, COLUMNS) for i in range(job.gemm.wide)]


def _pairs(f: Function, job: Job, word: Value, scale: _Scale, target: Value) -> None:
    """A word of 16 columns as rows of pairs."""
    dot, wide = job.gemm.dot, job.gemm.wide
    for pair in range(job.digits.count // 2):
        first, second = (_number(f, job.digits, word, 2 * pair + k, scale) for k in range(2))
        for part, value in enumerate(interleaved(f, dot.right_parts, first, second)):
            f.store(value, target, part * wide * TILE_BYTES + pair * ROW_BYTES)


def _looked_up(f: Function, table: Value, word: Value, target: Value) -> None:
    """The same for numbers of four bits by a table, of which the lowest five bits of a lane tell the place."""
    places = f.bitcast(f.shuffle(f.bitcast(word, "<64 x i8>"), None, _NEIGHBOURS), _HALVES)
    for pair, moved in enumerate(_PLACES):
        place = f.binary("lshr", places, moved) if moved else places
        found = f.intrinsic("llvm.x86.avx512.permvar.hi.512", _HALVES, table, place)
        f.store(found, target, pair * ROW_BYTES)


def _number(f: Function, digits: Digits, word: Value, k: int, scale: _Scale) -> Value:
    """Number `k` of every word, scaled."""
    distance = _MANTISSA - digits.bits - digits.place(k)
    moved = f.binary("shl" if distance > 0 else "lshr", word, abs(distance)) if distance else word
    mask = ((1 << digits.bits) - 1) << (_MANTISSA - digits.bits)
    bits = f.binary("or", f.binary("and", moved, mask), (_BIAS + digits.bits) << _MANTISSA)
    raised = f.bitcast(bits, FLOATS)
    return raised + scale.shift if scale.factor is None else f.fma(raised, scale.factor, scale.shift)

"""Rows of x as integers for products with integer weights: a block along K has one scale, its largest magnitude.

Two bytes where bytes are multiplied, x = scale * (128 * high + low), or one 16-bit integer: 15 bits either way, an
error of 2^-15 of the block's largest magnitude. A block with NaN or an infinity has that for its scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.llvm import Function, Value, lanes_of, vector
from ingot.kernels.cpu.weight_only_pack import Digits, Weights
from ingot.plan.extent import Extent, product

_LIMITS = {8: 127 * 128 + 63, 16: 32767}  # by bits of a unit: the largest number
_LOW_BITS = 7
_ROUNDER, _ROUNDER_BITS = 12582912.0, 0x4B400000  # 1.5 * 2^23: adding it rounds to an integer in the lowest bits
_GRAIN_BYTES = 32768


@dataclass(frozen=True)
class IntegerRows:
    """`parts` runs of integers a row, and per block of a row its scale and what the zero point makes of its sum."""

    numbers: Handle
    scales: Handle
    starts: Handle | None
    parts: int
    part_bytes: int
    blocks: int

    @property
    def pitch(self) -> int:
        """Bytes from row to row."""
        return self.parts * self.part_bytes

    def starts_at(self, f: PhaseFunction, row: Value, block: Value) -> Value:
        """Address of what row `row` starts a block with."""
        assert self.starts is not None
        return f.at(f.pointer(self.starts), (row * self.blocks + block) * 4)

    def scales_at(self, f: PhaseFunction, row: Value, block: Value) -> Value:
        """Address of the scale of a block of row `row`."""
        return f.at(f.pointer(self.scales), (row * self.blocks + block) * 4)


def parts_of(digits: Digits) -> int:
    """Runs of integers that stand for a row."""
    return 16 // digits.unit


def integer_rows(build: KernelBuilder, weights: Weights, digits: Digits, rows: Extent, most: Extent) -> IntegerRows:
    """Input 0, [rows, K], as integers; memory for `most` rows.

    `starts` holds -zero * (sum of the integers) as int32 where all weights have one zero point, else the sum as float.
    """
    parts, part_bytes = parts_of(digits), weights.blocks * weights.block * digits.unit // 8
    source, numbers = build.input(0), build.temporary(product((most, parts * part_bytes)))
    scales = build.temporary(product((most, weights.blocks * 4)))
    summed = weights.zero_GN is not None or weights.zero != 0
    starts = build.temporary(product((most, weights.blocks * 4))) if summed else None
    made = IntegerRows(numbers, scales, starts, parts, part_bytes, weights.blocks)
    job = _Job(made, weights, digits, build.isa.lanes if weights.block % build.isa.lanes == 0 else 8)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def row(r: Value) -> None:
            read, write = f.at(f.pointer(source), r * (weights.depth * 4)), f.at(f.pointer(numbers), r * made.pitch)
            whole = weights.depth // weights.block
            f.loop(0, whole, lambda b: _block(f, job, read, write, r, b, weights.block))
            if weights.depth % weights.block:
                _block(f, job, read, write, r, f.index(whole), weights.depth % weights.block)

        f.loop(begin, end, row)

    build.phase(rows, body, max(_GRAIN_BYTES // (weights.depth * 4), 1))
    return made


@dataclass(frozen=True, eq=False)
class _Job:
    rows: IntegerRows
    weights: Weights
    digits: Digits
    lanes: int


def _block(f: PhaseFunction, job: _Job, read: Value, write: Value, row: Value, block: Value, there: int) -> None:
    """A block's integers, scale and start; `there` of its numbers exist, the rest are zero."""
    size, lanes = job.weights.block, job.lanes
    place = f.at(read, block * (size * 4))
    numbers = [loaded(f, place, first, min(there - first, lanes), lanes) for first in range(0, size, lanes)]
    largest = largest_of(f, numbers, lanes)
    limit = _LIMITS[job.digits.unit]
    f.store(largest * (1 / limit), job.rows.scales_at(f, row, block))
    inverse = inverse_of(f, limit, largest, lanes)
    target, total = f.at(write, block * (size * job.digits.unit // 8)), f.constant(vector("i32", lanes), 0)
    for number, x in enumerate(numbers):
        whole = rounded(f, x, inverse)
        total = total + whole
        _store(f, job, whole, target, number * lanes)
    if job.rows.starts is not None:
        start = f.intrinsic(f"llvm.vector.reduce.add.v{lanes}i32", "i32", total)
        start = start * -job.weights.zero if job.weights.zero_GN is None else f.cast("sitofp", start, "float")
        f.store(start, job.rows.starts_at(f, row, block))


def loaded(f: Function, pointer: Value, first: int, there: int, lanes: int) -> Value:
    """Numbers from `first` on, zeros from `there` on."""
    type_ = vector("float", lanes)
    if there <= 0:
        return f.constant(type_, 0.0)
    if there == lanes:
        return f.load(type_, pointer, first * 4)
    return f.load_masked(type_, pointer, f.first_lanes(there, lanes), first * 4)


def rounded(f: Function, x: Value, factor: Value) -> Value:
    """The nearest integers to x * factor, which has at most 22 bits."""
    raised = f.fma(x, factor, f.constant(x.type, _ROUNDER))
    return f.bitcast(raised, vector("i32", lanes_of(x.type))) - _ROUNDER_BITS


def largest_of(f: Function, numbers: list[Value], lanes: int) -> Value:
    """The largest magnitude, NaN above all: as integers their bits have that order."""
    type_ = vector("i32", lanes)
    best: Value | None = None
    for x in numbers:
        bits = f.binary("and", f.bitcast(x, type_), 0x7FFFFFFF)
        best = bits if best is None else f.call("llvm.umax", type_, best, bits)
    assert best is not None
    return f.bitcast(f.intrinsic(f"llvm.vector.reduce.umax.v{lanes}i32", "i32", best), "float")


def inverse_of(f: Function, limit: int, largest: Value, lanes: int) -> Value:
    """limit / largest in all lanes, what takes a block's numbers to integers of at most `limit`; 0 for a block of
    zeros."""
    inverse = f.splat(f.binary("fdiv", f.constant("float", limit), largest), lanes)
    return f.select(f.compare("oeq", f.splat(largest, lanes), 0.0), 0.0, inverse)


def _store(f: Function, job: _Job, numbers: Value, target: Value, first: int) -> None:
    """Integers as bytes in two parts, or as 16 bits."""
    if job.digits.unit == 16:
        f.store(f.cast("trunc", numbers, "i16"), target, first * 2)
        return
    high = f.binary("ashr", numbers + (1 << (_LOW_BITS - 1)), _LOW_BITS)
    low = numbers - f.binary("shl", high, _LOW_BITS)
    for part, value in enumerate((high, low)):
        f.store(f.cast("trunc", value, "i8"), f.at(target, part * job.rows.part_bytes), first)

"""Rows of x as bytes for tile registers: a block of 128 numbers along K has one scale, its largest magnitude.

What eight bits leave of a block in which one number stands out (it has more than three quarters of the sum of squares,
so that the others would get few bits) is multiplied too: as an entry of its own behind the block's, with a scale of its
own. A row that needs none adds exact zeros there, so that its results are the same in any company.
"""

from __future__ import annotations

from dataclasses import dataclass

from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm_tiles import ROW_BYTES, ROWS, TILE_BYTES
from ingot.kernels.cpu.llvm import Function, Index, Value
from ingot.kernels.cpu.weight_only_rows import inverse_of, largest_of, loaded, rounded
from ingot.plan.extent import Extent, ceil_div, product

BLOCK, TILES = 128, 2  # numbers along K with one scale, and the tiles that hold them
_LANES, _LINE = 16, 64
_LARGEST = 127
_INTEGERS, _HALVES = "<16 x i32>", "<32 x i16>"
_STANDS_OUT = 4 * _LARGEST**2 // 3  # of a block's squares, in units of its scale
_REST = 2.0 * _LARGEST  # scales of what is left: at most half a unit


@dataclass(frozen=True)
class ByteRows:
    """`height` (16 or 32) rows together: where the entry of each block begins, then entries: tiles [16 rows together]
    [step of K][row][64 bytes], a float scale for each row, and the number of its block along K."""

    handle: Handle
    height: int
    blocks: int

    @property
    def tops(self) -> int:
        """Tiles of 16 rows beside each other."""
        return self.height // ROWS

    @property
    def scales(self) -> int:
        """Where an entry's scales lie."""
        return self.tops * TILES * TILE_BYTES

    @property
    def number(self) -> int:
        """Where an entry says which block it is of."""
        return self.scales + self.tops * _LINE

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry: no multiple of a page, which would have the same few places in a cache."""
        return self.number + _LINE

    @property
    def head_bytes(self) -> int:
        """Bytes of the entries' beginnings, an int32 for each block and the end."""
        return -(-(self.blocks + 1) * 4 // _LINE) * _LINE

    @property
    def bytes(self) -> int:
        """Bytes of `height` rows, each block followed by what is left of it."""
        return self.head_bytes + 2 * self.blocks * self.entry_bytes

    def begins(self, f: PhaseFunction, group: Value, block: Index) -> Value:
        """Which entry is the first one of a block."""
        return f.cast("sext", f.load("i32", f.at(group, f.index(block) * 4)), "i64")

    def entry(self, f: PhaseFunction, group: Value, number: Index) -> Value:
        """Where an entry lies."""
        return f.at(group, f.index(number) * self.entry_bytes + self.head_bytes)


def byte_rows(build: KernelBuilder, depth: int, rows: Extent, count: Extent, height: int) -> ByteRows:
    """A phase: the first `count` of input 0's `rows` rows, [rows, depth]: count is rows or 0."""
    groups, blocks = ceil_div(count, height), -(-depth // BLOCK)
    source = build.input(0)
    made = ByteRows(build.temporary(0), height, blocks)
    build.temporaries[-1] = product((groups, made.bytes))

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def group(number: Value) -> None:
            first = number * height
            there = f.index(f.minimum(f.index(f.extent(rows)) - first, height))
            read, write = f.at(f.pointer(source), first * (depth * 4)), f.pointer(made.handle)
            job = _Job(made, depth, read, f.at(write, number * made.bytes), there)
            whole = depth // BLOCK
            (entry,) = f.loop(0, whole, lambda b, e: [_block(f, job, b, e, BLOCK)], [f.index(0)])
            if depth % BLOCK:
                entry = _block(f, job, f.index(whole), entry, depth % BLOCK)
            f.store(f.cast("trunc", entry, "i32"), job.write, blocks * 4)

        f.loop(begin, end, group)

    build.phase(groups, body)
    return made


@dataclass(frozen=True, eq=False)
class _Job:
    """Rows that lie together: where they are read and written, and how many there are."""

    rows: ByteRows
    depth: int
    read: Value
    write: Value
    there: Value


def _block(f: PhaseFunction, job: _Job, block: Value, entry: Value, count: int) -> Value:
    """A block of all rows, of which `count` numbers exist; the number of the next entry."""
    rows = job.rows
    f.store(f.cast("trunc", entry, "i32"), job.write, block * 4)
    read, write = f.at(job.read, block * (BLOCK * 4)), rows.entry(f, job.write, entry)
    f.store(f.cast("trunc", block, "i32"), write, rows.number)

    def row(r: Value, any_stands_out: Value) -> list[Value]:
        return [f.binary("or", any_stands_out, _row(f, job, read, write, r, count))]

    (stands_out,) = f.loop(0, job.there, row, [f.constant("i1", 0)])

    def rest() -> list[Value]:
        following = f.at(write, rows.entry_bytes)
        f.store(f.cast("trunc", block, "i32"), following, rows.number)
        f.loop(0, job.there, lambda r: _rest(f, job, read, write, r, count))
        return [entry + 2]

    return f.when(stands_out, rest, lambda: [entry + 1])[0]


def _row(f: Function, job: _Job, read: Value, write: Value, row: Value, count: int) -> Value:
    """A row's bytes and scale; whether a number stands out."""
    seen = _seen(f, job, read, row, count)
    f.store(seen.largest * (1 / _LARGEST), f.at(write, row * 4), job.rows.scales)
    for number, whole in enumerate(seen.wholes):
        _store(f, job, write, row, number, whole)
    return seen.stands_out


def _rest(f: Function, job: _Job, read: Value, write: Value, row: Value, count: int) -> None:
    """What a row's entry leaves of it, as the following one; zeros where no number stands out."""
    seen, following = _seen(f, job, read, row, count), f.at(write, job.rows.entry_bytes)
    scale = seen.largest * (1 / (_LARGEST * _REST))
    f.store(f.select(seen.stands_out, scale, 0.0), f.at(following, row * 4), job.rows.scales)
    factor = f.splat(f.select(seen.stands_out, f.constant("float", _REST), 0.0), _LANES)
    for number, (x, whole) in enumerate(zip(seen.numbers, seen.wholes, strict=True)):
        left = f.fma(x, seen.inverse, f.cast("sitofp", whole, "float") * -1.0)
        _store(f, job, following, row, number, rounded(f, left, factor))


@dataclass(frozen=True, eq=False)
class _Seen:
    """A row's numbers of a block, its largest magnitude, the integers they are rounded to, and whether one stands
    out."""

    numbers: list[Value]
    largest: Value
    inverse: Value
    wholes: list[Value]
    stands_out: Value


def _seen(f: Function, job: _Job, read: Value, row: Value, count: int) -> _Seen:
    place = f.at(read, row * (job.depth * 4))
    numbers = [loaded(f, place, k, min(count - k, _LANES), _LANES) for k in range(0, BLOCK, _LANES)]
    largest = largest_of(f, numbers, _LANES)
    inverse = inverse_of(f, _LARGEST, largest, _LANES)
    wholes, squares = [rounded(f, x, inverse) for x in numbers], f.constant(_INTEGERS, 0)
    for whole in wholes:
        halves = f.bitcast(f.binary("and", whole, 0xFFFF), _HALVES)
        squares = squares + f.intrinsic("llvm.x86.avx512.pmaddw.d.512", _INTEGERS, halves, halves)
    total = f.intrinsic("llvm.vector.reduce.add.v16i32", "i32", squares)
    stands_out = f.binary("and", f.compare("sgt", total, 0), f.compare("slt", total, _STANDS_OUT))
    return _Seen(numbers, largest, inverse, wholes, stands_out)


def _store(f: Function, job: _Job, write: Value, row: Value, number: int, whole: Value) -> None:
    """Vector `number` of a row's block, as bytes."""
    top, within = f.index(f.divide(row, ROWS)), f.index(f.remainder(row, ROWS))
    tile, line = divmod(number * _LANES, ROW_BYTES)
    place = top * (TILES * TILE_BYTES) + within * ROW_BYTES + (tile * TILE_BYTES + line)
    f.store(f.cast("trunc", whole, "i8"), f.at(write, place))

"""TopK: the k best elements seen so far lie in a heap with the worst of them on top; vectors of elements are compared
with that one, and only those that beat it change the heap. At the end the heap is taken apart, worst first.

An entry of the heap is one integer: a key that orders as the elements do above the complement of the place, so that of
equals the first is the best and no two entries are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.elementwise import FLOATS
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Function, Index, Value, bits_of, lanes_of, vector
from ingot.kernels.cpu.pointwise_dims import (
    BYTES_PER_MICROSECOND,
    CYCLES_PER_MICROSECOND,
    can_mask,
    traffic,
    typical,
)
from ingot.kernels.cpu.reduce_index import compared_dtype, ordered
from ingot.kernels.cpu.render import MEMORY, load, register_element
from ingot.kernels.cpu.rows import each
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

GRAIN = 8192  # elements looked at in a chunk worth taking
CHANGE_CYCLES = 12  # of a change of the heap, per level
HEAP_BYTES = 1 << 24  # a larger heap for every thread is a host step's work


@dataclass(frozen=True)
class Search:
    """The `count` best of x[outer, length, inner], of type `dtype`, compared in type `compared`."""

    dtype: str
    compared: str
    largest: bool
    count: int
    lanes: int
    masked: bool
    outer: Extent
    length: Extent
    inner: Extent
    source: Handle
    values: Handle
    places: Handle
    heap: int

    @property
    def key(self) -> str:
        """LLVM type of a key."""
        return f"i{self.bits}"

    @property
    def bits(self) -> int:
        """Bits of a key, and of a place beside it."""
        return bits_of(register_element(self.compared))

    @property
    def entry(self) -> str:
        """LLVM type of an entry."""
        return f"i{2 * self.bits}"


@dataclass(frozen=True)
class Line:
    """Elements along the axis: the index of the first, read and written, and what lies between neighbours; there are
    `size`, of which `taken` go into the heap unasked."""

    source: Index
    target: Index
    gap: Index
    size: Index
    taken: Index


# keys and entries


def _keys(f: Function, search: Search, x: Value) -> Value:
    """Signed integers that order as the elements do, the wanted ones above: NaN beats all numbers, zeros are equal."""
    x = ordered(f, x, search.dtype, search.compared)
    keys = _float_keys(f, x) if search.compared in FLOATS else x
    return keys if search.largest else f.binary("xor", keys, -1)


def _float_keys(f: Function, x: Value) -> Value:
    bits = bits_of(x.type)
    raw = f.bitcast(x + 0.0, vector(f"i{bits}", lanes_of(x.type)))
    flipped = f.binary("xor", raw, f.binary("lshr", f.binary("ashr", raw, bits - 1), 1))
    return f.select(f.compare("uno", x, x), (1 << (bits - 1)) - 1, flipped)


def _read(f: PhaseFunction, search: Search, place: Index, lanes: int = 1, mask: Value | None = None) -> Value:
    """The keys of neighbouring elements."""
    offset = place * size_of(search.dtype)
    return _keys(f, search, load(f, search.dtype, f.pointer(search.source), offset, lanes, mask))


def _entry(f: Function, search: Search, key: Value, place: Index) -> Value:
    upper = f.binary("shl", f.cast("sext", key, search.entry), search.bits)
    lower = f.cast("trunc", f.binary("xor", f.index(place), -1), search.key)
    return f.binary("or", upper, f.cast("zext", lower, search.entry))


def _key_of(f: Function, search: Search, entry: Value) -> Value:
    return f.cast("trunc", f.binary("ashr", entry, search.bits), search.key)


def _place_of(f: Function, search: Search, entry: Value) -> Value:
    return f.cast("zext", f.binary("xor", f.cast("trunc", entry, search.key), -1), "i64")


# the heap


def _at(f: PhaseFunction, search: Search, slot: Index) -> Value:
    return f.at(f.scratch, slot * (search.bits // 4) + search.heap)


def _get(f: PhaseFunction, search: Search, slot: Index) -> Value:
    return f.load(search.entry, _at(f, search, slot), align=8)


def _set(f: PhaseFunction, search: Search, slot: Index, entry: Value) -> None:
    f.store(entry, _at(f, search, slot), align=8)


def _sink(f: PhaseFunction, search: Search, slot: Index, size: Index, entry: Value) -> None:
    """Put an entry into the heap of `size` entries at `slot` or below it, where all others are in order."""
    last = f.index(size) - 1

    def has_children(slot: Value) -> Value:
        return f.compare("slt", slot * 2 + 1, f.index(size))

    def level(slot: Value, _: Value) -> tuple[Value, Value]:
        left = slot * 2 + 1
        right = f.index(f.minimum(left + 1, last))
        a, b = _get(f, search, left), _get(f, search, right)
        worse = f.compare("slt", b, a)
        child, place = f.select(worse, b, a), f.select(worse, right, left)
        sinks = f.compare("slt", child, entry)
        f.when(sinks, lambda: _set(f, search, slot, child))
        below = f.select(sinks, place, slot)
        return below, f.binary("and", sinks, has_children(below))

    settled, _ = f.loop_while(lambda slot, goes_on: goes_on, level, [f.index(slot), has_children(f.index(slot))])
    _set(f, search, settled, entry)


def _fill(f: PhaseFunction, search: Search, line: Line) -> None:
    """The first elements, in the order of a heap."""

    def take(i: Value) -> None:
        _set(f, search, i, _entry(f, search, _read(f, search, line.source + i * line.gap), i))

    f.loop(0, line.taken, take)
    half = f.divide(line.taken, 2)

    def settle(i: Value) -> None:
        slot = f.index(half) - 1 - i
        _sink(f, search, slot, line.taken, _get(f, search, slot))

    f.loop(0, half, settle)


def _offer(f: PhaseFunction, search: Search, line: Line, place: Value) -> None:
    """Element `place` takes the place of the worst if it is better."""
    entry = _entry(f, search, _read(f, search, line.source + place * line.gap), place)
    f.when(f.compare("sgt", entry, _get(f, search, 0)), lambda: _sink(f, search, 0, line.taken, entry))


def _empty(f: PhaseFunction, search: Search, line: Line) -> None:
    """The heap's entries become results, the worst first, at the end."""

    def take(i: Value) -> None:
        slot = f.index(line.taken) - 1 - i
        place = _place_of(f, search, _get(f, search, 0))
        target = line.target + slot * line.gap
        raw = f.load(MEMORY[search.dtype], f.pointer(search.source),
                     (line.source + place * line.gap) * size_of(search.dtype))  # fmt: skip
        f.store(raw, f.pointer(search.values), target * size_of(search.dtype))
        f.store(place, f.pointer(search.places), target * 8)
        _sink(f, search, 0, slot, _get(f, search, slot))

    f.loop(0, line.taken, take)


# elements


def _look(f: PhaseFunction, search: Search, line: Line, first: Value, lanes: int, mask: Value | None = None) -> None:
    """Offer those of the neighbours from place `first` on that beat the worst in the heap."""
    keys = _read(f, search, line.source + first, lanes, mask)
    wins = f.compare("sgt", keys, f.splat(_key_of(f, search, _get(f, search, 0)), lanes))
    wins = wins if mask is None else f.binary("and", wins, mask)
    rest = f.cast("zext", f.bitcast(wins, f"i{lanes}"), "i64")

    def one(rest: Value) -> tuple[Value]:
        lane = f.intrinsic("llvm.cttz.i64", "i64", rest, Value(f, "i1", "true"))
        _offer(f, search, line, first + lane)
        return (f.binary("and", rest, rest - 1),)

    f.loop_while(lambda rest: f.compare("ne", rest, 0), one, [rest])


def _emit_line(f: PhaseFunction, search: Search, line: Line) -> None:
    _fill(f, search, line)
    done = f.index(line.taken)
    if isinstance(line.gap, int) and line.gap == 1:
        lanes = search.lanes
        whole = f.index(f.divide(line.size - done, lanes)) * lanes + done
        f.loop(done, whole, lambda i: _look(f, search, line, i, lanes), step=lanes)
        done = whole
        if search.masked:
            mask = f.first_lanes(line.size - done, lanes)
            f.when(f.compare("slt", done, line.size), lambda: _look(f, search, line, done, lanes, mask))
            done = f.index(line.size)
    f.loop(done, line.size, lambda i: _offer(f, search, line, i))
    _empty(f, search, line)


# the kernel


def _parts(node: Node) -> tuple[Extent, Extent, Extent]:
    """Elements before, along and after the axis."""
    shape, axis = node.input(0).shape, node.attributes["axis"] % len(node.input(0).shape)
    return product(shape[:axis]), shape[axis], product(shape[axis + 1 :])


def _applies(node: Node, isa: Isa) -> bool:
    return node.dtype in MEMORY and bool(node.input(0).shape) and node.attributes["k"] * 16 <= HEAP_BYTES


def _cost(node: Node, isa: Isa) -> float:
    outer, length, inner = map(typical, _parts(node))
    count = min(node.attributes["k"], length)
    changes = count * (1 + math.log(max(length, 1) / max(count, 1)))
    looks = 4 * length / (isa.lanes if inner == 1 else 1)
    work = outer * inner * (60 + looks + CHANGE_CYCLES * (changes + count) * (1 + math.log2(max(count, 1))))
    return 0.2 + max(work / CYCLES_PER_MICROSECOND, traffic(node) / BYTES_PER_MICROSECOND)


def _job(build: KernelBuilder, node: Node) -> Search:
    dtype, count = node.dtype, node.attributes["k"]
    compared = compared_dtype(dtype)
    bits = bits_of(register_element(compared))
    return Search(dtype, compared, bool(node.attributes.get("largest", 1)), count, build.isa.lanes * 32 // bits,
                  can_mask(build.isa, [dtype]), *_parts(node), build.input(0), build.output(0), build.output(1),
                  build.scratch(max(count, 1) * bits // 4))  # fmt: skip


@kernel("TopK", on="cpu", when=_applies, cost=_cost)
def topk(build: KernelBuilder, node: Node) -> None:
    """A work item is a line along the axis."""
    search = _job(build, node)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        gap, size = f.extent(search.inner), f.extent(search.length)
        taken = f.minimum(search.count, size)

        def item(index: Value) -> None:
            row, column = f.divide(index, gap), f.remainder(index, gap)
            source, target = (f.index(row) * length * gap + column for length in (size, search.count))
            _emit_line(f, search, Line(source, target, gap, size, taken))

        each(f, begin, end, item)

    lines = product((search.outer, search.inner)) if search.count and search.length != 0 else 0
    build.phase(lines, body, GRAIN // (typical(search.length) + 1))

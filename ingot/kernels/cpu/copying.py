"""Code for copies of rows and tiles: runs of bytes, fills, reversed and strided lines, transposes in registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Function, Index, Value, element_of, lanes_of, vector

UNROLL = 4
LANE_BYTES = 16  # shuffles within 128 bits are the cheap ones


@dataclass(frozen=True)
class Place:
    """A pointer and the byte stride of the axis at hand."""

    pointer: Value
    stride: Index = 0

    def at(self, index: Index) -> Index:
        """Byte offset of the element `index` steps along the axis."""
        return multiply(index, self.stride)


def multiply(a: Index, b: Index) -> Index:
    """a * b with Python numbers folded."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if a == 0 or b == 0:
        return 0
    return b * a if isinstance(a, int) else a * b


def word(size: int) -> str:
    """The integer type of an element of `size` bytes."""
    return f"i{8 * size}"


# contiguous bytes


def copy_bytes(f: Function, isa: Isa, source: Value, target: Value, size: Index, unit: int = 1) -> None:
    """target[:size] = source[:size], a multiple of `unit` bytes; neither is touched beyond."""
    width = isa.lanes * 4

    def vectors(offset: Index, count: int) -> None:
        values = [f.load(vector("i8", width), source, offset + k * width, align=1) for k in range(count)]
        for k, value in enumerate(values):
            f.store(value, target, offset + k * width, align=1)

    if isinstance(size, int):
        _copy_static(f, source, target, size, width, vectors)
        return
    block = width * UNROLL
    wide = f.binary("and", size, -block)
    whole = f.binary("and", size, -width)
    f.loop(0, wide, lambda i: vectors(i, UNROLL), step=block)
    f.loop(wide, whole, lambda i: vectors(i, 1), step=width)
    rest = size - whole
    if isa.has("avx512bw"):
        f.when(f.compare("ne", rest, 0), lambda: _copy_masked(f, source, target, whole, rest, width))
    else:
        _copy_ladder(f, f.at(source, whole), f.at(target, whole), rest, width, unit)


def _copy_static(f: Function, source: Value, target: Value, size: int, width: int,
                 vectors: Callable[[Index, int], None]) -> None:  # fmt: skip
    """A known size: vectors in a loop, then the rest in pieces that may overlap."""
    blocks = size // (width * UNROLL)
    if blocks > 1:
        f.loop(0, blocks * width * UNROLL, lambda i: vectors(i, UNROLL), step=width * UNROLL)
    done = blocks * width * UNROLL if blocks > 1 else 0
    for offset in range(done, size - width + 1, width):
        vectors(offset, 1)
    done = size - size % width
    if done < size and size > width:
        vectors(size - width, 1)
        return
    for offset, piece in static_pieces(size - done):
        f.store(f.load(word(piece), source, done + offset, align=1), target, done + offset, align=1)


def static_pieces(size: int) -> list[tuple[int, int]]:
    """(offset, bytes) of power-of-two pieces that cover `size` bytes, the last of which may overlap the one before."""
    pieces: list[tuple[int, int]] = []
    done = 0
    while done < size:
        piece = 1 << (min(size - done, 32).bit_length() - 1)
        larger = 2 * piece
        if done and piece < size - done and larger <= size and larger <= pieces[-1][1]:
            pieces.append((size - larger, larger))
            break
        pieces.append((done, piece))
        done += piece
    return pieces


def _copy_masked(f: Function, source: Value, target: Value, offset: Index, rest: Value, width: int) -> None:
    """Fewer bytes than a vector, more than none."""
    mask = byte_mask(f, rest, width)
    value = f.load_masked(vector("i8", width), source, mask, offset)
    f.store_masked(value, target, mask, offset)


def byte_mask(f: Function, count: Value, width: int) -> Value:
    """The first `count` of `width` byte lanes, 0 < count <= width <= 64."""
    bits = f.binary("lshr", f.index(-1), 64 - count)
    return f.bitcast(f.cast("trunc", bits, f"i{width}") if width < 64 else bits, f"<{width} x i1>")


def _copy_ladder(f: Function, source: Value, target: Value, rest: Value, width: int, unit: int) -> None:
    """Fewer bytes than a vector in power-of-two pieces."""
    done: Value = f.index(0)
    piece = width // 2
    while piece >= unit:

        def copy(done: Value = done, piece: int = piece) -> tuple[Value]:
            f.store(f.load(word(piece), source, done, align=1), target, done, align=1)
            return (done + piece,)

        (done,) = f.when(f.compare("ne", f.binary("and", rest, piece), 0), copy, unchanged=(done,))
        piece //= 2


# lines: one axis, the target contiguous or not


def fill_line(f: Function, isa: Isa, element: Value, target: Value, count: Index) -> None:
    """target[:count] = element."""
    size = lanes_bytes(element)
    lanes = isa.lanes * 4 // size
    many = f.splat(element, lanes)
    whole = count - count % lanes if isinstance(count, int) else f.binary("and", count, -lanes)

    def vectors(i: Value) -> None:
        f.store(many, target, i * size, align=1)

    def single(i: Value) -> None:
        f.store(element, target, i * size, align=1)

    f.loop(0, whole, vectors, step=lanes)
    f.loop(whole, count, single)


def reversed_line(f: Function, isa: Isa, source: Value, target: Value, count: Index, size: int) -> None:
    """target[i] = source[-i] for i < count."""
    lanes = isa.lanes * 4 // size
    whole = count - count % lanes if isinstance(count, int) else f.binary("and", count, -lanes)

    def vectors(i: Value) -> None:
        value = f.load(vector(word(size), lanes), f.at(source, f.index(0) - i * size), (1 - lanes) * size, align=1)
        f.store(f.shuffle(value, None, range(lanes)[::-1]), target, i * size, align=1)

    def single(i: Value) -> None:
        f.store(f.load(word(size), source, f.index(0) - i * size, align=1), target, i * size, align=1)

    f.loop(0, whole, vectors, step=lanes)
    f.loop(whole, count, single)


def strided_line(f: Function, source: Place, target: Place, begin: Index, end: Index, size: int) -> None:
    """target[i·b] = source[i·a] for begin <= i < end."""

    def step(first: Value, count: int) -> None:
        places = [first + k for k in range(count)]
        values = [f.load(word(size), source.pointer, source.at(i), align=1) for i in places]
        for i, value in zip(places, values, strict=True):
            f.store(value, target.pointer, target.at(i), align=1)

    if isinstance(begin, int) and isinstance(end, int):
        whole: Index = begin + (end - begin) // UNROLL * UNROLL
    else:
        whole = begin + f.binary("and", f.index(f.maximum(end - begin, 0)), -UNROLL)
    f.loop(begin, whole, lambda i: step(i, UNROLL), step=UNROLL)
    f.loop(whole, end, lambda i: step(i, 1))


def lanes_bytes(value: Value) -> int:
    """Bytes of a scalar integer."""
    return int(value.type[1:]) // 8


# square transposes


def largest_tile(isa: Isa, size: int) -> int:
    """Rows of the square tile of elements of `size` bytes that fits into the registers."""
    if isa.registers >= 32:
        return min(16, isa.lanes * 4 // size)
    return {1: 16, 2: 8, 4: 8, 8: 4}[size]


def transpose_tile(f: Function, rows: Sequence[Value]) -> list[Value]:
    """n vectors of n lanes, transposed: first blocks of 128 bits across vectors, then within 128 bits."""
    count = len(rows)
    within = min(LANE_BYTES // (int(element_of(rows[0].type)[1:]) // 8), count)
    values, distance = list(rows), count // 2
    while distance >= within:
        _swap_blocks(f, values, distance)
        distance //= 2
    for first in range(0, count, within):
        values[first : first + within] = _interleaved(f, values[first : first + within], within)
    return values


def _swap_blocks(f: Function, values: list[Value], distance: int) -> None:
    """Off-diagonal blocks of `distance` lanes exchanged between rows `distance` apart."""
    count = len(values)
    low = [count + lane - distance if lane & distance else lane for lane in range(count)]
    high = [count + lane if lane & distance else lane + distance for lane in range(count)]
    for row in (row for row in range(count) if not row & distance):
        a, b = values[row], values[row + distance]
        values[row], values[row + distance] = f.shuffle(a, b, low), f.shuffle(a, b, high)


def _interleaved(f: Function, values: list[Value], within: int) -> list[Value]:
    """Every block of `within` lanes of these `within` vectors transposed: repeated perfect shuffles."""
    lanes, half = lanes_of(values[0].type), within // 2
    low = [base + lane + side * lanes for base in range(0, lanes, within) for lane in range(half) for side in (0, 1)]
    high = [lane + half for lane in low]
    for _ in range(within.bit_length() - 1):
        pairs = [(values[k], values[k + half]) for k in range(half)]
        values = [f.shuffle(a, b, order) for a, b in pairs for order in (low, high)]
    return values


def copy_tile(f: Function, source: Place, target: Place, size: int, rows: int) -> None:
    """target[j][i] = source[i][j] for i, j < rows; strides are those of source rows i and target rows j."""
    type_ = vector(word(size), rows)
    values = [f.load(type_, source.pointer, source.at(i), align=1) for i in range(rows)]
    for j, value in enumerate(transpose_tile(f, values)):
        f.store(value, target.pointer, target.at(j), align=1)

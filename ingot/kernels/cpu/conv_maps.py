"""Padded feature maps as tile registers read them: [image][step of channels][plane][position][part][64 bytes].

The planes are the remainders of a position by the stride, so that within a plane every tap is a shift and neighbouring
positions follow each other. A tile's rows are neighbouring positions of the flattened map, what lies between the rows
of the map included: it is computed and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ingot.dtypes import size_of as bytes_of
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_window import Axis, conv_axes
from ingot.kernels.cpu.gemm_tiles import ROW_BYTES, SECOND_CACHE, TALLEST, TileDot
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.tile_rows import pack_floats
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, add, ceil_div, product


@dataclass(frozen=True)
class Maps:
    """Prepared maps as products read them: `taps` are what each step of K reads, as (plane, rows down, bytes right)
    from a position, `pitch` the bytes to the next one, `part_bytes` those from a part to the next; `width` positions to
    a row of which `columns` count."""

    dot: TileDot
    batch: Extent
    rows: Extent
    columns: Extent
    width: Extent
    pitch: int
    steps: int
    planes: int
    plane_bytes: Extent
    taps: tuple[tuple[int, int, int], ...]
    part_bytes: int = ROW_BYTES

    @property
    def positions(self) -> Extent:
        """Flattened positions up to the last that counts."""
        return add(product((add(self.rows, -1), self.width)), self.columns)

    @property
    def blocks(self) -> Extent:
        """Blocks of 32 positions."""
        return ceil_div(self.positions, TALLEST)

    @property
    def step_bytes(self) -> Extent:
        """Bytes of all planes of a step."""
        return product((self.planes, self.plane_bytes))

    @property
    def bytes(self) -> Extent:
        """Bytes of an image."""
        return product((self.steps, self.step_bytes))

    def shift(self, f: PhaseFunction, tap: tuple[int, int, int]) -> Index:
        """Bytes from a position to what a tap reads."""
        plane, down, right = tap
        planes = plane * f.extent(self.plane_bytes) if plane else 0
        rows = down * (f.extent(self.width) * self.pitch) if down else 0
        return planes + rows + right


@dataclass(frozen=True)
class Window:
    """A convolution's sizes; positions are those of the flattened map with `width` to a row."""

    dot: TileDot
    batch: Extent
    inputs: int
    outputs: int
    rows: Axis
    columns: Axis
    copies_of_taps: int = 1  # weights that are sums of several parts pass the same tap several times

    @property
    def taps(self) -> list[tuple[int, int]]:
        """All taps, row by row."""
        return [(i, j) for i in range(self.rows.kernel) for j in range(self.columns.kernel)]

    @property
    def planes(self) -> list[tuple[int, int]]:
        """Remainders that taps read."""
        return sorted({self._remainder(tap) for tap in self.taps})

    def _remainder(self, tap: tuple[int, int]) -> tuple[int, int]:
        return tuple(k * a.dilation % a.stride for k, a in zip(tap, self.axes, strict=True))  # type: ignore[return-value]

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Rows, columns."""
        return self.rows, self.columns

    @property
    def height(self) -> Extent:
        """Rows of a plane."""
        return add(self.rows.output, (self.rows.kernel - 1) * self.rows.dilation // self.rows.stride)

    @property
    def width(self) -> Extent:
        """Positions of a row of a plane."""
        return add(self.columns.output, (self.columns.kernel - 1) * self.columns.dilation // self.columns.stride)

    @property
    def pixel(self) -> int:
        """Bytes of a position."""
        return self.dot.parts * ROW_BYTES

    @property
    def plane_bytes(self) -> Extent:
        """Bytes of a plane, and behind it what blocks read beyond the last position."""
        return product((add(product((self.height, self.width)), TALLEST), self.pixel))

    @property
    def steps(self) -> int:
        """Groups of input channels that a position holds."""
        return -(-self.inputs // self.dot.depth)

    def _read(self, tap: tuple[int, int]) -> tuple[int, int, int]:
        """(plane, rows down, bytes right) of what a tap reads."""
        down, right = (k * a.dilation // a.stride for k, a in zip(tap, self.axes, strict=True))
        return self.planes.index(self._remainder(tap)), down, right * self.pixel

    @property
    def copies(self) -> bool:
        """Whether output positions are input positions, so that blocks of them can be prepared one by one."""
        return all(axis.pointwise for axis in self.axes)

    @property
    def block_bytes(self) -> int:
        """Bytes of 32 positions of all channels."""
        return self.steps * TALLEST * self.pixel

    @property
    def block(self) -> Maps:
        """What products need to know of 32 positions prepared by themselves."""
        return replace(self.maps, planes=1, plane_bytes=TALLEST * self.pixel)

    @property
    def maps(self) -> Maps:
        """What products need to know."""
        taps = tuple(self._read(tap) for tap in self.taps for _ in range(self.copies_of_taps))
        size = self.rows.output, self.columns.output, self.width, self.pixel
        return Maps(self.dot, self.batch, *size, self.steps, len(self.planes), self.plane_bytes, taps)


def size_of(extent: Extent) -> int:
    """An extent that is known."""
    assert isinstance(extent, int)
    return extent


def window_of(node: Node, dot: TileDot) -> Window:
    """The node's convolution."""
    outputs, inputs, *kernel = (int(size) for size in node.input(1).shape)
    rows, columns = conv_axes(node, kernel)
    return Window(dot, node.output.shape[0], inputs, outputs, rows, columns)


_LANES = 16  # channels of a block of the input
_LINES = {4: "<16 x float>", 2: "<16 x i16>", 1: "<16 x i8>"}  # a block of a position, by the size of its type


@dataclass(frozen=True)
class Source:
    """The blocked input: bytes of an element, and the 32 bits that stand in for padding."""

    handle: Handle
    size: int
    signed: bool
    fill: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a channel block of a position."""
        return _LANES * self.size


def source_of(build: KernelBuilder) -> Source:
    """The node's input 0."""
    port, zero_point = build.node.input(0), int(build.node.attributes.get("x_zero_point", 0))
    signed = port.dtype == "int8"
    return Source(build.input(0), bytes_of(port.dtype), signed, fill_of(zero_point, signed))


def prepare(build: KernelBuilder, window: Window) -> Handle:
    """The first phase; a work item is a row of all planes of a step of an image. Padding is the input's zero point."""
    source = source_of(build)
    maps = window.maps
    target = build.temporary(product((window.batch, maps.bytes)))

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        height, width, plane = f.extent(window.height), f.extent(window.width), f.extent(window.plane_bytes)

        def item(number: Value) -> None:
            image_step, row = f.index(f.divide(number, height)), f.index(f.remainder(number, height))
            place = image_step * f.extent(maps.step_bytes) + row * (width * window.pixel)
            write = f.at(f.pointer(target), place)
            for index, remainder in enumerate(window.planes):
                _plane_row(f, window, source, image_step, row, remainder, f.at(write, index * plane))

        f.loop(begin, end, item)

    build.phase(product((window.batch, window.steps, window.height)), body, 2)
    return target


def fill_of(zero_point: int, signed: bool) -> int:
    """Four times the byte that stands for a zero point among unsigned bytes; signed ones count from -128."""
    return (zero_point + (128 if signed else 0)) * 0x01010101


def _plane_row(f: PhaseFunction, window: Window, source: Source, image_step: Value, row: Value,
               remainder: tuple[int, int], write: Value) -> None:  # fmt: skip
    rows, columns = window.axes
    below, right = remainder
    y = row * rows.stride + (below - rows.begin)
    height, width = f.extent(rows.input), f.extent(columns.input)
    first = max(-(-(columns.begin - right) // columns.stride), 0)
    behind = f.divide(width + (columns.begin - right + columns.stride - 1), columns.stride)
    last = f.minimum(f.maximum(behind, first), f.extent(window.width))

    def inside() -> None:
        x = first * columns.stride + right - columns.begin
        image, step = f.index(f.divide(image_step, window.steps)), f.index(f.remainder(image_step, window.steps))
        blocks, group = -(-window.inputs // _LANES), window.dot.depth // _LANES
        line = ((image * blocks + step * group) * height + y) * width + x
        read = f.at(f.pointer(source.handle), line * source.block_bytes)
        _fill(f, window, source, write, 0, first)
        _fill(f, window, source, write, last, f.extent(window.width))
        written = f.at(write, first * window.pixel)
        _by_count(f, window, step, lambda count: _positions(f, window, source, read, written, last - first, count))

    known = f.compare("ult", y, height)  # unsigned: rows before the map too are outside
    f.when(known, inside, lambda: _fill(f, window, source, write, 0, f.extent(window.width)))


def prepare_block(f: PhaseFunction, window: Window, source: Source, image: Index, first: Index, there: Index,
                  write: Value) -> None:  # fmt: skip
    """All steps of `there` positions from `first` on, of a window of one tap: [step][32 positions]."""
    area = f.extent(product((window.rows.input, window.columns.input)))
    blocks, group = -(-window.inputs // _LANES), window.dot.depth // _LANES

    def step(number: Value) -> None:
        line = (f.index(image) * blocks + number * group) * area + first
        read = f.at(f.pointer(source.handle), line * source.block_bytes)
        _fetch(f, window, source, read, area)
        target = f.at(write, number * (TALLEST * window.pixel))
        _by_count(f, window, number, lambda count: _positions(f, window, source, read, target, there, count))

    f.loop(0, window.steps, step)


def _fetch(f: PhaseFunction, window: Window, source: Source, read: Value, area: Index) -> None:
    """Ask for the next block's positions of a step."""
    size = TALLEST * source.block_bytes
    for block in range(window.dot.depth // _LANES):
        for line in range(size, 2 * size, ROW_BYTES):
            f.prefetch(read, block * area * source.block_bytes + line, SECOND_CACHE)


def _by_count(f: PhaseFunction, window: Window, step: Value, emit: Callable[[int], None]) -> None:
    """`emit` with the number of channel blocks that a step holds."""
    blocks, group = -(-window.inputs // _LANES), window.dot.depth // _LANES
    tail = blocks % group
    if not tail:
        emit(group)
    elif window.steps == 1:
        emit(tail)
    else:
        f.when(f.compare("slt", step, window.steps - 1), lambda: emit(group), lambda: emit(tail))


def _positions(f: PhaseFunction, window: Window, source: Source, read: Value, write: Value, there: Index,
               count: int) -> None:  # fmt: skip
    """Positions of a row whose step holds `count` channel blocks. What bytes lack meets weights of zero."""
    rows, columns = window.axes
    apart = f.extent(product((rows.input, columns.input))) * source.block_bytes
    stride, floats = columns.stride * source.block_bytes, source.size == 4

    def position(p: Value) -> None:
        x, y = f.at(read, p * stride), f.at(write, p * window.pixel)
        lines = [f.load(_LINES[source.size], x, block * apart) for block in range(count)]
        if floats:
            halves = [*lines, f.constant(_LINES[4], 0.0)][:2]
            pack_floats(f, window.dot, halves[0], halves[1], y, ROW_BYTES)
            return
        for block, line in enumerate(lines):
            f.store(f.binary("xor", line, -0x80) if source.signed else line, y, block * source.block_bytes)

    f.loop(0, there, position)


def _fill(f: PhaseFunction, window: Window, source: Source, write: Value, first: Index, last: Index) -> None:
    def position(p: Value) -> None:
        for part in range(window.dot.parts):
            f.store(f.constant("<16 x i32>", source.fill), write, p * window.pixel + part * ROW_BYTES)

    if not isinstance(first, int) or not isinstance(last, int) or first < last:
        f.loop(first, last, position)

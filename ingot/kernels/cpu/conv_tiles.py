"""Conv in tile registers (AMX): float32 as two bfloat16 parts or rounded to one, blocked maps, up to nine taps.

A first phase writes the padded input as [plane][position][32 high | 32 low parts] for every 32 channels; the planes
are the remainders of a position by the stride, so that within a plane every tap is a shift and 16 neighbouring
positions lie a row of parts apart. A tile's rows are neighbouring positions of the flattened map, what lies between the
rows of the map included: it is computed and dropped. Then y = Σ over channels and taps, 32 positions by 32 channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.config import BFLOAT16_ERROR, SPLIT_ERROR
from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_epilogue import (
    INLINE_LIMIT,
    Epilogue,
    block_values,
    can_finish,
    epilogue_of,
    extra_layouts,
    finish,
    rendered_lines,
)
from ingot.kernels.cpu.conv_window import Axis, conv_axes
from ingot.kernels.cpu.gemm_plan import GIGAHERTZ
from ingot.kernels.cpu.gemm_tiles import (
    COLUMNS,
    ROUNDED,
    ROW_BYTES,
    ROWS,
    SPLIT,
    TALLEST,
    Rows,
    TileDot,
    add_products,
    begin,
    configuration,
    configure,
    end,
    pack_tiles,
    release,
)
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.cpu.tile_rows import pack_floats
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

MOST_TAPS = 9
_VECTOR, _VECTOR_TYPE = 64, "<16 x float>"  # a channel block of a position: bytes, numbers
_PRODUCT_CYCLES, _BLOCK_CYCLES = 20, 1500
_ROW_BYTES_PER_MICROSECOND, _WEIGHTS_PER_MICROSECOND = 30_000, 16_000


@dataclass(frozen=True)
class Window:
    """A convolution's sizes; positions are those of the flattened map with `width` to a row."""

    batch: Extent
    inputs: int
    outputs: int
    rows: Axis
    columns: Axis
    dot: TileDot

    @property
    def pixel(self) -> int:
        """Bytes of 32 channels of a position: high parts, low parts."""
        return self.dot.parts * ROW_BYTES

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
    def height(self) -> int:
        """Rows of a plane."""
        return _size(self.rows.output) + (self.rows.kernel - 1) * self.rows.dilation // self.rows.stride

    @property
    def width(self) -> int:
        """Positions of a row of a plane."""
        return _size(self.columns.output) + (self.columns.kernel - 1) * self.columns.dilation // self.columns.stride

    @property
    def positions(self) -> int:
        """Flattened positions up to the last that counts."""
        return (_size(self.rows.output) - 1) * self.width + _size(self.columns.output)

    @property
    def plane_bytes(self) -> int:
        """Bytes of a plane, and behind it what blocks read beyond the last position."""
        return (self.height * self.width + TALLEST) * self.pixel

    @property
    def steps(self) -> int:
        """Groups of 32 input channels."""
        return -(-self.inputs // self.dot.depth)

    @property
    def step_bytes(self) -> int:
        """Bytes of all planes of a step."""
        return len(self.planes) * self.plane_bytes

    def shift(self, tap: tuple[int, int]) -> int:
        """Bytes from an output position to what a tap reads."""
        down, right = (k * a.dilation // a.stride for k, a in zip(tap, self.axes, strict=True))
        return self.planes.index(self._remainder(tap)) * self.plane_bytes + (down * self.width + right) * self.pixel


def _size(extent: Extent) -> int:
    assert isinstance(extent, int)
    return extent


def window_of(node: Node, dot: TileDot) -> Window:
    """The node's convolution; its map has known sizes."""
    outputs, inputs, *kernel = (int(size) for size in node.input(1).shape)
    rows, columns = conv_axes(node, kernel)
    return Window(node.output.shape[0], inputs, outputs, rows, columns, dot)


def _applies(node: Node, isa: Isa) -> bool:
    x, weight = node.input(0), node.input(1)
    if not isa.has("amx_bf16") or x.dtype != "float32" or weight.constant is None or len(x.shape) != 4:
        return False
    outputs, inputs, *kernel = (int(size) for size in weight.shape)
    static = all(isinstance(size, int) and size > 0 for size in (*x.shape[1:], *node.output.shape[1:]))
    fits = static and node.attributes["group"] == 1 and inputs % COLUMNS == 0 and outputs >= COLUMNS
    return fits and math.prod(kernel) <= MOST_TAPS and can_finish(node, 2)


def _cost(node: Node, dot: TileDot, wide: int) -> float:
    window = window_of(node, dot)
    batch = window.batch if isinstance(window.batch, int) else 1
    blocks, panels = -(-window.positions // TALLEST), -(-window.outputs // (wide * COLUMNS))
    products = window.steps * len(window.taps) * len(dot.products) * 2 * wide * _PRODUCT_CYCLES
    compute = batch * blocks * panels * (products + _BLOCK_CYCLES) / (GIGAHERTZ * 1000)
    prepared = batch * window.steps * window.step_bytes * (1 + 2 / dot.parts) / _ROW_BYTES_PER_MICROSECOND
    weights = window.outputs * window.inputs * len(window.taps) * 2 * dot.parts / _WEIGHTS_PER_MICROSECOND
    return 2 + compute + prepared + weights


def _declaration(dot: TileDot) -> dict[str, Any]:
    """when, space, layouts and cost of a kernel that multiplies by `dot`."""
    return {
        "when": _applies,
        "cost": lambda node, isa, wide: _cost(node, dot, wide),
        "layouts": lambda node, isa: [Ports(("blocked", "", *extra_layouts(node, 2)), ("blocked",))],
        "space": {"wide": lambda node, isa: (2, 1) if node.input(1).shape[0] > COLUMNS else (1,)},
    }


@kernel("Conv", on="cpu", **_declaration(SPLIT), tolerance=SPLIT_ERROR)
def conv_split(build: KernelBuilder, node: Node, wide: int) -> None:
    """float32 in three products of bfloat16 parts."""
    _emit(build, node, SPLIT, wide)


@kernel("Conv", on="cpu", **_declaration(ROUNDED), tolerance=BFLOAT16_ERROR)
def conv_rounded(build: KernelBuilder, node: Node, wide: int) -> None:
    """float32 rounded to bfloat16, sums in float32."""
    _emit(build, node, ROUNDED, wide)


def _emit(build: KernelBuilder, node: Node, dot: TileDot, wide: int) -> None:
    """A work item is 32 positions by a panel of output channels; the larger operand is read once."""
    window, weight = window_of(node, dot), node.input(1).constant
    assert weight is not None
    maps = _planes(build, window)
    packed = build.pack(_packed(weight, window, wide))
    job = _Job(window, wide, maps, packed, build.pack(configuration()), epilogue_of(build, node, 2),
               build.scratch(TALLEST * wide * ROW_BYTES))  # fmt: skip

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        configure(f, job.shape)
        f.loop(begin, end, lambda item: _item(f, job, item))
        release(f)

    build.phase(product((window.batch, job.panels, job.blocks)), body)


def _packed(weight: Any, window: Window, wide: int) -> Any:
    """w[O, I, *K] → tiles in the order [panel][32 channels][tap]."""
    taps = len(window.taps)
    depth = window.dot.depth
    full = np.zeros((window.steps * depth, taps, window.outputs), np.float32)
    full[: window.inputs] = weight.reshape(window.outputs, window.inputs, taps).transpose(1, 2, 0)
    ordered = full.reshape(window.steps, depth, taps, window.outputs).transpose(0, 2, 1, 3)
    return pack_tiles(np.ascontiguousarray(ordered).reshape(-1, window.outputs), window.dot, wide)


# the planes


def _planes(build: KernelBuilder, window: Window) -> Handle:
    """The first phase; a work item is a row of all planes of a step of an image."""
    source = build.input(0)
    target = build.temporary(product((window.batch, window.steps * window.step_bytes)))
    height = window.height

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def item(number: Value) -> None:
            image_step, row = f.index(f.divide(number, height)), f.index(f.remainder(number, height))
            write = f.at(f.pointer(target), image_step * window.step_bytes + row * (window.width * window.pixel))
            for index, remainder in enumerate(window.planes):
                plane = f.at(write, index * window.plane_bytes)
                _plane_row(f, window, source, image_step, row, remainder, plane)

        f.loop(begin, end, item)

    build.phase(product((window.batch, window.steps, height)), body, 2)
    return target


def _plane_row(f: PhaseFunction, window: Window, source: Handle, image_step: Value, row: Value,
               remainder: tuple[int, int], write: Value) -> None:  # fmt: skip
    rows, columns = window.axes
    below, right = remainder
    y = row * rows.stride + (below - rows.begin)
    first = max(-(-(columns.begin - right) // columns.stride), 0)
    last = min(max(-(-(_size(columns.input) + columns.begin - right) // columns.stride), first), window.width)

    def inside() -> None:
        x = first * columns.stride + right - columns.begin
        image, step = f.index(f.divide(image_step, window.steps)), f.index(f.remainder(image_step, window.steps))
        blocks = window.inputs // COLUMNS
        line = ((image * blocks + step * 2) * _size(rows.input) + y) * _size(columns.input) + x
        read = f.at(f.pointer(source), line * _VECTOR)
        second = _size(rows.input) * _size(columns.input) * _VECTOR
        _zero(f, window, write, 0, first)
        _zero(f, window, write, last, window.width)
        if blocks % 2 == 0:
            _positions(f, window, read, second, write, first, last)
        else:
            whole = f.compare("slt", step, window.steps - 1)
            f.when(whole, lambda: _positions(f, window, read, second, write, first, last),
                   lambda: _positions(f, window, read, None, write, first, last))  # fmt: skip

    known = f.compare("ult", y, _size(rows.input))  # unsigned: rows before the map too are outside
    f.when(known, inside, lambda: _zero(f, window, write, 0, window.width))


def _positions(f: PhaseFunction, window: Window, read: Value, second: int | None, write: Value, first: int,
               last: int) -> None:  # fmt: skip
    stride = window.columns.stride * _VECTOR

    def position(p: Value) -> None:
        x = f.at(read, (p - first) * stride)
        halves = [f.constant(_VECTOR_TYPE, 0.0) if i is None else f.load(_VECTOR_TYPE, x, i) for i in (0, second)]
        pack_floats(f, window.dot, halves[0], halves[1], f.at(write, p * window.pixel), ROW_BYTES)

    f.loop(first, last, position)


def _zero(f: PhaseFunction, window: Window, write: Value, first: int, last: int) -> None:
    def position(p: Value) -> None:
        for part in range(window.dot.parts):
            f.store(f.constant("<16 x i32>", 0), write, p * window.pixel + part * ROW_BYTES)

    if first < last:
        f.loop(first, last, position)


# the products


@dataclass(frozen=True, eq=False)
class _Job:
    window: Window
    wide: int
    maps: Handle
    packed: Handle
    shape: Handle
    epilogue: Epilogue
    slot: int

    @property
    def blocks(self) -> int:
        """Blocks of 32 positions."""
        return -(-self.window.positions // TALLEST)

    @property
    def panels(self) -> int:
        """Panels of output channels."""
        return -(-self.window.outputs // (self.wide * COLUMNS))

    @property
    def tap_bytes(self) -> int:
        """Packed weights of a tap of a step."""
        return self.wide * self.window.dot.right_bytes

    @property
    def panel_bytes(self) -> int:
        """Packed weights of a panel."""
        return self.window.steps * len(self.window.taps) * self.tap_bytes

    @property
    def panels_outside(self) -> bool:
        """Whether all blocks pass a panel before the next one: where the weights are the larger operand."""
        return self.panels * self.panel_bytes > self.window.steps * self.window.step_bytes

    @property
    def share(self) -> int:
        """Bytes of the next panel that a block fetches with every tap."""
        return -(-self.tap_bytes // (self.blocks * ROW_BYTES)) * ROW_BYTES if self.panels_outside else 0


def _item(f: PhaseFunction, job: _Job, item: Value) -> None:
    window, count = job.window, job.panels * job.blocks
    image, place = f.index(f.divide(item, count)), f.index(f.remainder(item, count))
    inner = job.blocks if job.panels_outside else job.panels
    outer, number = f.index(f.divide(place, inner)), f.index(f.remainder(place, inner))
    panel, block = (outer, number) if job.panels_outside else (number, outer)
    start = image * (window.steps * window.step_bytes) + block * (TALLEST * window.pixel)
    left, right = f.at(f.pointer(job.maps), start), f.at(f.pointer(job.packed), panel * job.panel_bytes)
    far = f.at(right, block * (job.share * window.steps * len(window.taps)) + job.panel_bytes)
    tops = 2 if window.positions > ROWS else 1
    begin(f, tops, job.wide, None)

    def step(_: Value, *pointers: Value) -> list[Value]:
        maps, weights, ahead = pointers
        for number, tap in enumerate(window.taps):
            rows = [f.at(maps, window.shift(tap) + top * ROWS * window.pixel) for top in range(tops)]
            place = f.at(weights, number * job.tap_bytes)
            fetched = f.at(ahead, number * job.share)
            add_products(f, window.dot, job.wide, Rows(rows, ROW_BYTES, window.pixel), place, fetched, job.share)
        taps = len(window.taps)
        moved = f.at(maps, window.step_bytes)
        return [moved, f.at(weights, taps * job.tap_bytes), f.at(ahead, taps * job.share)]

    f.loop(0, window.steps, step, [left, right, far])
    slot = f.at(f.scratch, job.slot)
    end(f, tops, job.wide, slot)
    _finish(f, job, image, panel, block, slot)


def _finish(f: PhaseFunction, job: _Job, image: Value, panel: Value, block: Value, slot: Value) -> None:
    """The sums of a block through the epilogue to those of its positions that count: run by run of the map's rows."""
    window, wide = job.window, job.wide
    height, width = _size(window.rows.output), _size(window.columns.output)
    blocks = -(-window.outputs // COLUMNS)
    first = block * TALLEST
    there = f.index(f.minimum(TALLEST, f.index(window.positions) - first))
    channel = panel * wide

    def vectors(count: int) -> None:
        values = [block_values(f, job.epilogue, channel + j) for j in range(count)]
        plane = (image * blocks + channel) * (height * width)

        def run(r: Value, place: Value, length: Value) -> None:
            _finish_run(f, job, values, f.at(slot, r * (wide * ROW_BYTES)), (plane + place) * COLUMNS, length)

        if window.width == width:
            run(f.index(0), first, there)
            return

        def row(_: Value, r: Value, y: Value, x: Value) -> list[Value]:
            run(r, y * width + x, f.index(f.maximum(f.minimum(f.index(width) - x, there - r), 0)))
            return [r + window.width - x, y + 1, f.index(0)]

        y, x = f.index(f.divide(first, window.width)), f.index(f.remainder(first, window.width))
        f.loop(0, f.divide(x + there + (window.width - 1), window.width), row, [f.index(0), y, x])

    if blocks % wide == 0:
        vectors(wide)
        return
    whole = f.compare("sle", channel + wide, blocks)
    f.when(whole, lambda: vectors(wide), lambda: vectors(blocks % wide))


def _finish_run(f: PhaseFunction, job: _Job, values: Sequence[Sequence[Value | None]], slot: Value, element: Value,
                length: Value) -> None:  # fmt: skip
    """Neighbouring positions of all blocks of channels, whose sums lie at `slot`."""
    window = job.window
    plane = _size(window.rows.output) * _size(window.columns.output) * COLUMNS
    lines = rendered_lines(job.epilogue) * len(values)
    unroll = next(u for u in (4, 2, 1) if u == 1 or u * lines <= INLINE_LIMIT)

    def positions(count: int) -> Callable[[Value], None]:
        def body(p: Value) -> None:
            sums, place = f.at(slot, p * (job.wide * ROW_BYTES)), element + p * COLUMNS
            for u in range(count):
                for j, own in enumerate(values):
                    total = f.load(_VECTOR_TYPE, sums, (u * job.wide + j) * ROW_BYTES)
                    finish(f, job.epilogue, total, own, place + j * plane, u * COLUMNS)

        return body

    whole = f.index(f.divide(length, unroll)) * unroll
    f.loop(0, whole, positions(unroll), step=unroll)
    if unroll > 1:
        f.loop(whole, length, positions(1))

"""Conv of up to four channels in tile registers, what pictures meet first: its sizes, and bytes (floats:
conv_stem_floats.py).

A first phase writes the padded input as [image][part][plane][row][column][4 channels]; planes are the remainders of a
row by the stride. A row of a tile is 16 neighbouring columns of bytes of an input row (8 of bfloat16), at a pitch of
`stride` columns to the next output position, so that rows overlap in memory and nothing is copied per window; columns
that no tap has get weights of zero. A step of K is one row of the window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ingot.dtypes import size_of as bytes_of
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_byte_sums import start_of_bytes
from ingot.kernels.cpu.conv_finish import Job
from ingot.kernels.cpu.conv_maps import Maps, fill_of, size_of
from ingot.kernels.cpu.conv_tiles import (
    byte_parts,
    centred_weight,
    declaration,
    emit_prepared,
    fits_tiles,
    takes_weights,
)
from ingot.kernels.cpu.conv_window import Axis, conv_axes, unravel
from ingot.kernels.cpu.gemm_dot import SHORT
from ingot.kernels.cpu.gemm_pack import Array
from ingot.kernels.cpu.gemm_tiles import BYTES, ROW_BYTES, TALLEST, TileDot, pack_tiles
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.linear import zero_points
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

CHANNELS = 4  # of a position, whether there are that many or not
LANES = 16  # positions of a vector
_QUAD = 4  # bytes of a position of bytes


@dataclass(frozen=True)
class Stem:
    """The convolution's sizes."""

    dot: TileDot
    batch: Extent
    inputs: int
    outputs: int
    rows: Axis
    columns: Axis

    @property
    def position(self) -> int:
        """Bytes of a position."""
        return CHANNELS * ROW_BYTES // self.dot.depth

    @property
    def span(self) -> int:
        """Columns that a tile's row holds."""
        return ROW_BYTES // self.position

    @property
    def planes(self) -> list[int]:
        """Remainders that rows of the window read."""
        return sorted({i * self.rows.dilation % self.rows.stride for i in range(self.rows.kernel)})

    @property
    def height(self) -> int:
        """Rows of a plane."""
        return size_of(self.rows.output) + (self.rows.kernel - 1) * self.rows.dilation // self.rows.stride

    @property
    def length(self) -> int:
        """Columns of a prepared row: whole vectors of the input, and all that tiles read."""
        axis = self.columns
        written = axis.begin + -(-size_of(axis.input) // LANES) * LANES
        read = (size_of(axis.output) - 1) * axis.stride + self.span
        return -(-max(written, read) // axis.stride) * axis.stride

    @property
    def plane_bytes(self) -> int:
        """Bytes of a plane, and behind it what blocks read beyond the last position."""
        return (self.height * self.length + TALLEST * self.columns.stride) * self.position + ROW_BYTES

    @property
    def part_bytes(self) -> int:
        """Bytes of all planes of a part."""
        return len(self.planes) * self.plane_bytes

    @property
    def maps(self) -> Maps:
        """What products need to know."""
        taps = []
        for i in range(self.rows.kernel):
            down, remainder = divmod(i * self.rows.dilation, self.rows.stride)
            taps.append((self.planes.index(remainder), down, 0))
        stride, planes = self.columns.stride, len(self.planes) * self.dot.parts
        size = self.rows.output, self.columns.output, self.length // stride, stride * self.position
        return Maps(self.dot, self.batch, *size, 1, planes, self.plane_bytes, tuple(taps), self.part_bytes)


def stem_of(node: Node, dot: TileDot) -> Stem:
    """The node's convolution; its map has known sizes."""
    outputs, inputs, *kernel = (int(size) for size in node.input(1).shape)
    rows, columns = conv_axes(node, kernel)
    return Stem(dot, node.output.shape[0], inputs, outputs, rows, columns)


def _applies(node: Node, isa: Isa) -> bool:
    if not isa.has("amx_int8") or node.dtype not in SHORT or not is_stem(node, BYTES, "int32"):
        return False
    return takes_weights(node)


def is_stem(node: Node, dot: TileDot, accumulator: str) -> bool:
    """Whether the channels are few, the sizes known, and a row of the window fits into a tile's row."""
    static = all(isinstance(size, int) for size in (*node.input(0).shape[2:], *node.output.shape[2:]))
    if not fits_tiles(node, accumulator) or not static:
        return False
    stem = stem_of(node, dot)
    reach = (stem.columns.kernel - 1) * stem.columns.dilation + 1
    return stem.inputs <= CHANNELS and reach <= stem.span and stem.rows.kernel <= LANES


@kernel("Conv", on="cpu", **declaration(_applies, lambda node: stem_of(node, BYTES).maps, "plain"))
def conv_stem_bytes(build: KernelBuilder, node: Node, wide: int) -> None:
    """uint8 or int8 of up to four channels by int8 or uint8, exactly, with sums in int32."""
    stem, weight = stem_of(node, BYTES), centred_weight(node)
    form, parts = (zero_points(node)[0], node.dtype == "int8"), byte_parts(weight)
    prepared = prepare(build, stem, lambda f, read, write: _row(f, stem, read, write, form),
                       lambda f, write: _fill(f, write, fill_of(*form), range(stem.length)))  # fmt: skip
    packed = build.pack(pack_tiles(np.concatenate([spread(part, stem) for part in parts]), BYTES, wide))
    maps = replace(stem.maps, taps=stem.maps.taps * len(parts))
    emit_prepared(build, Job(maps, wide, packed, *start_of_bytes(build, node, weight, wide)), prepared)


def spread(weight: Array, stem: Stem) -> Array:
    """w[O, C, rows, columns] → [rows × span × 4 channels, O], zeros where the window has no tap."""
    made = np.zeros((stem.rows.kernel, stem.span, CHANNELS, stem.outputs), weight.dtype)
    taps = np.arange(stem.columns.kernel) * stem.columns.dilation
    made[:, taps, : stem.inputs] = weight.transpose(2, 3, 1, 0)
    return made.reshape(-1, stem.outputs)


# the planes


Row = Callable[[PhaseFunction, Value, Value], None]  # (f, where a row of the input lies, where it goes)
Padding = Callable[[PhaseFunction, Value], None]  # (f, where a row of nothing but padding goes)


def prepare(build: KernelBuilder, stem: Stem, row: Row, padding: Padding) -> Handle:
    """The first phase; a work item is a row of a plane of an image."""
    source, maps, planes = build.input(0), stem.maps, stem.planes
    target, element = build.temporary(product((stem.batch, maps.step_bytes))), bytes_of(build.node.dtype)
    width, area = size_of(stem.columns.input), size_of(stem.rows.input) * size_of(stem.columns.input)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def item(number: Value) -> None:
            image, plane, line = (f.index(i) for i in unravel(f, number, (stem.batch, len(planes), stem.height)))
            remainder = f.index(planes[0])
            for index, other in enumerate(planes[1:], 1):
                remainder = f.select(f.compare("eq", plane, index), f.index(other), remainder)
            place = image * size_of(maps.step_bytes) + plane * stem.plane_bytes + line * (stem.length * stem.position)
            y = line * stem.rows.stride + remainder - stem.rows.begin
            write = f.at(f.pointer(target), place)
            read = f.at(f.pointer(source), (image * (stem.inputs * area) + y * width) * element)
            known = f.compare("ult", y, size_of(stem.rows.input))  # unsigned: rows before the map too are outside
            f.when(known, lambda: row(f, read, write), lambda: padding(f, write))

        f.loop(begin, end, item)

    build.phase(product((stem.batch, len(planes), stem.height)), body, 4)
    return target


def _row(f: PhaseFunction, stem: Stem, read: Value, write: Value, form: tuple[int, bool]) -> None:
    """A row of the input between its padding, channels side by side."""
    zero_point, signed = form
    size, area = size_of(stem.columns.input), size_of(stem.rows.input) * size_of(stem.columns.input)
    begin, whole = stem.columns.begin, size // LANES * LANES

    def quads(x: Value, mask: Value | None) -> None:
        joined = f.constant("<16 x i32>", 0)
        for channel in range(stem.inputs):
            there = f.at(read, channel * area)
            raw = (f.load("<16 x i8>", there, x) if mask is None
                   else f.load_masked("<16 x i8>", there, mask, x, zero_point))  # fmt: skip
            joined = f.binary("or", joined, f.binary("shl", f.cast("zext", raw, "i32"), 8 * channel))
        joined = f.binary("xor", joined, -0x7F7F7F80) if signed else joined
        f.store(joined, write, (x + begin) * _QUAD, align=_QUAD)

    _fill(f, write, fill_of(zero_point, signed), range(begin))
    f.loop(0, whole, lambda x: quads(x, None), step=LANES)
    if size > whole:
        quads(f.index(whole), f.first_lanes(size - whole, LANES))
    _fill(f, write, fill_of(zero_point, signed), range(begin + -(-size // LANES) * LANES, stem.length))


def _fill(f: PhaseFunction, write: Value, fill: int, columns: range) -> None:
    whole = columns.start + len(columns) // LANES * LANES
    value = f.constant("<16 x i32>", fill)
    f.loop(columns.start, whole, lambda x: f.store(value, write, x * _QUAD, align=_QUAD), step=LANES)
    single = f.constant("i32", fill)
    f.loop(whole, columns.stop, lambda x: f.store(single, write, x * _QUAD, align=_QUAD))

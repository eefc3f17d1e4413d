"""Conv of up to four channels of float32 in tile registers: what pictures meet first (bytes: conv_stem.py).

A first phase writes the padded input as [image][part][plane][row][column][4 channels] in bfloat16; planes are the
remainders of a row by the stride. A row of a tile is 8 neighbouring columns of an input row, at a pitch of `stride`
columns to the next output position, so that rows overlap in memory and nothing is copied per window; weights of columns
that no tap has are zero. A step of K is one row of the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ingot.config import BFLOAT16_ERROR, SPLIT_ERROR
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_epilogue import epilogue_of
from ingot.kernels.cpu.conv_maps import Maps, size_of
from ingot.kernels.cpu.conv_tiles import Job, declaration, emit_prepared, fits_tiles
from ingot.kernels.cpu.conv_window import Axis, conv_axes, unravel
from ingot.kernels.cpu.gemm_pack import Array
from ingot.kernels.cpu.gemm_tiles import ROUNDED, ROW_BYTES, SPLIT, TALLEST, TileDot, pack_tiles
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.cpu.tile_rows import rounded_parts
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

_CHANNELS, _POSITION = 4, 8  # of a position, whether there are that many or not; its bytes
_SPAN = ROW_BYTES // _POSITION  # columns that a tile's row holds
_LANES = 16  # positions of a vector


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
        written = axis.begin + -(-size_of(axis.input) // _LANES) * _LANES
        read = (size_of(axis.output) - 1) * axis.stride + _SPAN
        return -(-max(written, read) // axis.stride) * axis.stride

    @property
    def plane_bytes(self) -> int:
        """Bytes of a plane, and behind it what blocks read beyond the last position."""
        return (self.height * self.length + TALLEST * self.columns.stride) * _POSITION + ROW_BYTES

    @property
    def part_bytes(self) -> int:
        """Bytes of all planes of the high or of the low parts."""
        return len(self.planes) * self.plane_bytes

    @property
    def maps(self) -> Maps:
        """What products need to know."""
        taps = []
        for i in range(self.rows.kernel):
            down, remainder = divmod(i * self.rows.dilation, self.rows.stride)
            taps.append((self.planes.index(remainder), down, 0))
        stride, planes = self.columns.stride, len(self.planes) * self.dot.parts
        size = self.rows.output, self.columns.output, self.length // stride, stride * _POSITION
        return Maps(self.dot, self.batch, *size, 1, planes, self.plane_bytes, tuple(taps), self.part_bytes)


def stem_of(node: Node, dot: TileDot) -> Stem:
    """The node's convolution; its map has known sizes."""
    outputs, inputs, *kernel = (int(size) for size in node.input(1).shape)
    rows, columns = conv_axes(node, kernel)
    return Stem(dot, node.output.shape[0], inputs, outputs, rows, columns)


def _applies(node: Node, isa: Isa) -> bool:
    weight = node.input(1)
    floats = isa.has("amx_bf16") and node.dtype == weight.dtype == "float32"
    static = all(isinstance(size, int) for size in (*node.input(0).shape[2:], *node.output.shape[2:]))
    if not floats or not static or not fits_tiles(node, "float32"):
        return False
    stem = stem_of(node, ROUNDED)
    span = (stem.columns.kernel - 1) * stem.columns.dilation + 1
    return stem.inputs <= _CHANNELS and span <= _SPAN and stem.rows.kernel <= 2 * _SPAN


@kernel("Conv", on="cpu", tolerance=SPLIT_ERROR,
        **declaration(_applies, lambda node: stem_of(node, SPLIT).maps, "plain"))  # fmt: skip
def conv_stem_split(build: KernelBuilder, node: Node, wide: int) -> None:
    """float32 as the sum of two bfloat16 numbers."""
    _emit(build, node, SPLIT, wide)


@kernel("Conv", on="cpu", tolerance=BFLOAT16_ERROR,
        **declaration(_applies, lambda node: stem_of(node, ROUNDED).maps, "plain"))  # fmt: skip
def conv_stem_rounded(build: KernelBuilder, node: Node, wide: int) -> None:
    """float32 rounded to bfloat16, sums in float32."""
    _emit(build, node, ROUNDED, wide)


def _emit(build: KernelBuilder, node: Node, dot: TileDot, wide: int) -> None:
    stem, weight = stem_of(node, dot), node.input(1).constant
    assert weight is not None
    prepared = _prepare(build, stem)
    packed = build.pack(pack_tiles(_spread(weight, stem), dot, wide))
    emit_prepared(build, Job(stem.maps, wide, packed, None, epilogue_of(build, node, 2)), prepared)


def _spread(weight: Array, stem: Stem) -> Array:
    """w[O, C, rows, columns] → [rows × 8 columns × 4 channels, O], zeros where the window has no tap."""
    spread = np.zeros((stem.rows.kernel, _SPAN, _CHANNELS, stem.outputs), weight.dtype)
    taps = np.arange(stem.columns.kernel) * stem.columns.dilation
    spread[:, taps, : stem.inputs] = weight.transpose(2, 3, 1, 0)
    return spread.reshape(-1, stem.outputs)


# the planes


def _prepare(build: KernelBuilder, stem: Stem) -> Handle:
    """A work item is a row of a plane of an image."""
    source, planes, maps = build.input(0), stem.planes, stem.maps
    target = build.temporary(product((stem.batch, maps.step_bytes)))
    width, area = size_of(stem.columns.input), size_of(stem.rows.input) * size_of(stem.columns.input)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def item(number: Value) -> None:
            image, plane, row = (f.index(i) for i in unravel(f, number, (stem.batch, len(planes), stem.height)))
            remainder = f.index(planes[0])
            for index, other in enumerate(planes[1:], 1):
                remainder = f.select(f.compare("eq", plane, index), f.index(other), remainder)
            y = row * stem.rows.stride + remainder - stem.rows.begin
            place = image * size_of(maps.step_bytes) + plane * stem.plane_bytes + row * (stem.length * _POSITION)
            write = f.at(f.pointer(target), place)
            read = f.at(f.pointer(source), (image * (stem.inputs * area) + y * width) * 4)
            known = f.compare("ult", y, size_of(stem.rows.input))  # unsigned: rows before the map too are outside
            f.when(known, lambda: _row(f, stem, read, write), lambda: _zero(f, stem, write, range(stem.length)))

        f.loop(begin, end, item)

    build.phase(product((stem.batch, len(planes), stem.height)), body, 4)
    return target


def _row(f: PhaseFunction, stem: Stem, read: Value, write: Value) -> None:
    """A row of the input between its padding, channels side by side."""
    size, area = size_of(stem.columns.input), size_of(stem.rows.input) * size_of(stem.columns.input)
    begin, whole = stem.columns.begin, size // _LANES * _LANES

    def vector(x: Value, mask: Value | None) -> None:
        channels = []
        for channel in range(stem.inputs):
            there = f.at(read, channel * area * 4 + x * 4)
            numbers = f.load("<16 x float>", there) if mask is None else f.load_masked("<16 x float>", there, mask, 0)
            channels.append(rounded_parts(f, stem.dot, numbers))
        for part, words in enumerate(zip(*channels, strict=True)):
            target = f.at(write, (x + begin) * _POSITION + part * stem.part_bytes)
            for half, joined in enumerate(_side_by_side(f, words)):
                f.store(joined, target, half * ROW_BYTES, align=_POSITION)

    _zero(f, stem, write, range(begin))
    f.loop(0, whole, lambda x: vector(x, None), step=_LANES)
    if size > whole:
        vector(f.index(whole), f.first_lanes(size - whole, _LANES))
    _zero(f, stem, write, range(begin + -(-size // _LANES) * _LANES, stem.length))


def _side_by_side(f: PhaseFunction, words: tuple[Value, ...]) -> tuple[Value, Value]:
    """Up to four vectors of 16 positions → two of 8 positions × 4 channels."""
    wide = [f.cast("zext", f.bitcast(word, "<16 x i16>"), "i32") for word in words]
    pairs = [f.constant("<16 x i32>", 0)] * 2
    for channel, word in enumerate(wide):
        shifted = f.binary("shl", word, 16) if channel % 2 else word
        pairs[channel // 2] = f.binary("or", pairs[channel // 2], shifted)
    low, high = ([lane for i in range(8) for lane in (first + i, 16 + first + i)] for first in (0, 8))
    return f.shuffle(pairs[0], pairs[1], low), f.shuffle(pairs[0], pairs[1], high)


def _zero(f: PhaseFunction, stem: Stem, write: Value, columns: range) -> None:
    """Padding: zeros in all parts of these columns."""
    nothing = f.constant("i64", 0)

    def column(x: Value) -> None:
        for part in range(stem.dot.parts):
            f.store(nothing, write, x * _POSITION + part * stem.part_bytes, align=_POSITION)

    if len(columns):
        f.loop(columns.start, columns.stop, column)

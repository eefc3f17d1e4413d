"""Conv of up to four channels of bytes in tile registers: what pictures meet first.

A first phase writes the padded input as [image][plane][row][column][4 channels]; planes are the remainders of a row by
the stride. A row of a tile is 16 neighbouring columns of an input row, at a pitch of `stride` columns to the next
output position, so that rows overlap in memory and nothing is copied per window; weights of columns that no tap has are
zero. A step of K is one row of the window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_epilogue import epilogue_of
from ingot.kernels.cpu.conv_maps import Maps, fill_of, size_of
from ingot.kernels.cpu.conv_tiles import (
    Job,
    byte_parts,
    centred_weight,
    declaration,
    emit_prepared,
    fits_tiles,
    packed_corrections,
    takes_weights,
)
from ingot.kernels.cpu.conv_window import Axis, conv_axes, unravel
from ingot.kernels.cpu.gemm_dot import SHORT
from ingot.kernels.cpu.gemm_pack import Array
from ingot.kernels.cpu.gemm_tiles import BYTES, ROW_BYTES, TALLEST, pack_tiles
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.linear import zero_points
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

_QUAD = 4  # bytes: the channels of a position, whether there are that many or not
_LANES = 16  # positions of a vector, and of a tile's row


@dataclass(frozen=True)
class Stem:
    """The convolution's sizes."""

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
        read = (size_of(axis.output) - 1) * axis.stride + _LANES
        return -(-max(written, read) // axis.stride) * axis.stride

    @property
    def plane_bytes(self) -> int:
        """Bytes of a plane, and behind it what blocks read beyond the last position."""
        return (self.height * self.length + TALLEST * self.columns.stride) * _QUAD + ROW_BYTES

    @property
    def maps(self) -> Maps:
        """What products need to know."""
        taps = []
        for i in range(self.rows.kernel):
            down, remainder = divmod(i * self.rows.dilation, self.rows.stride)
            taps.append((self.planes.index(remainder), down, 0))
        stride, planes = self.columns.stride, len(self.planes)
        size = self.rows.output, self.columns.output, self.length // stride, stride * _QUAD
        return Maps(BYTES, self.batch, *size, 1, planes, self.plane_bytes, tuple(taps))


def stem_of(node: Node) -> Stem:
    """The node's convolution; its map has known sizes."""
    outputs, inputs, *kernel = (int(size) for size in node.input(1).shape)
    rows, columns = conv_axes(node, kernel)
    return Stem(node.output.shape[0], inputs, outputs, rows, columns)


def _applies(node: Node, isa: Isa) -> bool:
    if not isa.has("amx_int8") or node.dtype not in SHORT or not fits_tiles(node, "int32") or not takes_weights(node):
        return False
    if not all(isinstance(size, int) for size in (*node.input(0).shape[2:], *node.output.shape[2:])):
        return False
    stem = stem_of(node)
    span = (stem.columns.kernel - 1) * stem.columns.dilation + 1
    return stem.inputs <= _QUAD and span <= _LANES and stem.rows.kernel <= _LANES


@kernel("Conv", on="cpu", **declaration(_applies, lambda node: stem_of(node).maps, "plain"))
def conv_stem_bytes(build: KernelBuilder, node: Node, wide: int) -> None:
    """uint8 or int8 of up to four channels by int8 or uint8, exactly, with sums in int32."""
    stem, weight = stem_of(node), centred_weight(node)
    prepared, parts = _prepare(build, stem), byte_parts(weight)
    packed = build.pack(pack_tiles(np.concatenate([_spread(part, stem) for part in parts]), BYTES, wide))
    corrections = packed_corrections(build, node, weight, wide)
    maps = replace(stem.maps, taps=stem.maps.taps * len(parts))
    emit_prepared(build, Job(maps, wide, packed, corrections, epilogue_of(build, node, 2, "int32")), prepared)


def _spread(weight: Array, stem: Stem) -> Array:
    """w[O, C, rows, columns] → [rows × 16 columns × 4 channels, O], zeros where the window has no tap."""
    spread = np.zeros((stem.rows.kernel, _LANES, _QUAD, stem.outputs), weight.dtype)
    taps = np.arange(stem.columns.kernel) * stem.columns.dilation
    spread[:, taps, : stem.inputs] = weight.transpose(2, 3, 1, 0)
    return spread.reshape(-1, stem.outputs)


# the planes


def _prepare(build: KernelBuilder, stem: Stem) -> Handle:
    """A work item is a row of a plane of an image."""
    source, signed = build.input(0), build.node.dtype == "int8"
    maps, planes, zero_point = stem.maps, stem.planes, zero_points(build.node)[0]
    target = build.temporary(product((stem.batch, maps.step_bytes)))

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def item(number: Value) -> None:
            image, plane, row = (f.index(i) for i in unravel(f, number, (stem.batch, len(planes), stem.height)))
            remainder = f.index(planes[0])
            for index, other in enumerate(planes[1:], 1):
                remainder = f.select(f.compare("eq", plane, index), f.index(other), remainder)
            place = image * size_of(maps.step_bytes) + plane * stem.plane_bytes + row * (stem.length * _QUAD)
            y = row * stem.rows.stride + remainder - stem.rows.begin
            write, area = f.at(f.pointer(target), place), size_of(stem.rows.input) * size_of(stem.columns.input)
            read = f.at(f.pointer(source), image * (stem.inputs * area) + y * size_of(stem.columns.input))
            known = f.compare("ult", y, size_of(stem.rows.input))  # unsigned: rows before the map too are outside
            fill = fill_of(zero_point, signed)
            f.when(known, lambda: _row(f, stem, read, write, (zero_point, signed)),
                   lambda: _fill(f, write, fill, range(stem.length)))  # fmt: skip

        f.loop(begin, end, item)

    build.phase(product((stem.batch, len(planes), stem.height)), body, 4)
    return target


def _row(f: PhaseFunction, stem: Stem, read: Value, write: Value, form: tuple[int, bool]) -> None:
    """A row of the input between its padding, channels side by side."""
    zero_point, signed = form
    size, area = size_of(stem.columns.input), size_of(stem.rows.input) * size_of(stem.columns.input)
    begin, whole = stem.columns.begin, size // _LANES * _LANES

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
    f.loop(0, whole, lambda x: quads(x, None), step=_LANES)
    if size > whole:
        quads(f.index(whole), f.first_lanes(size - whole, _LANES))
    _fill(f, write, fill_of(zero_point, signed), range(begin + -(-size // _LANES) * _LANES, stem.length))


def _fill(f: PhaseFunction, write: Value, fill: int, columns: range) -> None:
    whole = columns.start + len(columns) // _LANES * _LANES
    value = f.constant("<16 x i32>", fill)
    f.loop(columns.start, whole, lambda x: f.store(value, write, x * _QUAD, align=_QUAD), step=_LANES)
    single = f.constant("i32", fill)
    f.loop(whole, columns.stop, lambda x: f.store(single, write, x * _QUAD, align=_QUAD))

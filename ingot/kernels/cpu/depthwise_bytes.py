"""Depthwise Conv of bytes, blocked: four neighbouring taps of a row are one step of a dot product.

A work item is a band of rows of one channel block. It copies what the band reads into scratch, with padding; there 64
bytes are 4 columns × 16 channels, which two shuffles (one where bytes can be permuted freely) turn into the 4 columns
of each channel, as VPDPBUSD wants them. Padding is the zero point, so that one correction serves all positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_epilogue import Epilogue, block_values, epilogue_of, extra_layouts, finish, residuals
from ingot.kernels.cpu.conv_maps import fill_of, size_of
from ingot.kernels.cpu.conv_tiles import byte_parts, centred_weight, fits_tiles, takes_weights
from ingot.kernels.cpu.conv_window import Axis, conv_axes, unravel
from ingot.kernels.cpu.gemm_dot import SHORT
from ingot.kernels.cpu.gemm_plan import GIGAHERTZ
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.linear import zero_points
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.node import Node
from ingot.plan.extent import ceil_div, product

_LANES, _QUAD = 16, 4
_LINE = _LANES * _QUAD  # bytes: four columns
_BAND_BYTES = 20 << 10  # of scratch: less than the first cache
_VECTOR_CYCLES, _QUAD_CYCLES = 10, 1.6


@dataclass(frozen=True)
class Band:
    """The convolution's sizes, and how many rows an item makes."""

    channels: int
    rows: Axis
    columns: Axis

    @property
    def quads(self) -> int:
        """Steps of four columns in a row of the window."""
        return -(-self.columns.kernel // _QUAD)

    @property
    def pitch(self) -> int:
        """Bytes of a row in scratch: what the last tap of the last column reads, in whole lines."""
        last = (size_of(self.columns.output) - 1) * self.columns.stride + self.quads * _QUAD
        return max(last, self.columns.begin + size_of(self.columns.input)) * _LANES

    @property
    def reach(self) -> int:
        """Input rows from the first to the last tap."""
        return (self.rows.kernel - 1) * self.rows.dilation + 1

    @property
    def height(self) -> int:
        """Output rows of a band."""
        fitting = (_BAND_BYTES // self.pitch - self.reach) // self.rows.stride + 1
        return min(max(fitting, 1), size_of(self.rows.output))

    @property
    def lines(self) -> int:
        """Input rows of a band."""
        return (self.height - 1) * self.rows.stride + self.reach

    @property
    def bands(self) -> int:
        """Bands of a map."""
        return -(-size_of(self.rows.output) // self.height)


def band_of(node: Node) -> Band:
    """The node's convolution; its map has known sizes."""
    channels, _, *kernel = (int(size) for size in node.input(1).shape)
    return Band(channels, *conv_axes(node, kernel))


def _applies(node: Node, isa: Isa) -> bool:
    weight = node.input(1)
    if not isa.has("avx512_vnni") or node.dtype not in SHORT or len(weight.shape) != 4:
        return False
    channels = weight.shape[0]
    depthwise = node.attributes["group"] == channels == node.input(0).shape[1] and weight.shape[1] == 1
    if not depthwise or not fits_tiles(node, "int32", groups=True) or not takes_weights(node):
        return False
    static = all(isinstance(size, int) for size in (*node.input(0).shape[2:], *node.output.shape[2:]))
    return static and band_of(node).columns.dilation == 1


def _cost(node: Node, isa: Isa, columns: int) -> float:
    band = band_of(node)
    vectors = -(-band.channels // _LANES) * size_of(band.rows.output) * size_of(band.columns.output)
    batch = node.output.shape[0] if isinstance(node.output.shape[0], int) else 1
    steps = band.rows.kernel * band.quads * _QUAD_CYCLES + 8 / columns
    return 1 + batch * vectors * (steps + _VECTOR_CYCLES) / (GIGAHERTZ * 1000)


def _widths(node: Node, isa: Isa) -> tuple[int, ...]:
    return tuple(sorted({min(width, size_of(band_of(node).columns.output)) for width in (4, 8, 14)}))


@dataclass(frozen=True, eq=False)
class _Job:
    band: Band
    columns: int
    source: Handle
    weights: Handle
    corrections: Handle
    epilogue: Epilogue
    scratch: int
    zero_point: int
    signed: bool
    parts: int  # of the weights, whose sum they are


@kernel("Conv", on="cpu", when=_applies, cost=_cost, space={"columns": _widths}, in_place=residuals,
        layouts=lambda node, isa: [Ports(("blocked", "", *extra_layouts(node, 2)), ("blocked",))])  # fmt: skip
def depthwise_bytes(build: KernelBuilder, node: Node, columns: int) -> None:
    """uint8 or int8 by int8 or uint8, exactly, with sums in int32; tiles of `columns` columns."""
    band, weight = band_of(node), centred_weight(node)
    zero_point, parts = zero_points(node)[0], byte_parts(weight)
    blocks = -(-band.channels // _LANES)
    corrections = np.zeros(blocks * _LANES, np.int32)
    excess = zero_point + (128 if node.dtype == "int8" else 0)
    corrections[: band.channels] = -excess * weight.reshape(band.channels, -1).sum(axis=1, dtype=np.int32)
    job = _Job(
        band, columns, build.input(0), build.pack(np.stack([_packed(part, band) for part in parts], 1)),
        build.pack(corrections), epilogue_of(build, node, 2, "int32"),
        build.scratch(band.lines * band.pitch + _LINE), zero_point, node.dtype == "int8", len(parts),
    )  # fmt: skip
    sizes = (node.output.shape[0], blocks, band.bands)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def item(index: Value) -> None:
            image, block, number = (f.index(i) for i in unravel(f, index, sizes))
            first = number * band.height
            there = f.minimum(band.height, f.index(size_of(band.rows.output)) - first)
            channel = image * blocks + block
            _copy(f, job, channel, first, there)
            _band(f, job, block, channel, first, there)

        f.loop(begin, end, item)

    build.phase(product((node.output.shape[0], ceil_div(band.channels, _LANES), band.bands)), body)


def _packed(weight: Any, band: Band) -> Any:
    """w[C, 1, rows, columns] → [C/16][rows][quads][16 channels][4 columns], zeros where there is none."""
    blocks, rows = -(-band.channels // _LANES), band.rows.kernel
    padded = np.zeros((blocks * _LANES, rows, band.quads * _QUAD), np.int8)
    padded[: band.channels, :, : band.columns.kernel] = weight[:, 0]
    cut = padded.reshape(blocks, _LANES, rows, band.quads, _QUAD)
    return np.ascontiguousarray(cut.transpose(0, 2, 3, 1, 4))


# the copy


def _copy(f: PhaseFunction, job: _Job, channel: Value, first: Value, there: Index) -> None:
    """What `there` output rows from `first` on read, padded, to scratch."""
    band, (rows, columns) = job.band, (job.band.rows, job.band.columns)
    size, target = size_of(columns.input), f.at(f.scratch, job.scratch)
    fill = fill_of(job.zero_point, job.signed)
    lines = (f.index(there) - 1) * rows.stride + band.reach

    def line(number: Value) -> None:
        y, write = first * rows.stride + number - rows.begin, f.at(target, number * band.pitch)
        read = f.at(f.pointer(job.source), (channel * size_of(rows.input) + y) * (size * _LANES))

        def inside() -> None:
            _fill(f, write, fill, range(columns.begin))
            _line(f, read, f.at(write, columns.begin * _LANES), size, job.signed)
            _fill(f, write, fill, range(columns.begin + size, band.pitch // _LANES))

        known = f.compare("ult", y, size_of(rows.input))  # unsigned: rows before the map too are outside
        f.when(known, inside, lambda: _fill(f, write, fill, range(band.pitch // _LANES)))

    f.loop(0, lines, line)


def _line(f: PhaseFunction, read: Value, write: Value, size: int, signed: bool) -> None:
    def some(type_: str) -> Any:
        def move(place: Value) -> None:
            x = f.load(type_, read, place, align=1)
            f.store(f.binary("xor", x, -0x80) if signed else x, write, place, align=1)

        return move

    whole = size // _QUAD * _LINE
    f.loop(0, whole, some("<64 x i8>"), step=_LINE)
    f.loop(whole, size * _LANES, some("<16 x i8>"), step=_LANES)


def _fill(f: PhaseFunction, write: Value, fill: int, columns: range) -> None:
    line = f.constant("<4 x i32>", fill)
    f.loop(columns.start, columns.stop, lambda x: f.store(line, write, x * _LANES, align=1))


# the sums


def _band(f: PhaseFunction, job: _Job, block: Value, channel: Value, first: Value, there: Index) -> None:
    band, width = job.band, size_of(job.band.columns.output)
    taps = band.rows.kernel * band.quads
    packed = f.at(f.pointer(job.weights), block * (job.parts * taps * _LINE))
    weights = [[f.load("<16 x i32>", packed, (part * taps + tap) * _LINE) for part in range(job.parts)]
               for tap in range(taps)]  # fmt: skip
    start = f.load("<16 x i32>", f.pointer(job.corrections), block * _LINE)
    values = block_values(f, job.epilogue, block)
    whole = width // job.columns * job.columns

    def row(number: Value) -> None:
        read = f.at(f.scratch, number * (band.rows.stride * band.pitch) + job.scratch)
        line = (channel * size_of(band.rows.output) + first + number) * width

        def tile(x: Index, count: int) -> None:
            here = f.at(read, x * (band.columns.stride * _LANES))
            sums = [_sum(f, band, here, weights, start, column) for column in range(count)]
            for column, total in enumerate(sums):
                finish(f, job.epilogue, total, values, (line + x) * _LANES, column * _LANES)

        f.loop(0, whole, lambda x: tile(x, job.columns), step=job.columns)
        if width > whole:
            tile(whole, width - whole)

    f.loop(0, there, row)


def _sum(f: PhaseFunction, band: Band, read: Value, weights: list[list[Value]], start: Value,
         column: int) -> Value:  # fmt: skip
    total = start
    for tap, parts in enumerate(weights):
        row, quad = divmod(tap, band.quads)
        place = row * band.rows.dilation * band.pitch + (column * band.columns.stride + quad * _QUAD) * _LANES
        taps = _by_channel(f, f.load("<64 x i8>", read, place, align=1))
        for weight in parts:
            total = f.intrinsic("llvm.x86.avx512.vpdpbusd.512", "<16 x i32>", total, taps, weight)
    return total


def _by_channel(f: PhaseFunction, line: Value) -> Value:
    """[4 columns][16 channels] → [16 channels][4 columns], bytes."""
    across = f.shuffle(
        f.bitcast(line, "<16 x i32>"), None, [column * 4 + part for part in range(4) for column in range(4)]
    )
    order = [16 * part + 4 * column + channel for part in range(4) for channel in range(4) for column in range(4)]
    return f.bitcast(f.shuffle(f.bitcast(across, "<64 x i8>"), None, order), "<16 x i32>")

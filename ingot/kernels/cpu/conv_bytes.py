"""Conv of bytes by vectors, blocked: the direct convolution over groups of channels that one product takes.

A first phase writes the input with its padding, which is the zero point, as VPDPBUSD (uint8) or, where there is none,
VPMADDWD (int16, which cannot saturate) wants it. Then 32 bits of x, two or four channels, are to the direct
convolution what a float is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ingot.dtypes import numpy_dtype, size_of
from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv import WIDEST, accumulate, cycles, direct_order, widths_for
from ingot.kernels.cpu.conv_epilogue import epilogue_of, extra_layouts, residuals
from ingot.kernels.cpu.conv_shape import Direct, pack_weights
from ingot.kernels.cpu.conv_tile import Clip, Method, Row, Site, Sums, emit_phase, zeros
from ingot.kernels.cpu.conv_tiles import byte_parts, centred_weight, fits_tiles
from ingot.kernels.cpu.conv_window import Axis, Tile, conv_axes, flattened, unravel
from ingot.kernels.cpu.gemm_dot import SHORT, Dot, dot_for, vnni_dot
from ingot.kernels.cpu.gemm_pack import Array
from ingot.kernels.cpu.gemm_plan import GIGAHERTZ
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.linear import zero_points
from ingot.kernels.cpu.llvm import Value, vector
from ingot.kernels.node import Node
from ingot.plan.extent import product

_WORD = 4  # bytes of x that a product takes
_BYTES_PER_MICROSECOND = 15_000  # of the input, read and written


def _dot(node: Node, isa: Isa) -> Dot | None:
    """Bytes where the machine multiplies them and the weights are bytes, else words."""
    if isa.has("avx512_vnni") and len(byte_parts(centred_weight(node))) == 1:
        return vnni_dot(isa)
    return dot_for(node.dtype, isa)


def _applies(node: Node, isa: Isa) -> bool:
    sizes = (*node.input(0).shape[1:], *node.output.shape[1:])
    if node.dtype not in SHORT or node.input(1).dtype not in SHORT or not all(isinstance(size, int) for size in sizes):
        return False
    return fits_tiles(node, "int32", ranks=(1, 2))


def direct_of(node: Node, dot: Dot, columns: int = 1, vectors: int = 1) -> Direct:
    """The convolution over the prepared input, a group of channels counting as one."""
    outputs, inputs = (int(size) for size in node.input(1).shape[:2])
    axes = flattened(tuple(map(_padded, _plane(node))))
    block, lanes = dot.lanes // dot.group, dot.lanes
    tap = block * vectors * lanes * _WORD
    groups = -(-inputs // dot.group)
    return Direct(axes, node.output.shape[0], 1, groups, outputs, block, lanes, columns, vectors, tap, _WORD, "i32")


def _plane(node: Node) -> tuple[Axis, ...]:
    """Rows and columns; a signal is a single row."""
    axes = conv_axes(node, tuple(map(int, node.input(1).shape[2:])))
    return axes if len(axes) == 2 else (Axis(1, 1, 1), *axes)


def _padded(axis: Axis) -> Axis:
    assert isinstance(axis.input, int)
    return replace(axis, input=axis.input + axis.begin + axis.end, begin=0, end=0)


def _widths(node: Node, isa: Isa, vectors: int) -> set[int]:
    axes = flattened(tuple(map(_padded, _plane(node))))
    return widths_for(axes[-1].output, isa, vectors)


def _columns(node: Node, isa: Isa) -> tuple[int, ...]:
    return tuple(sorted({width for vectors in WIDEST[isa.registers] for width in _widths(node, isa, vectors)}))


def _prune(node: Node, isa: Isa, vectors: int, columns: int) -> bool:
    dot = _dot(node, isa)
    return dot is None or vectors > direct_of(node, dot).output_blocks or columns not in _widths(node, isa, vectors)


def _cost(node: Node, isa: Isa, vectors: int, columns: int) -> float:
    dot = _dot(node, isa)
    assert dot is not None
    shape = direct_of(node, dot, columns, vectors)
    batch = shape.batch if isinstance(shape.batch, int) else 1
    size = product((shape.input_blocks, *shape.steps[:1]))
    prepared = 3 * size / _BYTES_PER_MICROSECOND if isinstance(size, int) else 0.0
    return 2 + batch * (2 * dot.cycles * cycles(shape, isa) / (GIGAHERTZ * 1000) + prepared)


@kernel("Conv", on="cpu", when=_applies, prune=_prune, cost=_cost, in_place=residuals,
        space={"vectors": lambda node, isa: tuple(WIDEST[isa.registers]), "columns": _columns},
        layouts=lambda node, isa: [Ports(("blocked", "", *extra_layouts(node, 2)), ("blocked",))])  # fmt: skip
def conv_direct_bytes(build: KernelBuilder, node: Node, vectors: int, columns: int) -> None:
    """uint8 or int8 by int8 or uint8, exactly, with sums in int32."""
    dot = _dot(node, build.isa)
    assert dot is not None
    shape, weight = direct_of(node, dot, columns, vectors), centred_weight(node)
    epilogue = epilogue_of(build, node, 2, "int32")
    x = _prepare(build, dot, shape)
    packed = build.pack(pack_weights(_grouped(weight, dot), shape))
    corrections = build.pack(_corrections(node, weight, dot, shape))
    method = Method(zeros, partial(accumulate, multiply=dot.product), partial(_corrected, corrections))
    emit_phase(build, shape, x, packed, epilogue, method, direct_order(shape))


def _grouped(weight: Array, dot: Dot) -> Array:
    """w[O, I, *K] → [O, I/group, *K] of 32 bits each."""
    outputs, inputs, *kernel = weight.shape
    groups = -(-inputs // dot.group)
    padded = np.zeros((outputs, groups * dot.group, *kernel), numpy_dtype(dot.right))
    padded[:, :inputs] = weight
    split = np.moveaxis(padded.reshape(outputs, groups, dot.group, *kernel), 2, -1)
    return np.ascontiguousarray(split).view(np.int32)[..., 0]


def _corrections(node: Node, weight: Array, dot: Dot, shape: Direct) -> Array:
    """-a Σ w for each output channel: what an input that counts from `a` adds too much."""
    excess = zero_points(node)[0] + _shift(node, dot)
    padded = np.zeros(shape.panels * shape.width, np.int32)
    padded[: len(weight)] = -excess * weight.reshape(len(weight), -1).sum(axis=1, dtype=np.int32)
    return padded


def _shift(node: Node, dot: Dot) -> int:
    """What is added to x on the way."""
    return 128 if dot.left == "uint8" and node.dtype == "int8" else 0


def _corrected(corrections: Handle, site: Site, row: Row, tile: Tile, clip: Clip, sums: Sums) -> Sums:
    f, shape = site.f, site.shape
    first = f.index(row.block) * (shape.lanes * 4)
    read = f.at(f.pointer(corrections), first)
    added = [f.load(vector("i32", shape.lanes), read, v * shape.lanes * 4) for v in range(shape.vectors)]
    return [total + added[place % shape.vectors] for place, total in enumerate(sums)]


# the padded input


@dataclass(frozen=True)
class _Copy:
    """Lines of a channel block: what they were and what they become."""

    signed: bool
    words: bool
    lanes: int
    fill: int

    def line(self, f: PhaseFunction, read: Value, write: Value) -> None:
        """All channels of a position."""
        x = f.load(vector("i8", self.lanes), read)
        if self.words:
            x = f.cast("sext" if self.signed else "zext", x, "i16")
        elif self.signed:
            x = f.binary("xor", x, -0x80)
        f.store(x, write)

    def padding(self, f: PhaseFunction, write: Value) -> None:
        """The zero point in all channels of a position."""
        f.store(f.constant(vector("i16" if self.words else "i8", self.lanes), self.fill), write)


def _prepare(build: KernelBuilder, dot: Dot, shape: Direct) -> Handle:
    """A work item is a row of a channel block of an image. What is right already stays where it is."""
    node = build.node
    axes = _plane(node)
    words = dot.left == "int16"
    if not words and node.dtype == "uint8" and not any(axis.begin or axis.end for axis in axes):
        return build.input(0)
    fill = zero_points(node)[0] + _shift(node, dot)
    copy = _Copy(node.dtype == "int8", words, dot.lanes, fill - 256 if not words and fill > 127 else fill)
    source, line = build.input(0), dot.lanes * size_of(dot.left)
    rows, columns = axes
    height, width = (int(axis.input) + axis.begin + axis.end for axis in axes)
    blocks = shape.input_blocks
    target = build.temporary(product((shape.batch, blocks * height * width * line)))

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def item(number: Value) -> None:
            plane, row = unravel(f, number, (product((shape.batch, blocks)), height))
            y = f.index(row) - rows.begin
            write = f.at(f.pointer(target), f.index(number) * (width * line))
            read = f.at(f.pointer(source), (f.index(plane) * int(rows.input) + y) * (int(columns.input) * dot.lanes))
            known = f.compare("ult", y, int(rows.input))  # unsigned: rows before the map too are outside
            f.when(known, lambda: _row(f, copy, read, write, columns, line),
                   lambda: _padding(f, copy, write, range(width), line))  # fmt: skip

        f.loop(begin, end, item)

    build.phase(product((shape.batch, blocks * height)), body, 4)
    return target


def _row(f: PhaseFunction, copy: _Copy, read: Value, write: Value, columns: Axis, line: int) -> None:
    size, begin = int(columns.input), columns.begin
    _padding(f, copy, write, range(begin), line)
    f.loop(0, size, lambda x: copy.line(f, f.at(read, x * copy.lanes), f.at(write, (x + begin) * line)))
    _padding(f, copy, write, range(begin + size, begin + size + columns.end), line)


def _padding(f: PhaseFunction, copy: _Copy, write: Value, columns: range, line: int) -> None:
    if len(columns):
        f.loop(columns.start, columns.stop, lambda x: copy.padding(f, f.at(write, x * line)))


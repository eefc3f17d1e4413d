"""MatMul: two operands that vary, or a constant stack of matrices, with broadcast batch axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ingot.dtypes import size_of
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm import Gemm, Left, Panel, Sums, Tile, emit_item, zeros
from ingot.kernels.cpu.gemm_copy import Right, pack_block, packed_bytes
from ingot.kernels.cpu.gemm_dot import NARROW, SHORT, Dot, dot_for
from ingot.kernels.cpu.gemm_epilogue import can_finish, epilogue_of, finish_tile
from ingot.kernels.cpu.gemm_pack import pack_panels
from ingot.kernels.cpu.gemm_plan import cost, depths_for, known, run_for, tiles_for
from ingot.kernels.cpu.gemm_prepare import needs_preparation, prepared
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, ceil_div, product

_COPY_BYTES_PER_MICROSECOND = 16_000


@dataclass(frozen=True)
class Matrices:
    """The product's extents; `batch` of the output, `left` and `right` of the operands, aligned to it."""

    batch: tuple[Extent, ...]
    left: tuple[Extent, ...]
    right: tuple[Extent, ...]
    rows: Extent
    columns: Extent
    depth: Extent
    transpose_left: bool
    transpose_right: bool


def matrices_of(node: Node) -> Matrices:
    """Extents of the node; rows of all batches are one matrix where they share the right operand."""
    a, b, shape = node.input(0).shape, node.input(1).shape, node.output.shape
    turned, batch = bool(node.attributes["transpose_a"]), shape[:-2]
    left, right = (_aligned(operand[:-2], len(batch)) for operand in (a, b))
    depth, rows = (a[-2], a[-1]) if turned else (a[-1], a[-2])
    if not turned and left == batch and all(size == 1 for size in right):
        batch, left, right, rows = (), (), (), product((*batch, rows))
    return Matrices(batch, left, right, rows, shape[-1], depth, turned, bool(node.attributes["transpose_b"]))


def _aligned(batch: tuple[Extent, ...], rank: int) -> tuple[Extent, ...]:
    return (1,) * (rank - len(batch)) + batch


def _dot(node: Node, isa: Isa) -> Dot | None:
    dot = dot_for(node.dtype, isa)
    return dot if dot is None or node.dtype not in NARROW else replace(dot, right="float32")


def _applies(node: Node, isa: Isa) -> bool:
    dot, right = _dot(node, isa), node.input(1)
    if dot is None or len(node.input(0).shape) < 2 or len(right.shape) < 2:
        return False
    alike = right.dtype == node.dtype or (right.dtype in SHORT and node.dtype in SHORT)
    centred = node.dtype in SHORT or not any(zero_points_of(node))
    return alike and centred and can_finish(node, dot.result)


def zero_points_of(node: Node) -> tuple[int, int]:
    return int(node.attributes.get("x_zero_point", 0)), int(node.attributes.get("weight_zero_point", 0))


def _sizes(node: Node, isa: Isa) -> tuple[Matrices, Dot, Extent]:
    shape, dot = matrices_of(node), _dot(node, isa)
    assert dot is not None
    return shape, dot, ceil_div(shape.depth, dot.group)


def _tiles(node: Node, isa: Isa) -> tuple[Tile, ...]:
    shape, dot, _ = _sizes(node, isa)
    return tiles_for(shape.rows, shape.columns, dot.lanes, isa.registers)


def _depths(node: Node, isa: Isa) -> tuple[int, ...]:
    return tuple(depth for depth in depths_for(_sizes(node, isa)[2], "rows") if depth <= 512)


def _cost(node: Node, isa: Isa, rows: int, vectors: int, depth: int) -> float:
    shape, dot, steps = _sizes(node, isa)
    batch = known(product(shape.batch))
    size = known(shape.columns) * known(shape.depth) * size_of(dot.right)
    passes = -(-known(shape.rows) // 192)
    single = cost(dot, Tile(rows, vectors), shape.rows, shape.columns, steps, depth, size)
    return batch * (single + passes * size / _COPY_BYTES_PER_MICROSECOND)


@kernel(
    "MatMul", on="cpu", when=_applies, cost=_cost,
    prune=lambda node, isa, rows, vectors, depth: Tile(rows, vectors) not in _tiles(node, isa),
    space={
        "rows": lambda node, isa: tuple(dict.fromkeys(tile.rows for tile in _tiles(node, isa))),
        "vectors": lambda node, isa: tuple(dict.fromkeys(tile.vectors for tile in _tiles(node, isa))),
        "depth": _depths,
    },
)  # fmt: skip
def matmul(build: KernelBuilder, node: Node, rows: int, vectors: int, depth: int) -> None:
    """A work item is a run of tiles of one panel of one matrix of the batch; it packs the panel itself."""
    shape, dot, steps = _sizes(node, build.isa)
    tile, batch = Tile(rows, vectors), product(shape.batch)
    gemm = Gemm(dot, tile, shape.rows, shape.columns, steps, depth, 1)
    gemm = replace(gemm, run=run_for(shape.rows, tile, gemm.panels, steps, known(batch)))
    left_of, right_of = _left(build, node, shape, gemm), _right(build, node, shape, gemm)
    epilogue = epilogue_of(build, node, dot.result, dot.lanes)
    slots = build.scratch(gemm.slot_bytes)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        groups, panels, height = f.extent(gemm.groups), f.extent(gemm.panels), f.extent(shape.rows)

        def item(index: Value) -> None:
            matrix = f.index(f.divide(f.divide(index, panels), groups))
            group, panel = f.index(f.remainder(f.divide(index, panels), groups)), f.index(f.remainder(index, panels))
            left, block = left_of(f, matrix), right_of(f, matrix, panel)
            first = group * (gemm.run * tile.rows)
            last = f.minimum(first + gemm.run * tile.rows, height)

            def start(f: PhaseFunction, tile: Tile, row: Value) -> Sums:
                return zeros(f, dot, tile)

            def finish(f: PhaseFunction, tile: Tile, row: Value, sums: Sums | None, slot: Value) -> None:
                finish_tile(f, gemm, epilogue, tile, matrix * height + row, panel, sums, slot)

            emit_item(f, gemm, left, block, first, last, f.at(f.scratch, slots), start, finish)

        f.loop(begin, end, item)

    build.phase(product((batch, gemm.groups, gemm.panels)), body)


# -- operands


def matrix_of(f: PhaseFunction, batch: Sequence[Extent], dims: Sequence[Extent], matrix: Value) -> Index:
    """Which of an operand's matrices meets in the output's `matrix`: axes of size 1 are repeated."""
    if tuple(dims) == tuple(batch):
        return matrix
    coordinates: list[Index] = []
    rest: Index = matrix
    for size in reversed(batch):
        coordinates.append(f.remainder(rest, f.extent(size)))
        rest = f.divide(rest, f.extent(size))
    place: Index = 0
    for dim, size, coordinate in zip(dims, batch, reversed(coordinates), strict=True):
        extent = f.extent(dim)
        if isinstance(extent, Value) and dim != size:
            coordinate = f.select(f.compare("eq", extent, 1), 0, f.index(coordinate))
        place = place * extent + (0 if extent == 1 and isinstance(extent, int) else coordinate)
    return place


@dataclass(frozen=True)
class _LeftOperand:
    """a in memory: elements from matrix to matrix, from row to row and from step to step."""

    handle: Handle
    matrix: Extent
    row: Extent
    step: Extent
    shape: Matrices
    size: int

    def __call__(self, f: PhaseFunction, matrix: Value) -> Left:
        """The rows of one matrix of the batch."""
        index = f.index(matrix_of(f, self.shape.batch, self.shape.left, matrix))
        pointer = f.at(f.pointer(self.handle), index * f.extent(self.matrix) * self.size)
        return Left(pointer, f.extent(self.row) * self.size, f.extent(self.step) * self.size)


def _left(build: KernelBuilder, node: Node, shape: Matrices, gemm: Gemm) -> _LeftOperand:
    dot, size = gemm.dot, size_of(gemm.dot.left)
    outer, inner = node.input(0).shape[-2:]
    outer = product((*shape.left, shape.rows)) if not shape.batch and not shape.transpose_left else outer
    if dot.group > 1:
        rows = product((*shape.left, shape.rows))
        turned = shape.rows if shape.transpose_left else None
        made = prepared(build, 0, rows, shape.depth, dot, zero_points_of(node)[0], columns=turned)
        return _LeftOperand(made.handle, product((shape.rows, made.pitch)), made.pitch, dot.group, shape, size)
    pitch = inner
    if needs_preparation(node.dtype, 1, dot):
        made = prepared(build, 0, product((*shape.left, outer)), inner, dot)
        source, pitch = made.handle, made.pitch
    else:
        source = build.input(0)
    row, step = (1, pitch) if shape.transpose_left else (pitch, 1)
    return _LeftOperand(source, product((outer, pitch)), row, step, shape, size)


@dataclass(frozen=True, eq=False)
class _RightOperand:
    """b: packed beforehand at `handle` (`scratch` is None), or a matrix to pack into scratch block by block."""

    handle: Handle
    shape: Matrices
    gemm: Gemm
    dtype: str
    zero_point: int
    scratch: int | None

    def __call__(self, f: PhaseFunction, matrix: Value, panel: Value) -> Panel:
        """How to come by the blocks of a panel of one matrix of the batch."""
        gemm, shape = self.gemm, self.shape
        index = f.index(matrix_of(f, shape.batch, shape.right, matrix))
        depth, columns = f.extent(shape.depth), f.extent(shape.columns)
        if self.scratch is None:
            weights = (index * f.extent(gemm.panels) + panel) * f.extent(gemm.panel_bytes)
            pointer = f.at(f.pointer(self.handle), weights)
            return lambda f, first, count: f.at(pointer, first * gemm.step_bytes)
        pointer = f.at(f.pointer(self.handle), index * depth * columns * size_of(self.dtype))
        right = Right(pointer, self.dtype, depth, columns, shape.transpose_right, self.zero_point)
        target = f.at(f.scratch, self.scratch)

        def block(f: PhaseFunction, first: Index, count: Index) -> Value:
            pack_block(f, gemm, right, panel * gemm.width, first, count, target)
            return target

        return block


def _right(build: KernelBuilder, node: Node, shape: Matrices, gemm: Gemm) -> _RightOperand:
    port, zero_point = node.input(1), zero_points_of(node)[1]
    if port.constant is None:
        return _RightOperand(build.input(1), shape, gemm, port.dtype, zero_point, build.scratch(packed_bytes(gemm)))
    weights = np.swapaxes(port.constant, -1, -2) if shape.transpose_right else port.constant
    weights = weights.astype("int16") - zero_point if node.dtype in SHORT else weights
    handle = build.pack(pack_panels(weights, gemm.dot, gemm.tile.vectors))
    return _RightOperand(handle, shape, gemm, port.dtype, zero_point, None)

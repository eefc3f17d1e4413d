"""MatMul of bytes in tile registers, both operands varying: the products of attention in 8-bit models.

A first phase lays the left rows out as tiles load them (tile_rows.py); a work item is a block of rows by a panel of
columns, and whoever begins a panel packs it. With bytes x' = x + a and y' = y + b such as the instruction takes,

    Σ (x - zx)(y - zy) = Σ x'y' - zx' Σ y' - zy' Σ x' + K zx' zy'

where the sums of y' come with the packing, by column, and those of x' with the layout, by row.
"""

from __future__ import annotations

from dataclasses import dataclass

from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm import Gemm, Tile
from ingot.kernels.cpu.gemm_copy import transposed
from ingot.kernels.cpu.gemm_dot import SHORT, Dot, vnni_dot
from ingot.kernels.cpu.gemm_epilogue import RowEpilogue, can_finish, epilogue_of, finish_tile
from ingot.kernels.cpu.gemm_plan import GIGAHERTZ, known
from ingot.kernels.cpu.gemm_tiles import (
    BYTES,
    COLUMNS,
    ROW_BYTES,
    ROWS,
    TALLEST,
    TILE_BYTES,
    Rows,
    add_products,
    begin,
    begin_alike,
    configuration,
    configure,
    end,
    release,
)
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Function, Index, Value, vector
from ingot.kernels.cpu.matmul import Matrices, matrices_of, matrix_of, zero_points_of
from ingot.kernels.cpu.tile_rows import TileRows, groups_of, loaded, tile_rows
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, ceil_div, product

_DEEPEST = 8192  # values of K whose panel still fits into the second cache
_PRODUCT_CYCLES, _BLOCK_CYCLES, _PACK_CYCLES = 18, 200, 20
_ROW_BYTES_PER_MICROSECOND = 15_000
_GROUP, _TAIL = BYTES.group, BYTES.depth
_LINE = vector("i32", COLUMNS)
_WORTHWHILE = 24


def _applies(node: Node, isa: Isa) -> bool:
    right, ranks = node.input(1), [len(node.input(i).shape) for i in range(2)]
    if not isa.has("amx_int8") or node.dtype not in SHORT or right.dtype not in SHORT or min(ranks) < 2:
        return False
    if right.constant is not None or node.attributes["transpose_a"]:
        return False
    depth = matrices_of(node).depth
    return isinstance(depth, int) and 0 < depth <= _DEEPEST and can_finish(node, "int32")


def _wides(node: Node, isa: Isa) -> tuple[int, ...]:
    columns = node.output.shape[-1]
    return (1,) if isinstance(columns, int) and columns <= COLUMNS else (2, 1)


def _cost(node: Node, isa: Isa, wide: int) -> float:
    shape = matrices_of(node)
    batch, rows, columns, depth = (known(n) for n in (product(shape.batch), shape.rows, shape.columns, shape.depth))
    steps, panels, blocks = -(-depth // _TAIL), -(-columns // (wide * COLUMNS)), -(-rows // TALLEST)
    packed = steps * wide * ROWS * _PACK_CYCLES
    cycles = batch * panels * (packed + blocks * (steps * 2 * wide * _PRODUCT_CYCLES + wide * _BLOCK_CYCLES))
    return 1 + batch * rows * depth / _ROW_BYTES_PER_MICROSECOND + cycles / (GIGAHERTZ * 1000)


@dataclass(frozen=True, eq=False)
class _Job:
    """What a phase works on; `like` is the product as vector epilogues know it."""

    shape: Matrices
    like: Gemm
    steps: int
    x: TileRows
    right: Handle
    dtypes: tuple[str, str]
    excess: int  # zx'
    shift: int  # zy'
    epilogue: RowEpilogue
    panel: int  # where scratch holds the packed panel, the start of its sums, and the sums of a block
    line: int
    slot: int

    @property
    def wide(self) -> int:
        """Tiles of columns of a panel."""
        return self.like.tile.vectors

    @property
    def tops(self) -> int:
        """Tiles of rows of a block."""
        return 1 if isinstance(self.shape.rows, int) and self.shape.rows <= ROWS else 2

    @property
    def blocks(self) -> Extent:
        """Blocks of rows of a matrix."""
        return ceil_div(self.shape.rows, TALLEST)


@kernel("MatMul", on="cpu", when=_applies, cost=_cost, space={"wide": _wides})
def matmul_tiles_bytes(build: KernelBuilder, node: Node, wide: int) -> None:
    """uint8 or int8 by the same, exactly, with sums in int32."""
    job = _job(build, node, wide)
    registers = build.pack(configuration())

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        configure(f, registers)
        blocks = f.extent(job.blocks)
        last = f.divide(end + (f.index(blocks) - 1), blocks)
        f.loop(f.divide(begin, blocks), last, lambda number: _visit(f, job, number, begin, end))
        release(f)

    grain = max(1, _WORTHWHILE // job.steps)
    build.phase(product((*job.shape.batch, ceil_div(job.shape.columns, job.like.width), job.blocks)), body, grain)


def _job(build: KernelBuilder, node: Node, wide: int) -> _Job:
    shape, dot = matrices_of(node), vnni_dot(build.isa)
    depth, dtypes = shape.depth, (node.dtype, node.input(1).dtype)
    assert isinstance(depth, int)
    x_zero_point, zero_point = zero_points_of(node)
    shift = zero_point - (128 if dtypes[1] == "uint8" else 0)
    rows, steps = product((*shape.left, shape.rows)), -(-depth // _TAIL)
    x = tile_rows(build, 0, rows, depth, BYTES, bool(shift), each=(product(shape.left), shape.rows))
    return _Job(
        shape, _like(dot, shape, steps, wide), steps, x, build.input(1), dtypes,
        x_zero_point + (128 if node.dtype == "int8" else 0), shift, epilogue_of(build, node, dot.result, dot.lanes),
        build.scratch(steps * wide * TILE_BYTES), build.scratch(wide * ROW_BYTES),
        build.scratch(TALLEST * wide * ROW_BYTES),
    )  # fmt: skip


def _like(dot: Dot, shape: Matrices, steps: int, wide: int) -> Gemm:
    return Gemm(dot, Tile(TALLEST, wide), shape.rows, shape.columns, steps, steps, 1)


def _visit(f: PhaseFunction, job: _Job, number: Value, begin: Value, end: Value) -> None:
    """The blocks among items [begin, end) of a panel of a matrix."""
    panels, blocks = f.extent(ceil_div(job.shape.columns, job.like.width)), f.extent(job.blocks)
    matrix, panel = f.index(f.divide(number, panels)), f.index(f.remainder(number, panels))
    _pack_panel(f, job, matrix, panel)
    groups = f.index(matrix_of(f, job.shape.batch, job.shape.left, matrix))
    first = groups * f.extent(groups_of(job.shape.rows))
    rows = f.extent(job.shape.rows)

    def block(index: Value) -> None:
        left = f.at(f.pointer(job.x.handle), (first + index * 2) * job.x.group_bytes)
        _products(f, job, left, groups * rows + index * TALLEST)
        there = f.minimum(TALLEST, f.index(rows) - index * TALLEST)
        slot, row = f.at(f.scratch, job.slot), matrix * rows + index * TALLEST
        finish_tile(f, job.like, job.epilogue, job.like.tile, row, panel, None, slot, there)

    f.loop(f.maximum(begin - number * blocks, 0), f.minimum(end - number * blocks, blocks), block)


def _products(f: PhaseFunction, job: _Job, left: Value, row: Value) -> None:
    """The sums of a block to its slot; `row` is its first among the rows of x."""
    slot, line = f.at(f.scratch, job.slot), f.at(f.scratch, job.line)
    if job.shift:
        _start_by_row(f, job, row, line, slot)
        begin(f, job.tops, job.wide, slot)
    elif job.excess:
        begin_alike(f, job.tops, job.wide, line)
    else:
        begin(f, job.tops, job.wide, None)
    groups = [f.at(left, top * job.x.group_bytes) for top in range(job.tops)]

    def step(_: Value, *pointers: Value) -> list[Value]:
        *tall, packed = pointers
        add_products(f, BYTES, job.wide, Rows(tall, TILE_BYTES, ROW_BYTES), packed, packed, 0)
        return [*(f.at(pointer, TILE_BYTES) for pointer in tall), f.at(packed, job.wide * TILE_BYTES)]

    f.loop(0, job.steps, step, [*groups, f.at(f.scratch, job.panel)])
    end(f, job.tops, job.wide, slot)


def _start_by_row(f: PhaseFunction, job: _Job, row: Value, line: Value, slot: Value) -> None:
    """Corrections of every row and column, where the right zero point is not the middle."""
    assert job.x.row_sums is not None
    columns = [f.load(_LINE, line, j * ROW_BYTES) for j in range(job.wide)]
    totals, limit = f.pointer(job.x.row_sums), f.index(f.extent(product((*job.shape.left, job.shape.rows)))) - 1
    for r in range(job.tops * ROWS):
        total = f.load("i32", totals, f.index(f.minimum(row + r, limit)) * 4)
        shift = f.splat(total * -job.shift, COLUMNS)
        for j, column in enumerate(columns):
            f.store(column + shift, slot, (r * job.wide + j) * ROW_BYTES)


# -- packing the right operand


def _pack_panel(f: PhaseFunction, job: _Job, matrix: Value, panel: Value) -> None:
    """A panel of a matrix as tiles, and where its sums start: zx' (K zy' - Σ y')."""
    depth, columns = job.shape.depth, f.extent(job.shape.columns)
    assert isinstance(depth, int)
    index = f.index(matrix_of(f, job.shape.batch, job.shape.right, matrix))
    source = f.at(f.pointer(job.right), index * depth * columns)
    pack = _pack_columns if job.shape.transpose_right else _pack_rows
    sums = pack(f, job, source, panel * job.like.width, f.at(f.scratch, job.panel))
    for j, total in enumerate(sums):
        whole = f.constant(_LINE, depth * job.shift)
        f.store((whole - total) * job.excess, f.scratch, job.line + j * ROW_BYTES)


def _signed(f: Function, job: _Job, x: Value) -> Value:
    return f.binary("xor", x, -0x80) if job.dtypes[1] == "uint8" else x


def _missing(job: _Job) -> int:
    """What stands for a value that does not exist, before it is made signed: a zero afterwards."""
    return -0x80 if job.dtypes[1] == "uint8" else 0


def _store(f: Function, job: _Job, group: Value, place: Value, offset: Index, total: Value) -> Value:
    """A row of a tile, 16 columns by 4 values of K; the sums of the columns go on."""
    f.store(group, place, offset)
    return job.like.dot.product(f, f.constant(_LINE, 0x01010101), f.bitcast(group, _LINE), total)


def _pack_columns(f: PhaseFunction, job: _Job, source: Value, column: Value, target: Value) -> list[Value]:
    """From [columns, K]: squares of 16 columns by 16 groups of K; columns that do not exist repeat the last one."""
    depth, last, bytes_ = job.shape.depth, f.index(f.extent(job.shape.columns)) - 1, vector("i8", ROW_BYTES)
    assert isinstance(depth, int)
    existing = [f.index(f.minimum(column + n, last)) for n in range(job.like.width)]
    sources = [f.at(source, n * depth) for n in existing]

    def square(k: Index, there: int, *totals: Value) -> list[Value]:
        place, sums = f.at(target, f.index(k) * (job.wide * TILE_BYTES)), list(totals)
        for j in range(job.wide):
            rows = []
            for pointer in sources[j * COLUMNS : (j + 1) * COLUMNS]:
                x = loaded(f, bytes_, pointer, f.index(k) * _TAIL, there, ROW_BYTES, _missing(job))
                rows.append(f.bitcast(_signed(f, job, x), _LINE))
            for g, group in enumerate(transposed(f, rows)):
                sums[j] = _store(f, job, group, place, j * TILE_BYTES + g * ROW_BYTES, sums[j])
        return sums

    zeros = [f.constant(_LINE, 0)] * job.wide
    sums = list(f.loop(0, depth // _TAIL, lambda k, *totals: square(k, _TAIL, *totals), zeros))
    return square(job.steps - 1, depth % _TAIL, *sums) if depth % _TAIL else sums


def _pack_rows(f: PhaseFunction, job: _Job, source: Value, column: Value, target: Value) -> list[Value]:
    """From [K, columns]: four rows side by side; rows that do not exist are zeros."""
    depth, columns = job.shape.depth, f.extent(job.shape.columns)
    assert isinstance(depth, int)
    whole = isinstance(columns, int) and columns % job.like.width == 0
    masks = [None if whole else f.first_lanes(columns - (column + j * COLUMNS), COLUMNS) for j in range(job.wide)]
    line = vector("i8", COLUMNS)

    def group(g: Index, there: int, *totals: Value) -> list[Value]:
        step, within = f.index(f.divide(g, ROWS)), f.index(f.remainder(g, ROWS))
        place = f.at(target, step * (job.wide * TILE_BYTES) + within * ROW_BYTES)
        first = f.at(source, f.index(g) * _GROUP * columns + column)
        sums = []
        for j, (mask, total) in enumerate(zip(masks, totals, strict=True)):
            rows = [f.constant(line, 0)] * _GROUP
            for r in range(there):
                row = f.at(first, f.index(columns) * r + j * COLUMNS)
                x = f.load(line, row) if mask is None else f.load_masked(line, row, mask, 0, _missing(job))
                rows[r] = _signed(f, job, x)
            sums.append(_store(f, job, _side_by_side(f, rows), place, j * TILE_BYTES, total))
        return sums

    zeros = [f.constant(_LINE, 0)] * job.wide
    sums = list(f.loop(0, depth // _GROUP, lambda g, *totals: group(g, _GROUP, *totals), zeros))
    begun = depth // _GROUP
    if depth % _GROUP:
        sums, begun = group(begun, depth % _GROUP, *sums), begun + 1
    for g in range(begun, job.steps * ROWS):
        group(g, 0, *zeros)
    return sums


def _side_by_side(f: Function, rows: list[Value]) -> Value:
    """16 columns of four values each from four rows."""
    upper, lower = (f.shuffle(rows[i], rows[i + 1], range(2 * COLUMNS)) for i in (0, 2))
    return f.shuffle(upper, lower, [COLUMNS * r + n for n in range(COLUMNS) for r in range(_GROUP)])

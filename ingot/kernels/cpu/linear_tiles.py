"""Linear in tile registers: bytes, bfloat16, and float32 as the sum of two bfloat16 numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ingot.config import BFLOAT16_ERROR, SPLIT_ERROR
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm import Gemm, Tile, store_sums
from ingot.kernels.cpu.gemm_dot import SHORT, Dot, bfloat16_dot, vnni_dot
from ingot.kernels.cpu.gemm_epilogue import RowEpilogue, can_finish, epilogue_of, finish_tile
from ingot.kernels.cpu.gemm_pack import Array, byte_shift, column_corrections
from ingot.kernels.cpu.gemm_plan import GIGAHERTZ, known
from ingot.kernels.cpu.gemm_tiles import (
    BFLOAT16,
    BYTES,
    COLUMNS,
    ROUNDED,
    ROW_BYTES,
    ROWS,
    SPLIT,
    TALLEST,
    TILE_BYTES,
    TileDot,
    TileGemm,
    configuration,
    configure,
    multiply,
    pack_tiles,
    release,
)
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.linear import rows_of, start_sums, types_fit, weight_of, zero_points
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.tile_rows import TileRows, tile_rows
from ingot.kernels.node import Node
from ingot.plan.extent import ceil_div, product

_PRODUCT_CYCLES, _LOAD_CYCLES, _BLOCK_CYCLES = 18, 9, 1200  # measured, waiting for tiles included
_BYTES_PER_MICROSECOND = 16_000  # of weights, which come from memory
_FIRST_CACHE = 32 << 10  # bytes of weights that stay there while blocks of rows pass
_KEPT_BLOCKS = 16  # whose sums wait in scratch
_WORTHWHILE_STEPS = 64
_ROW_BYTES_PER_MICROSECOND = 30_000  # of x, read and written


def _declaration(dtypes: tuple[str, ...], feature: str, dot: TileDot) -> dict[str, Any]:
    """when, space, prune and cost of a kernel for x of `dtypes`."""

    def applies(node: Node, isa: Isa) -> bool:
        weight = node.input(1)
        if not isa.has(feature) or node.dtype not in dtypes or weight.constant is None or weight.constant.ndim != 2:
            return False
        result = "int32" if node.dtype in SHORT else "float32"
        return types_fit(node) and (node.dtype in SHORT or not any(zero_points(node))) and can_finish(node, result)

    def heights(node: Node, isa: Isa) -> tuple[int, ...]:
        rows = rows_of(node)
        return (ROWS,) if isinstance(rows, int) and rows <= ROWS else (TALLEST,)

    def wides(node: Node, isa: Isa) -> tuple[int, ...]:
        return (2, 1) if weight_of(node).shape[1] > COLUMNS else (1,)

    def price(node: Node, isa: Isa, height: int, wide: int) -> float:
        return cost(dot, weight_of(node).shape, known(rows_of(node)), height, wide)

    return {"when": applies, "cost": price, "space": {"height": heights, "wide": wides}}


def cost(dot: TileDot, shape: tuple[int, ...], rows: int, height: int, wide: int) -> float:
    """Microseconds on one core."""
    depth, columns = shape
    steps, panels, blocks = -(-depth // dot.depth), -(-columns // (wide * COLUMNS)), -(-rows // height)
    tops = 1 + (height > ROWS)
    products = len(dot.products) * tops * wide * _PRODUCT_CYCLES
    loads = (tops + wide) * dot.parts * _LOAD_CYCLES
    cycles = panels * blocks * (steps * max(products, loads) + _BLOCK_CYCLES)
    moved = steps * panels * wide * dot.right_bytes / _BYTES_PER_MICROSECOND
    prepared = rows * depth * (dot.source + 1) * ROW_BYTES / dot.depth * dot.parts / _ROW_BYTES_PER_MICROSECOND
    return 1 + prepared + moved + cycles / (GIGAHERTZ * 1000)


@kernel("Linear", on="cpu", **_declaration(("float32",), "amx_bf16", SPLIT), tolerance=SPLIT_ERROR)
def linear_split(build: KernelBuilder, node: Node, height: int, wide: int) -> None:
    """float32 in three products of bfloat16 parts: a sixteenth-bit mantissa at a third of bfloat16's speed."""
    weight = weight_of(node)
    x = tile_rows(build, 0, rows_of(node), weight.shape[0], SPLIT)
    packed = pack_tiles(weight, SPLIT, wide)
    _emit(build, node, _Product(SPLIT, bfloat16_dot(build.isa), height, wide, packed, x))


@kernel("Linear", on="cpu", **_declaration(("float32",), "amx_bf16", ROUNDED), tolerance=BFLOAT16_ERROR)
def linear_rounded(build: KernelBuilder, node: Node, height: int, wide: int) -> None:
    """float32 rounded to bfloat16, sums in float32."""
    weight = weight_of(node)
    x = tile_rows(build, 0, rows_of(node), weight.shape[0], ROUNDED)
    _emit(build, node, _Product(ROUNDED, bfloat16_dot(build.isa), height, wide, pack_tiles(weight, ROUNDED, wide), x))


@kernel("Linear", on="cpu", **_declaration(("bfloat16",), "amx_bf16", BFLOAT16))
def linear_tiles_bfloat16(build: KernelBuilder, node: Node, height: int, wide: int) -> None:
    """bfloat16 with sums in float32."""
    weight = weight_of(node)
    x = tile_rows(build, 0, rows_of(node), weight.shape[0], BFLOAT16)
    packed = pack_tiles(weight.view("uint16"), BFLOAT16, wide)
    _emit(build, node, _Product(BFLOAT16, bfloat16_dot(build.isa), height, wide, packed, x))


@kernel("Linear", on="cpu", **_declaration(SHORT, "amx_int8", BYTES))
def linear_tiles_bytes(build: KernelBuilder, node: Node, height: int, wide: int) -> None:
    """uint8 or int8 by int8 or uint8, exactly; zero points as in linear_vnni."""
    dot, weight = vnni_dot(build.isa), weight_of(node)
    x_zero_point, weight_zero_point = zero_points(node)
    shift = byte_shift(weight, weight_zero_point)
    shifted = weight.astype("int16") - shift
    excess = x_zero_point + (128 if node.dtype == "int8" else 0)
    columns = column_corrections(shifted, excess, weight_zero_point - shift, wide * COLUMNS)
    factor = shift - weight_zero_point
    x = tile_rows(build, 0, rows_of(node), weight.shape[0], BYTES, bool(factor))
    packed = pack_tiles(shifted.astype("int8"), BYTES, wide)
    corrections = build.pack(columns) if columns.any() else None
    _emit(build, node, _Product(BYTES, dot, height, wide, packed, x, corrections, factor))


@dataclass(frozen=True, eq=False)
class _Product:
    """Packed weights and rows, and where sums start (see linear._Product)."""

    tiles: TileDot
    dot: Dot
    height: int
    wide: int
    packed: Array
    x: TileRows
    columns: Handle | None = None
    row_factor: int = 0


def _emit(build: KernelBuilder, node: Node, chosen: _Product) -> None:
    """A work item is a block of rows of a panel; the blocks of a panel follow each other."""
    rows, (depth, width) = rows_of(node), weight_of(node).shape
    height, wide = chosen.height, chosen.wide
    steps = -(-depth // chosen.tiles.depth)
    run = min(known(ceil_div(rows, height)), _KEPT_BLOCKS)
    block = _block_depth(chosen.tiles, steps, wide)
    gemm = TileGemm(chosen.tiles, rows, width, steps, height, wide, block, max(run, 1))
    like = Gemm(chosen.dot, Tile(height, wide), rows, width, steps, steps, 1)
    job = _Job(
        chosen, gemm, like, build.pack(configuration()), build.pack(chosen.packed),
        epilogue_of(build, node, chosen.dot.result, chosen.dot.lanes), build.scratch(gemm.slot_bytes * gemm.run),
    )  # fmt: skip

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        configure(f, job.shape)
        last = f.divide(end + (gemm.run - 1), gemm.run)
        f.loop(f.divide(begin, gemm.run), last, lambda number: _visit(f, job, number, begin, end))
        release(f)

    build.phase(product((gemm.groups, gemm.panels, gemm.run)), body, max(1, -(-_WORTHWHILE_STEPS // max(steps, 1))))


def _block_depth(dot: TileDot, steps: int, wide: int) -> int:
    """Equal parts of K whose weights take no more than the first cache has for them."""
    most = max(_FIRST_CACHE // (wide * dot.right_bytes), 1)
    return max(-(-steps // max(-(-steps // most), 1)), 1)


@dataclass(frozen=True, eq=False)
class _Job:
    """What a phase works on; `like` is the product as vector epilogues know it."""

    chosen: _Product
    gemm: TileGemm
    like: Gemm
    shape: Handle
    packed: Handle
    epilogue: RowEpilogue
    slots: int


def _visit(f: PhaseFunction, job: _Job, number: Value, begin: Value, end: Value) -> None:
    """The blocks among items [begin, end) of a panel: a part of K for all of them, then the next part."""
    gemm = job.gemm
    panels, limit = f.extent(gemm.panels), f.extent(gemm.blocks)
    group, panel = f.index(f.divide(number, panels)), f.remainder(number, panels)
    first = group * gemm.run + f.maximum(begin - number * gemm.run, 0)
    last = f.minimum(group * gemm.run + f.minimum(end - number * gemm.run, gemm.run), limit)
    weights = f.at(f.pointer(job.packed), panel * gemm.panel_bytes)

    def part(tile: Index, count: Index, start: bool, final: Callable[[Callable[[], None]], object]) -> None:
        right = f.at(weights, f.index(tile) * gemm.step_bytes)

        def block(index: Value) -> None:
            row, number = index * gemm.height, index - group * gemm.run
            slot = f.at(f.scratch, number * gemm.slot_bytes + job.slots)
            ahead = f.at(right, f.index(count) * gemm.step_bytes + number * (gemm.share * gemm.depth))
            _products(f, job, row, panel, slot, right, ahead, tile, count, start)
            there = f.minimum(gemm.height, f.index(f.extent(gemm.rows)) - row)
            final(lambda: finish_tile(f, job.like, job.epilogue, job.like.tile, row, panel, None, slot, there))

        f.loop(first, last, block)

    if gemm.depth >= gemm.steps:
        part(0, gemm.steps, True, lambda finish: finish())
        return
    part(0, gemm.depth, True, lambda finish: None)

    def later(tile: Value) -> None:
        count = f.minimum(gemm.depth, f.index(gemm.steps) - tile)
        is_last = f.compare("sge", tile + gemm.depth, gemm.steps)
        part(tile, count, False, lambda finish: f.when(is_last, finish))

    f.loop(gemm.depth, gemm.steps, later, step=gemm.depth)


def _products(f: PhaseFunction, job: _Job, row: Value, panel: Index, slot: Value, right: Value, ahead: Value,
              tile: Index, count: Index, start: bool) -> None:  # fmt: skip
    """A block's sums over `count` tiles of K from `tile` on; `start`: they are the first ones."""
    chosen, gemm = job.chosen, job.gemm
    corrected = chosen.columns is not None or chosen.x.row_sums is not None
    if start and corrected:
        sums = start_sums(f, job.like, job.like.tile, row, panel, chosen.columns, chosen.x.row_sums, chosen.row_factor)
        store_sums(f, job.like, job.like.tile, slot, sums)
    place = row * (chosen.x.group_bytes // ROWS) + f.index(tile) * (gemm.dot.parts * TILE_BYTES)
    left = f.at(f.pointer(chosen.x.handle), place)
    multiply(f, gemm, left, chosen.x.group_bytes, right, count, slot, corrected or not start, ahead)

"""Linear: x[..., K] times a constant matrix, in every numeric type, with the epilogue in registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ingot.config import BFLOAT16_ERROR
from ingot.dtypes import size_of
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm import Gemm, Left, Sums, Tile, emit_item, zeros
from ingot.kernels.cpu.gemm_dot import SHORT, Dot, bfloat16_dot, dot_for, vnni_dot
from ingot.kernels.cpu.gemm_epilogue import can_finish, epilogue_of, finish_tile
from ingot.kernels.cpu.gemm_pack import Array, byte_shift, column_corrections, pack_panels
from ingot.kernels.cpu.gemm_plan import cost, depths_for, grain_for, group_for, tiles_for
from ingot.kernels.cpu.gemm_prepare import needs_preparation, prepared
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

Choose = Callable[[str, Isa], "Dot | None"]


def rows_of(node: Node) -> Extent:
    """All leading axes of x as one."""
    return product(node.input(0).shape[:-1])


def weight_of(node: Node) -> Array:
    """The constant w[K, N]."""
    weight = node.input(1).constant
    assert weight is not None
    return weight


def types_fit(node: Node) -> bool:
    """Whether x and weights are of one type, both of bytes, or float32 by weights that are bfloat16 already."""
    x, weight = node.dtype, node.input(1).dtype
    return x == weight or (x in SHORT and weight in SHORT) or (x == "float32" and weight == "bfloat16")


def zero_points(node: Node) -> tuple[int, int]:
    """(of x, of the weights)"""
    return int(node.attributes.get("x_zero_point", 0)), int(node.attributes.get("weight_zero_point", 0))


def _general(dtype: str, isa: Isa) -> Dot | None:
    return dot_for(dtype, isa)


def _vnni(dtype: str, isa: Isa) -> Dot | None:
    return vnni_dot(isa) if dtype in SHORT and isa.has("avx512_vnni") else None


def _bfloat16(dtype: str, isa: Isa) -> Dot | None:
    return bfloat16_dot(isa) if dtype == "bfloat16" and isa.has("avx512_bf16") else None


def _rounded_pairs(dtype: str, isa: Isa) -> Dot | None:
    vectors = isa.has("avx512_bf16") and not isa.has("amx_bf16")  # by tiles where there are any: linear_tiles
    return bfloat16_dot(isa) if dtype == "float32" and vectors else None


def _rounded_weights(dtype: str, isa: Isa) -> Dot | None:
    return dot_for("bfloat16", isa) if dtype == "float32" else None


def _declaration(choose: Choose) -> Mapping[str, Any]:
    """when, space, prune and cost of a kernel that multiplies by the dot `choose` gives for the type of x."""

    def dot_of(node: Node, isa: Isa) -> Dot:
        dot = choose(node.dtype, isa)
        assert dot is not None
        return dot

    def applies(node: Node, isa: Isa) -> bool:
        dot, weight = choose(node.dtype, isa), node.input(1)
        if dot is None or weight.constant is None or weight.constant.ndim != 2:
            return False
        return types_fit(node) and (node.dtype in SHORT or not any(zero_points(node))) and can_finish(node, dot.result)

    def tiles(node: Node, isa: Isa) -> tuple[Tile, ...]:
        return tiles_for(rows_of(node), weight_of(node).shape[1], dot_of(node, isa).lanes, isa.registers)

    def steps(node: Node, isa: Isa) -> int:
        return -(-weight_of(node).shape[0] // dot_of(node, isa).group)

    def price(node: Node, isa: Isa, rows: int, vectors: int, depth: int) -> float:
        dot, weight = dot_of(node, isa), weight_of(node)
        size = weight.size * size_of(dot.right)
        return cost(dot, Tile(rows, vectors), rows_of(node), weight.shape[1], steps(node, isa), depth, size)

    return {
        "when": applies,
        "cost": price,
        "prune": lambda node, isa, rows, vectors, depth: Tile(rows, vectors) not in tiles(node, isa),
        "space": {
            "rows": lambda node, isa: tuple(dict.fromkeys(tile.rows for tile in tiles(node, isa))),
            "vectors": lambda node, isa: tuple(dict.fromkeys(tile.vectors for tile in tiles(node, isa))),
            "depth": lambda node, isa: depths_for(steps(node, isa), rows_of(node)),
        },
    }


@kernel("Linear", on="cpu", **_declaration(_general))
def linear(build: KernelBuilder, node: Node, rows: int, vectors: int, depth: int) -> None:
    """Floats by fused multiply-add, 16-bit ones widened to float32; 8-bit integers as centred pairs of int16."""
    dot = dot_for(node.dtype, build.isa)
    assert dot is not None
    weight = weight_of(node)
    if node.dtype in SHORT:
        weight = weight.astype("int16") - zero_points(node)[1]
    _emit(build, node, _Product(dot, Tile(rows, vectors), depth, pack_panels(weight, dot, vectors)))


@kernel("Linear", on="cpu", **_declaration(_vnni))
def linear_vnni(build: KernelBuilder, node: Node, rows: int, vectors: int, depth: int) -> None:
    """uint8 or int8 by int8 or uint8, four products a lane and instruction, exactly."""
    dot, weight = vnni_dot(build.isa), weight_of(node)
    x_zero_point, weight_zero_point = zero_points(node)
    shift = byte_shift(weight, weight_zero_point)
    shifted = weight.astype("int16") - shift
    excess = x_zero_point + (128 if node.dtype == "int8" else 0)
    columns = column_corrections(shifted, excess, weight_zero_point - shift, vectors * dot.lanes)
    packed = pack_panels(shifted, dot, vectors)
    _emit(build, node, _Product(dot, Tile(rows, vectors), depth, packed, columns, shift - weight_zero_point))


@kernel("Linear", on="cpu", **_declaration(_bfloat16))
def linear_bfloat16(build: KernelBuilder, node: Node, rows: int, vectors: int, depth: int) -> None:
    """Pairs of bfloat16 by the processor's own dot product."""
    dot = bfloat16_dot(build.isa)
    _emit(build, node, _Product(dot, Tile(rows, vectors), depth, pack_panels(weight_of(node), dot, vectors)))


@kernel("Linear", on="cpu", **_declaration(_rounded_pairs), tolerance=BFLOAT16_ERROR)
def linear_rounded_pairs(build: KernelBuilder, node: Node, rows: int, vectors: int, depth: int) -> None:
    """float32 rounded to pairs of bfloat16."""
    dot = bfloat16_dot(build.isa)
    _emit(build, node, _Product(dot, Tile(rows, vectors), depth, pack_panels(weight_of(node), dot, vectors)))


@kernel("Linear", on="cpu", **_declaration(_rounded_weights), tolerance=BFLOAT16_ERROR)
def linear_rounded_weights(build: KernelBuilder, node: Node, rows: int, vectors: int, depth: int) -> None:
    """float32 by weights kept in bfloat16, which halves what few rows wait for."""
    dot = dot_for("bfloat16", build.isa)
    assert dot is not None
    _emit(build, node, _Product(dot, Tile(rows, vectors), depth, pack_panels(weight_of(node), dot, vectors)))


@dataclass(frozen=True, eq=False)
class _Product:
    """`columns` is where sums of a column start; a row's sums start `row_factor` times its sum of x higher."""

    dot: Dot
    tile: Tile
    depth: int
    packed: Array
    columns: Array | None = None
    row_factor: int = 0


def _emit(build: KernelBuilder, node: Node, chosen: _Product) -> None:
    """epilogue(x[M, K] @ w[K, N]): a work item is a tile, and all tiles of a panel of weights follow each other."""
    dot, tile, rows = chosen.dot, chosen.tile, rows_of(node)
    depth, columns = weight_of(node).shape
    panels, steps = chosen.packed.shape[:2]
    run = group_for(rows, tile, steps * dot.left_bytes)
    gemm = Gemm(dot, tile, rows, columns, steps, chosen.depth, run, far=True)
    x, pitch, totals = _left(build, node, dot, depth, bool(chosen.row_factor))
    packed = build.pack(chosen.packed)
    corrections = None if chosen.columns is None or not chosen.columns.any() else build.pack(chosen.columns)
    epilogue = epilogue_of(build, node, dot.result, dot.lanes)
    slots = build.scratch(gemm.slot_bytes)
    height = run * tile.rows

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        left = Left(f.pointer(x), f.extent(pitch) * size_of(dot.left), dot.left_bytes)

        def visit(number: Value) -> None:
            group, panel = f.index(f.divide(number, panels)), f.remainder(number, panels)
            weights = f.at(f.pointer(packed), panel * (steps * gemm.step_bytes))
            first = group * height + f.maximum(begin - number * run, 0) * tile.rows
            last = f.minimum(group * height + f.minimum(end - number * run, run) * tile.rows, f.extent(rows))

            def block(f: PhaseFunction, first: Index, count: Index) -> Value:
                return f.at(weights, first * gemm.step_bytes)

            def start(f: PhaseFunction, tile: Tile, row: Value) -> Sums:
                return start_sums(f, gemm, tile, row, panel, corrections, totals, chosen.row_factor)

            def finish(f: PhaseFunction, tile: Tile, row: Value, sums: Sums | None, slot: Value) -> None:
                finish_tile(f, gemm, epilogue, tile, row, panel, sums, slot)

            emit_item(f, gemm, left, block, first, f.maximum(first, last), f.at(f.scratch, slots), start, finish)

        f.loop(f.divide(begin, run), f.divide(end + (run - 1), run), visit)

    build.phase(product((gemm.groups, panels, run)), body, grain_for(tile, steps, run, panels, gemm.groups))


def _left(build: KernelBuilder, node: Node, dot: Dot, depth: int, sums: bool) -> tuple[Handle, Extent, Handle | None]:
    """x as the dot wants it, elements from row to row, and the sums of its rows where they are asked for."""
    if not sums and not needs_preparation(node.dtype, depth, dot):
        return build.input(0), depth, None
    centre = zero_points(node)[0] if dot.left == "int16" else 0
    made = prepared(build, 0, rows_of(node), depth, dot, centre, sums)
    return made.handle, made.pitch, made.row_sums


def start_sums(f: PhaseFunction, gemm: Gemm, tile: Tile, row: Value, panel: Index, columns: Handle | None,
               totals: Handle | None, factor: int) -> Sums:  # fmt: skip
    """Sums before the first product: zero, or the corrections for zero points."""
    dot, vectors = gemm.dot, tile.vectors
    if columns is None and totals is None:
        return zeros(f, dot, tile)
    line = [f.constant(dot.sums, 0)] * vectors
    if columns is not None:
        place = f.at(f.pointer(columns), panel * (vectors * dot.sum_bytes))
        line = [f.load(dot.sums, place, j * dot.sum_bytes) for j in range(vectors)]
    if totals is None:
        return line * tile.rows
    places = [f.load("i32", f.at(f.pointer(totals), row * 4), r * 4) for r in range(tile.rows)]
    shifts = [f.splat(total * factor, dot.lanes) for total in places]
    return [value + shift for shift in shifts for value in line]

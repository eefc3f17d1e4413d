"""Sums of products with integers, group by group: what one scale multiplies is added up in a tile register, then scaled
and added by vectors.

Integers of up to eight bits are exact in one bfloat16 number, so that rows of float32 in two parts take two products
instead of three, and weights need no scale before they are multiplied. Of groups, a block is 16 rows by 16 columns,
whose sums stay in vector registers: what bounds it is how often the first cache is read and written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingot.kernels.cpu.build import PhaseFunction
from ingot.kernels.cpu.gemm_tiles import ROW_BYTES, ROWS, TILE_BYTES, Rows, TileDot, add_products, begin, end
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.weight_only_pack import Weights
from ingot.kernels.cpu.weight_only_unpack import FLOATS, Job, factors_of, group_of, place_of


def scaled_together(weights: Weights, dot: TileDot, most: int) -> int:
    """How many tiles of K have one scale, at most `most`: an even part of a group."""
    group = weights.group // dot.depth
    return max(n for n in range(1, min(group, most) + 1) if group % n == 0)


@dataclass(frozen=True, eq=False)
class Products:
    """What 16 rows are multiplied with: a panel's number, packed rows and weights, and how many tiles of K from `tile`
    on. From `ahead` on is fetched meanwhile."""

    panel: Value
    left: Value
    right: Value
    ahead: Value
    tile: Value
    count: Index


def add_groups(f: PhaseFunction, job: Job, given: Products, slot: Value, started: bool) -> None:
    """The products to the sums in `slot`. While a tile multiplies for a group, vectors scale the sums of the one
    before, which rest for a turn in one of two places: what tiles have stored can be read only when it has reached the
    cache."""
    groups = f.index(f.divide(f.index(given.count) + (job.together - 1), job.together))
    zero, fresh = f.constant(FLOATS, 0.0), f.at(f.scratch, job.fresh)
    sums = [f.load(FLOATS, slot, r * ROW_BYTES) if started else zero for r in range(ROWS)]

    def turn(number: Value, this: Value, other: Value, *sums: Value) -> list[Value]:
        _multiply(f, job, given, number)
        out = _scaled(f, job, given, number - 1, other, sums)
        end(f, 1, 1, this)
        return [other, this, *out]

    _multiply(f, job, given, f.index(0))
    end(f, 1, 1, fresh)
    _, last, *sums = f.loop(1, groups, turn, [f.at(fresh, TILE_BYTES), fresh, *sums])
    for r, total in enumerate(_scaled(f, job, given, groups - 1, last, sums)):
        f.store(total, slot, r * ROW_BYTES)


def _multiply(f: PhaseFunction, job: Job, given: Products, number: Value) -> None:
    """What one scale multiplies, the `number`-th time."""
    gemm, first = job.gemm, number * job.together
    whole = gemm.steps % job.together == 0
    steps = job.together if whole else f.minimum(job.together, f.index(given.count) - first)

    def step(_: Value, left: Value, right: Value, far: Value) -> list[Value]:
        add_products(f, gemm.dot, 1, Rows([left], TILE_BYTES, ROW_BYTES), right, far, gemm.share)
        return [f.at(left, gemm.dot.parts * TILE_BYTES), f.at(right, gemm.step_bytes), f.at(far, gemm.share)]

    left = f.at(given.left, first * (gemm.dot.parts * TILE_BYTES))
    begin(f, 1, 1, None)
    f.loop(0, steps, step, [left, f.at(given.right, first * gemm.step_bytes), f.at(given.ahead, first * gemm.share)])


def _scaled(f: PhaseFunction, job: Job, given: Products, number: Value, fresh: Value,
            sums: Sequence[Value]) -> list[Value]:  # fmt: skip
    """sums + the fresh ones of `_multiply` for the same `number`, by their scales."""
    k = (given.tile + number * job.together) * job.gemm.dot.depth
    (scale,) = factors_of(f, job, place_of(f, job, given.panel), group_of(f, job, k))
    return [f.fma(f.load(FLOATS, fresh, r * ROW_BYTES), scale, total) for r, total in enumerate(sums)]


def scale_all(f: PhaseFunction, job: Job, panel: Value, slot: Value) -> None:
    """The sums in `slot` by the scales of their columns, where these have one each."""
    pitch = job.gemm.wide * ROW_BYTES
    scales = factors_of(f, job, place_of(f, job, panel), f.index(0))

    def row(r: Value) -> None:
        for i, scale in enumerate(scales):
            place = r * pitch + i * ROW_BYTES
            f.store(f.load(FLOATS, slot, place) * scale, slot, place)

    f.loop(0, job.gemm.height, row)

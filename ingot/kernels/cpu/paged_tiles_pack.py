"""PagedAttention in tile registers: queries, keys and values in the order in which tiles are loaded."""

from __future__ import annotations

import math as numbers

from ingot.kernels.cpu.build import PhaseFunction
from ingot.kernels.cpu.gemm_tiles import ROW_BYTES, ROWS, TILE_BYTES
from ingot.kernels.cpu.llvm import Index, Value, vector
from ingot.kernels.cpu.paged_tiles_plan import PAIR_BYTES, WIDE, Tiles, View
from ingot.kernels.cpu.render import load
from ingot.kernels.cpu.tile_rows import INTERLEAVED, interleaved, pack_floats

_FLOATS, _WORDS, _PAIRS = vector("float", ROWS), vector("i16", ROWS), vector("i16", 2 * ROWS)
_GROUP = 2  # values of K side by side in a tile of keys or values


def pack_queries(f: PhaseFunction, job: Tiles, view: View) -> None:
    """Queries of all rows, scaled: scores are then logarithms of two, or parts of the softcap."""
    scale = job.scale / job.softcap if job.softcap else job.scale / numbers.log(2)
    base = view.first * job.heads + view.group * job.shared

    def row(r: Value) -> None:
        token, head = f.index(f.divide(r, job.shared)), f.index(f.remainder(r, job.shared))
        source = f.at(f.pointer(job.query), (base + token * job.heads + head) * job.head_bytes)
        group, within = f.index(f.divide(r, ROWS)), f.index(f.remainder(r, ROWS))
        target = f.at(f.scratch, group * (job.steps * job.row_bytes) + within * ROW_BYTES + job.queries_at)
        for step in range(job.steps):
            first, second = (_elements(f, job, source, (2 * step + half) * ROWS) for half in range(2))
            pack_floats(f, job.dot, first * scale, second * scale, f.at(target, step * job.row_bytes), TILE_BYTES)

    f.loop(0, view.rows, row)


def _elements(f: PhaseFunction, job: Tiles, source: Value, place: int) -> Value:
    """16 elements of a query; zeros behind its last."""
    if place >= job.depth:
        return f.constant(_FLOATS, 0.0)
    return load(f, job.dtype, source, place * job.element_bytes, ROWS, job.mask(f, place))


def pack_keys(f: PhaseFunction, job: Tiles, view: View, block: Value, count: Value) -> None:
    """Keys of `count` blocks from `block` on."""

    def one(j: Value) -> None:
        keys = job.pool.keys(f, _number(f, job, view, block + j), view.group)
        pair, half = f.index(f.divide(j, WIDE)), f.index(f.remainder(j, WIDE))
        target = f.at(f.scratch, pair * (job.steps * PAIR_BYTES) + half * TILE_BYTES + job.keys_at)
        if job.pool.scaled:
            f.store(f.load(_FLOATS, keys, job.pool.scales_at), f.scratch, j * ROW_BYTES + job.scales_at)
        whole = job.depth // job.dot.depth

        def step(s: Index, there: int) -> None:
            place = f.index(s) * (job.dot.depth * ROWS * job.pool_bytes)
            _key_step(f, job, f.at(keys, place), f.at(target, f.index(s) * PAIR_BYTES), there)

        f.loop(0, whole, lambda s: step(s, job.dot.depth))
        if job.steps > whole:
            step(whole, job.depth % job.dot.depth)

    f.loop(0, count, one)


def _number(f: PhaseFunction, job: Tiles, view: View, place: Value) -> Value:
    """The block at a place of the table: the nearest one of those that are seen."""
    near = f.index(f.minimum(f.index(f.maximum(place, view.oldest)), view.blocks - 1))
    return job.block_number(f, view.table, near)


def _key_step(f: PhaseFunction, job: Tiles, source: Value, target: Value, there: int) -> None:
    """32 elements of 16 keys, of which `there` exist; the others are zeros."""
    line = ROWS * job.pool_bytes
    for g in range(ROWS):
        pair = f.constant(_PAIRS, 0)
        if _GROUP * g < there:
            pair = _pair(f, job, source, _GROUP * g * line, line)
        f.store(pair, target, g * ROW_BYTES)


def pack_values(f: PhaseFunction, job: Tiles, view: View, block: Value, count: Value) -> None:
    """Values of the pairs of blocks that hold `count` from `block` on; zeros where nobody sees a token."""
    pairs = f.divide(count + (WIDE - 1), WIDE)

    def one(j: Value) -> None:
        place = block + j
        values = job.pool.values(f, _number(f, job, view, place), view.group)
        if job.pool.scaled:
            scales = f.load(_FLOATS, values, job.pool.scales_at)
            f.store(scales, f.scratch, j * ROW_BYTES + (job.scales_at + job.chunk * ROW_BYTES))
        there = f.select(f.compare("slt", place, view.oldest), 0, view.context - place * ROWS)
        pair, half = f.index(f.divide(j, WIDE)), f.index(f.remainder(j, WIDE))
        target = f.at(f.scratch, pair * PAIR_BYTES + half * (TILE_BYTES // 2) + job.values_at)
        f.when(f.compare("sge", there, ROWS), lambda: _value_block(f, job, values, target, None),
               lambda: _value_block(f, job, values, target, there))  # fmt: skip

    f.loop(0, f.index(pairs) * WIDE, one)


def _value_block(f: PhaseFunction, job: Tiles, values: Value, target: Value, there: Value | None) -> None:
    """A block's values, of which `there` are seen."""
    whole, width = job.depth // job.dot.depth, job.dot.depth * job.pool_bytes

    def step(s: Index, left: int) -> None:
        slot = f.at(target, f.index(s) * (job.pairs * PAIR_BYTES))
        _value_step(f, job, f.at(values, f.index(s) * width), slot, there, left)

    f.loop(0, whole, lambda s: step(s, job.dot.depth))
    if job.steps > whole:
        step(whole, job.depth % job.dot.depth)


def _value_step(f: PhaseFunction, job: Tiles, source: Value, target: Value, there: Value | None, left: int) -> None:
    """32 elements of 16 tokens, of which `left` exist; the others are zeros."""
    line = job.depth * job.pool_bytes
    for g in range(ROWS // _GROUP):
        kept = None if there is None else [f.compare("slt", _GROUP * g + i, there) for i in range(_GROUP)]
        for column in range(WIDE):
            pair, first = f.constant(_PAIRS, 0), column * ROWS
            if left > first:
                mask = f.first_lanes(left - first, ROWS) if left - first < ROWS else None
                pair = _pair(f, job, source, _GROUP * g * line + first * job.pool_bytes, line, mask, kept)
            f.store(pair, target, column * TILE_BYTES + g * ROW_BYTES)


def _pair(f: PhaseFunction, job: Tiles, source: Value, place: int, apart: int, mask: Value | None = None,
          kept: list[Value] | None = None) -> Value:  # fmt: skip
    """16 elements of the pool and those `apart` bytes further, lane by lane, as bfloat16; 0 where not kept."""
    places, scaled = [place, place + apart], job.pool.scaled
    if not scaled and apart == ROW_BYTES // 2 and mask is None and kept is None:
        return f.shuffle(f.load(_PAIRS, source, place), None, INTERLEAVED)
    if scaled:
        both = [job.pool.read(f, source, at, ROWS, mask) for at in places]
    elif mask is None:
        both = [f.load(_WORDS, source, at) for at in places]
    else:
        both = [f.load_masked(_WORDS, source, mask, at) for at in places]
    if kept is not None:
        both = [f.select(keep, x, 0) for keep, x in zip(kept, both, strict=True)]
    return interleaved(f, 1, *both)[0] if scaled else f.shuffle(both[0], both[1], INTERLEAVED)

"""PagedAttention in tile registers: scores of a chunk become weights relative to the running maximum.

Powers are of two, the logarithm's base being part of what queries were scaled by.
"""

from __future__ import annotations

import math as numbers

from ingot.kernels.cpu import math
from ingot.kernels.cpu.build import PhaseFunction
from ingot.kernels.cpu.gemm_tiles import ROW_BYTES, ROWS, TILE_BYTES
from ingot.kernels.cpu.llvm import Value, vector
from ingot.kernels.cpu.paged_tiles_plan import SLOT_BYTES, WIDE, Tiles, View
from ingot.kernels.cpu.reduce_kinds import halves

_FLOATS, _INTEGERS, _WORDS = vector("float", ROWS), vector("i32", ROWS), vector("i16", 2 * ROWS)
_KEPT = -0x100  # of a weight: as many bits as its two parts hold
_LINE = WIDE * ROW_BYTES  # of a row's scores of two blocks
_KEYS = WIDE * ROWS


def weigh(f: PhaseFunction, job: Tiles, view: View, row: Value, there: Value, block: Value, pairs: Value,
          sums: Value) -> None:  # fmt: skip
    """Weights of rows [row, row + there) for the keys of `pairs` pairs of blocks from `block` on; sums so far are
    scaled by what the maximum has become."""
    first = block * ROWS
    partial = f.compare("sgt", pairs * _KEYS + first, _limit(f, job, view, row))
    if job.window:
        last = _limit(f, job, view, row + (there - 1)) - job.window
        partial = f.binary("or", partial, f.compare("slt", first, last))

    def one(n: Value) -> None:
        scores = f.at(f.scratch, n * _LINE + job.scores_at)
        before = f.load("float", f.scratch, (row + n) * 4 + job.peaks_at)
        start = f.splat(before, ROWS)
        limit = _limit(f, job, view, row + n) - first
        (lanes,) = f.when(
            partial,
            lambda: [_highest(f, job, scores, pairs, start, limit)],
            lambda: [_highest(f, job, scores, pairs, start, None)],
        )
        peak = _largest(f, lanes)
        f.store(peak, f.scratch, (row + n) * 4 + job.peaks_at)
        level = f.splat(f.select(f.compare("oeq", peak, -numbers.inf), 0.0, peak), ROWS)
        factor = math.exp2_below(f, start - level)
        total = f.at(f.scratch, (row + n) * ROW_BYTES + job.totals_at)
        weights = f.at(f.scratch, _weights(f, job, n))
        found = _powers(f, job, scores, weights, pairs, level)
        f.store(f.fma(f.load(_FLOATS, total), factor, found), total)
        _rescale(f, job, f.at(sums, n * _LINE), factor)

    f.loop(0, there, one)


def _limit(f: PhaseFunction, job: Tiles, view: View, row: Value) -> Value:
    """Keys up to a row's own."""
    return view.least + f.index(f.divide(row, job.shared))


def _weights(f: PhaseFunction, job: Tiles, row: Value) -> Value:
    """Where a row's weights begin in scratch."""
    group, within = f.index(f.divide(row, ROWS)), f.index(f.remainder(row, ROWS))
    return group * (job.pairs * job.row_bytes) + within * ROW_BYTES + job.weights_at


def _highest(f: PhaseFunction, job: Tiles, scores: Value, pairs: Value, start: Value, limit: Value | None) -> Value:
    """Largest score of every lane; those of keys from `limit` on, or before the window, become -inf."""
    changes = limit is not None or bool(job.softcap) or job.pool.scaled

    def pair(i: Value, *peaks: Value) -> list[Value]:
        out = []
        for half, peak in enumerate(peaks):
            place = i * SLOT_BYTES + half * ROW_BYTES
            score = f.load(_FLOATS, scores, place)
            if job.pool.scaled:
                score = score * f.load(_FLOATS, f.scratch, i * _LINE + (half * ROW_BYTES + job.scales_at))
            if job.softcap:
                score = math.tanh(f, score) * (job.softcap / numbers.log(2))
            if limit is not None:
                score = _seen(f, job, score, limit - (i * _KEYS + half * ROWS))
            if changes:
                f.store(score, scores, place)
            out.append(_larger(f, score, peak))
        return out

    return _larger(f, *f.loop(0, pairs, pair, [start] * WIDE))


def _seen(f: PhaseFunction, job: Tiles, score: Value, limit: Value) -> Value:
    """The scores of keys [0, limit), of the last `window` of these where there is one; else -inf."""
    numbers_ = Value(f, _INTEGERS, f"<{', '.join(f'i32 {i}' for i in range(ROWS))}>")
    last = f.cast("trunc", limit, "i32")
    score = f.select(f.compare("slt", numbers_, f.splat(last, ROWS)), score, -numbers.inf)
    if not job.window:
        return score
    return f.select(f.compare("slt", numbers_, f.splat(last - job.window, ROWS)), -numbers.inf, score)


def _larger(f: PhaseFunction, x: Value, y: Value) -> Value:
    """The larger one; y where x is NaN."""
    return f.select(f.compare("ogt", x, y), x, y)


def _largest(f: PhaseFunction, lanes: Value) -> Value:
    while lanes.type != "float":
        lanes = _larger(f, *halves(f, lanes))
    return lanes


def _powers(f: PhaseFunction, job: Tiles, scores: Value, weights: Value, pairs: Value, level: Value) -> Value:
    """Weights as tiles take them; their sums by lane."""

    def pair(i: Value, *totals: Value) -> list[Value]:
        powers = []
        for half in range(WIDE):
            score = f.load(_FLOATS, scores, i * SLOT_BYTES + half * ROW_BYTES)
            powers.append(math.exp2_below(f, score - level))
        if not job.pool.scaled:
            powers = [_masked(f, power, _KEPT) for power in powers]
        found = [total + power for total, power in zip(totals, powers, strict=True)]
        if job.pool.scaled:
            place = job.scales_at + job.chunk * ROW_BYTES
            powers = [power * f.load(_FLOATS, f.scratch, i * _LINE + (half * ROW_BYTES + place))
                      for half, power in enumerate(powers)]  # fmt: skip
        _store_parts(f, powers, f.at(weights, i * job.row_bytes))
        return found

    first, second = f.loop(0, pairs, pair, [f.constant(_FLOATS, 0.0)] * WIDE)
    return first + second


def _store_parts(f: PhaseFunction, powers: list[Value], target: Value) -> None:
    """Two vectors as the upper halves of floats and what these leave: exact of numbers with 16 bits of mantissa."""
    high = [_masked(f, power, -0x10000) for power in powers]
    rest = [power - part for power, part in zip(powers, high, strict=True)]
    for number, (first, second) in enumerate((high, rest)):
        both = f.shuffle(f.bitcast(first, _WORDS), f.bitcast(second, _WORDS), range(1, 4 * ROWS, 2))
        f.store(both, target, number * TILE_BYTES)


def _masked(f: PhaseFunction, x: Value, mask: int) -> Value:
    return f.bitcast(f.binary("and", f.bitcast(x, _INTEGERS), mask), _FLOATS)


def _rescale(f: PhaseFunction, job: Tiles, sums: Value, factor: Value) -> None:
    for step in range(job.steps):
        for half in range(WIDE):
            place = step * SLOT_BYTES + half * ROW_BYTES
            f.store(f.load(_FLOATS, sums, place) * factor, sums, place)

"""PagedAttention: a work item is a tile of tokens and a group of heads; keys in lanes, 16 or more at once.

The rows of a tile are its tokens times the heads that share the group's keys. Where the tokens are not of one sequence
they are taken one by one. Blocks of keys come in chunks with a running maximum and sum. What is computed for a row, and
in which order, does not depend on the other rows: an answer is the same alone and in any batch.
"""

from __future__ import annotations

import math as numbers
from collections.abc import Callable
from dataclasses import dataclass

from ingot.kernels import kernel
from ingot.kernels.cpu import math
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value, vector
from ingot.kernels.cpu.paged_plan import WAYS, Lanes, Tile, applies, lanes_of
from ingot.kernels.cpu.paged_tiles_plan import tiled
from ingot.kernels.cpu.reduce_kinds import across
from ingot.kernels.cpu.render import load, store
from ingot.kernels.node import Node
from ingot.plan.extent import ceil_div, product


def _applies(node: Node, isa: Isa) -> bool:
    """Where tile registers take the node, they do: one engine has one arithmetic for a token, whatever its company."""
    return applies(node, isa) and not tiled(node, isa)


@kernel("PagedAttention", on="cpu", when=_applies)
def paged_attention(build: KernelBuilder, node: Node) -> None:
    """Tokens of a tile that follow each other in one sequence share what is read of the pool."""
    job = lanes_of(build, node)
    tokens = node.input(0).shape[0]

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def item(index: Value) -> None:
            number, group = f.index(f.divide(index, job.groups)), f.index(f.remainder(index, job.groups))
            _tile(f, job, number * job.tokens, f.index(f.extent(tokens)), group)

        f.loop(begin, end, item)

    build.phase(product((ceil_div(tokens, job.tokens), job.groups)), body)


def _tile(f: PhaseFunction, job: Lanes, first: Value, tokens: Value, group: Value) -> None:
    count = f.index(f.minimum(tokens - first, job.tokens))

    def one_by_one() -> None:
        f.loop(0, count, lambda k: _rows(f, job, Tile(first + k, group, 1)))

    if job.tokens == 1:
        one_by_one()
        return
    last = first + count - 1
    position, owner = job.position(f, first), job.owner(f, first)
    follows = f.compare("eq", job.position(f, last) - position, job.tokens - 1)
    alike = f.binary("and", follows, f.compare("eq", owner, job.owner(f, last)))
    whole = f.binary("and", f.compare("eq", count, job.tokens), f.compare("sge", position, 0))
    f.when(f.binary("and", alike, whole), lambda: _rows(f, job, Tile(first, group, job.tokens)), one_by_one)


def _rows(f: PhaseFunction, job: Lanes, tile: Tile) -> None:
    """All rows of a tile, chunk by chunk of the blocks they see."""
    context = job.position(f, tile.first + (tile.tokens - 1)) + 1
    blocks = f.index(f.divide(f.index(f.maximum(context, 0)) + (job.pool.block - 1), job.pool.block))
    oldest: Index = 0
    if job.window:
        key = f.index(f.maximum(job.position(f, tile.first) + (1 - job.window), 0))
        oldest = f.divide(key, job.pool.block)
    start = f.divide(oldest, job.chunk) * job.chunk
    table = job.table(f, tile.first)
    _begin(f, job, tile)

    def chunk(block: Value) -> None:
        count = f.index(f.minimum(blocks - block, job.chunk))
        _score(f, job, tile, table, block, count)
        _weigh(f, job, tile, count)
        first = f.maximum(f.index(oldest) - block, 0) if job.window else 0
        _accumulate(f, job, tile, Values(table, block, first, count, context))

    f.loop(start, blocks, chunk, step=job.chunk)
    _finish(f, job, tile)


def _each_row(f: PhaseFunction, job: Lanes, tile: Tile, row: Callable[[Value, Value, Value], None]) -> None:
    """row(number, byte offset of its head in queries and results, token) for every row of the tile."""

    def token(k: Value) -> None:
        base = (tile.first + k) * job.heads + tile.group * job.shared

        def head(h: Value) -> None:
            row(k * job.shared + h, (base + h) * job.head_bytes, tile.first + k)

        f.loop(0, job.shared, head)

    f.loop(0, tile.tokens, token)


def _vectors(f: PhaseFunction, job: Lanes, emit: Callable[[int, Value | None], None]) -> None:
    """emit(first element, mask of those that are there) for every vector of a head."""
    for place in range(0, job.depth, job.lanes):
        emit(place, job.mask(f, place))


def _begin(f: PhaseFunction, job: Lanes, tile: Tile) -> None:
    """Scaled queries in scratch, sums at 0, maxima at -inf, limits from positions."""
    zero = f.constant(vector("float", job.lanes), 0.0)

    def row(number: Value, offset: Value, token: Value) -> None:
        source = f.at(f.pointer(job.query), offset)
        query, sums = job.line(f, job.query_at, number), job.line(f, job.sums_at, number)

        def one(place: int, mask: Value | None) -> None:
            x = load(f, job.dtype, source, place * job.element_bytes, job.lanes, mask)
            f.store(x * job.scale, query, place * 4)
            f.store(zero, sums, place * 4)

        _vectors(f, job, one)
        f.store(f.constant("float", -numbers.inf), f.at(f.scratch, job.peaks_at), number * 4)
        f.store(f.constant("float", 0.0), f.at(f.scratch, job.totals_at), number * 4)
        f.store(job.position(f, token) + 1, f.at(f.scratch, job.limits_at), number * 8)

    _each_row(f, job, tile, row)


def _row_tiles(f: PhaseFunction, rows: int, height: int, emit: Callable[[Value, int], None]) -> None:
    """emit(first row, count) for groups of at most `height` rows."""
    whole = rows - rows % height
    if whole:
        f.loop(0, whole, lambda r: emit(r, height), step=height)
    if rows > whole:
        emit(f.index(whole), rows - whole)


def _score(f: PhaseFunction, job: Lanes, tile: Tile, table: Value, block: Value, count: Value) -> None:
    """Scores of a chunk; keys that a row does not see have -inf."""

    def one(j: Value) -> None:
        keys = job.pool.keys(f, job.block_number(f, table, block + j), tile.group)
        first = (block + j) * job.pool.block
        _row_tiles(f, tile.tokens * job.shared, job.score_rows,
                   lambda r, height: _score_rows(f, job, keys, r, height, first, j * job.pool.block))  # fmt: skip

    f.loop(0, count, one)


def _score_rows(f: PhaseFunction, job: Lanes, keys: Value, row: Value, height: int, first: Value,
                place: Value) -> None:  # fmt: skip
    parts, step = job.pool.block // job.lanes, WAYS if job.depth % WAYS == 0 else 1
    size, queries = job.pool_bytes, job.line(f, job.query_at, row)
    zero = f.constant(vector("float", job.lanes), 0.0)

    def products(d: Value, *sums: Value) -> list[Value]:
        out = list(sums)
        for way in range(step):
            line = [job.pool.read(f, keys, ((d + way) * job.pool.block + p * job.lanes) * size, job.lanes)
                    for p in range(parts)]  # fmt: skip
            for r in range(height):
                query = f.splat(f.load("float", queries, (d + way) * 4 + r * job.line_bytes), job.lanes)
                for p, key in enumerate(line):
                    index = (way * height + r) * parts + p
                    out[index] = f.fma(query, key, out[index])
        return out

    sums = f.loop(0, job.depth, products, [zero] * (step * height * parts), step)
    for r in range(height):
        limit = f.load("i64", f.at(f.scratch, job.limits_at), (row + r) * 8)
        for p in range(parts):
            score = sums[r * parts + p]
            for way in range(1, step):
                score = score + sums[(way * height + r) * parts + p]
            if job.pool.scaled:
                score = score * f.load(score.type, keys, job.pool.scales_at + p * job.lanes * 4)
            score = _seen(f, job, score, limit, first + p * job.lanes)
            f.store(score, job.scores(f, row + r), (place + p * job.lanes) * 4)


def _seen(f: PhaseFunction, job: Lanes, score: Value, limit: Value, first: Value) -> Value:
    """The scores of the keys [first, first + lanes) where the row sees them, else -inf."""
    if job.softcap:
        score = math.tanh(f, score * (1 / job.softcap)) * job.softcap
    score = f.select(f.first_lanes(limit - first, job.lanes), score, -numbers.inf)
    if not job.window:
        return score
    return f.select(f.first_lanes(limit - job.window - first, job.lanes), -numbers.inf, score)


def _weigh(f: PhaseFunction, job: Lanes, tile: Tile, count: Value) -> None:
    """Scores of a chunk become weights relative to the running maximum; sums so far are to be scaled by a factor."""
    type_, stop = vector("float", job.lanes), count * job.pool.block

    def one(row: Value) -> None:
        scores = job.scores(f, row)
        peaks, totals, factors = (f.at(f.scratch, at) for at in (job.peaks_at, job.totals_at, job.factors_at))

        def highest(i: Value, peak: Value) -> list[Value]:
            score = f.load(type_, scores, i * 4)
            return [f.select(f.compare("ogt", score, peak), score, peak)]

        before = f.load("float", peaks, row * 4)
        (lanes,) = f.loop(0, stop, highest, [f.splat(before, job.lanes)], job.lanes)
        peak = across(f, "max", "float32", lanes)
        level = f.select(f.compare("oeq", peak, -numbers.inf), 0.0, peak)
        spread = f.splat(level, job.lanes)

        def weights(i: Value, total: Value) -> list[Value]:
            power = math.exp(f, f.load(type_, scores, i * 4) - spread)
            f.store(power, scores, i * 4)
            return [total + power]

        (sums,) = f.loop(0, stop, weights, [f.constant(type_, 0.0)], job.lanes)
        factor = f.extract(math.exp(f, f.splat(before - level, job.lanes)), 0)
        total = f.load("float", totals, row * 4) * factor + across(f, "add", "float32", sums)
        for value, place in ((peak, peaks), (total, totals), (factor, factors)):
            f.store(value, place, row * 4)

    f.loop(0, tile.tokens * job.shared, one)


@dataclass(frozen=True)
class Values:
    """Those of the blocks [block + first, block + count) of a table: what lies before may be another sequence's by
    now."""

    table: Value
    block: Value
    first: Index
    count: Value
    context: Value


def _accumulate(f: PhaseFunction, job: Lanes, tile: Tile, part: Values) -> None:
    """sums = sums * factor + weights * values of a chunk."""
    for begin in range(0, job.depth, job.lanes * job.sum_vectors):
        places = range(begin, min(job.depth, begin + job.lanes * job.sum_vectors), job.lanes)
        _row_tiles(f, tile.tokens * job.shared, job.sum_rows,
                   lambda r, height, p=places: _sum_rows(f, job, tile, r, height, p, part))  # type: ignore[misc]  # fmt: skip


def _sum_rows(f: PhaseFunction, job: Lanes, tile: Tile, row: Value, height: int, places: range,
              part: Values) -> None:  # fmt: skip
    type_, sums = vector("float", job.lanes), job.line(f, job.sums_at, row)
    start: list[Value] = []
    for r in range(height):
        factor = f.splat(f.load("float", f.at(f.scratch, job.factors_at), (row + r) * 4), job.lanes)
        start += [f.load(type_, sums, r * job.line_bytes + place * 4) * factor for place in places]

    def one(j: Value, *totals: Value) -> tuple[Value, ...]:
        values = job.pool.values(f, job.block_number(f, part.table, part.block + j), tile.group)
        weights = f.at(job.scores(f, row), j * (job.pool.block * 4))
        there = f.minimum(part.context - (part.block + j) * job.pool.block, job.pool.block)

        def token(t: Value, *totals: Value) -> list[Value]:
            line = f.at(values, t * (job.depth * job.pool_bytes))
            read = [job.pool.read(f, line, place * job.pool_bytes, job.lanes, job.mask(f, place)) for place in places]
            if job.pool.scaled:
                scale = f.splat(f.load("float", values, job.pool.scales_at + t * 4), job.lanes)
                read = [x * scale for x in read]
            out: list[Value] = []
            for r in range(height):
                weight = f.splat(f.load("float", weights, t * 4 + r * job.score_bytes), job.lanes)
                out += [f.fma(weight, value, totals[r * len(read) + v]) for v, value in enumerate(read)]
            return out

        return f.loop(0, there, token, totals)

    totals = f.loop(part.first, part.count, one, start)
    for r in range(height):
        for v, place in enumerate(places):
            f.store(totals[r * len(places) + v], sums, r * job.line_bytes + place * 4)


def _finish(f: PhaseFunction, job: Lanes, tile: Tile) -> None:
    """Sums over their weights' total; a row that saw nothing gives 0."""

    def row(number: Value, offset: Value, token: Value) -> None:
        total = f.load("float", f.at(f.scratch, job.totals_at), number * 4)
        factor = f.binary("fdiv", 1.0, f.select(f.compare("oeq", total, 0.0), 1.0, total))
        sums, target = job.line(f, job.sums_at, number), f.at(f.pointer(job.result), offset)

        def one(place: int, mask: Value | None) -> None:
            value = f.load(vector("float", job.lanes), sums, place * 4) * f.splat(factor, job.lanes)
            store(f, job.dtype, value, target, place * job.element_bytes, mask)

        _vectors(f, job, one)

    _each_row(f, job, tile, row)

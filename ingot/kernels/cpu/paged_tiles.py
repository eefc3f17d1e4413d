"""PagedAttention in tile registers: tokens of a work item that follow each other in one sequence share what is made of
its keys and values.

Queries and weights are two bfloat16 parts each; keys and values, which the pool holds as bfloat16 or bytes, are one
that says all of them. As in paged_attention.py keys come in chunks with a running maximum and sum, and what is computed
for a row does not depend on the other rows: keys that it does not see weigh exactly 0.
"""

from __future__ import annotations

import math as numbers
from functools import partial

from ingot.config import SPLIT_ERROR
from ingot.kernels import kernel
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm_tiles import (
    ROW_BYTES,
    ROWS,
    TALLEST,
    Rows,
    add_products,
    begin,
    configure,
    end,
    release,
)
from ingot.kernels.cpu.llvm import Index, Value, vector
from ingot.kernels.cpu.paged_tiles_pack import pack_keys, pack_queries, pack_values
from ingot.kernels.cpu.paged_tiles_plan import PAIR_BYTES, SLOT_BYTES, WIDE, Tiles, View, tiled, tiles_of
from ingot.kernels.cpu.paged_tiles_weigh import weigh
from ingot.kernels.cpu.reduce_kinds import across
from ingot.kernels.cpu.render import store
from ingot.kernels.node import Node
from ingot.plan.extent import ceil_div, product

_FLOATS = vector("float", ROWS)


@kernel("PagedAttention", on="cpu", when=tiled, tolerance=SPLIT_ERROR)
def paged_attention_tiles(build: KernelBuilder, node: Node) -> None:
    """A work item is some tokens and a group of heads."""
    job = tiles_of(build, node)
    tokens = node.input(0).shape[0]

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        configure(f, job.registers)

        def item(index: Value) -> None:
            number, group = f.index(f.divide(index, job.groups)), f.index(f.remainder(index, job.groups))
            first = number * job.tokens
            _item(f, job, first, f.index(f.minimum(first + job.tokens, f.extent(tokens))), group)

        f.loop(begin, end, item)
        release(f)

    build.phase(product((ceil_div(tokens, job.tokens), job.groups)), body)


def _item(f: PhaseFunction, job: Tiles, first: Value, end: Value, group: Value) -> None:
    """Tokens [first, end), run by run."""

    def run(token: Value) -> list[Value]:
        position, owner = job.position(f, token), job.owner(f, token)

        def follows(other: Value) -> Value:
            there = f.index(f.minimum(other, end - 1))
            same = f.compare("eq", job.owner(f, there), owner)
            next_ = f.compare("eq", job.position(f, there) - position, other - token)
            known = f.binary("and", f.compare("sge", position, 0), f.compare("slt", other, end))
            return f.binary("and", f.binary("and", same, next_), known)

        (after,) = f.loop_while(follows, lambda other: [other + 1], [token + 1])
        _rows(f, job, _view(f, job, token, after - token, group, position))
        return [after]

    f.loop_while(lambda token: f.compare("slt", token, end), run, [first])


def _view(f: PhaseFunction, job: Tiles, first: Value, tokens: Value, group: Value, position: Value) -> View:
    least = position + 1
    context = f.index(f.maximum(least + (tokens - 1), 0))
    oldest: Index = 0
    if job.window:
        oldest = f.divide(f.index(f.maximum(least - job.window, 0)), ROWS)
    blocks = f.index(f.divide(context + (ROWS - 1), ROWS))
    return View(
        first, group, tokens, tokens * job.shared, job.table(f, first), least, context, f.index(oldest), blocks
    )  # fmt: skip


def _rows(f: PhaseFunction, job: Tiles, view: View) -> None:
    """All rows of some tokens, chunk by chunk of the blocks they see."""
    pack_queries(f, job, view)
    _begin(f, job, view)

    def chunk(block: Value) -> None:
        count = f.index(f.minimum(view.blocks - block, job.chunk))
        pack_keys(f, job, view, block, count)
        pack_values(f, job, view, block, count)
        f.loop(0, view.rows, lambda row: _block_of_rows(f, job, view, row, block, count), step=TALLEST)

    f.loop(f.index(f.divide(view.oldest, job.chunk)) * job.chunk, view.blocks, chunk, step=job.chunk)
    _finish(f, job, view)


def _begin(f: PhaseFunction, job: Tiles, view: View) -> None:
    """Sums and totals at 0, maxima at -inf."""
    zero = f.constant(_FLOATS, 0.0)

    def row(r: Value) -> None:
        for place in _places(job):
            f.store(zero, _sums(f, job, r), place)
        f.store(zero, f.scratch, r * ROW_BYTES + job.totals_at)
        f.store(f.constant("float", -numbers.inf), f.scratch, r * 4 + job.peaks_at)

    f.loop(0, view.rows, row)


def _places(job: Tiles) -> list[int]:
    """Of the vectors of a row's sums, from its first on."""
    return [step * SLOT_BYTES + half * ROW_BYTES for step in range(job.steps) for half in range(WIDE)]


def _sums(f: PhaseFunction, job: Tiles, row: Value) -> Value:
    block, within = f.index(f.divide(row, TALLEST)), f.index(f.remainder(row, TALLEST))
    return f.at(f.scratch, block * job.block_bytes + within * (WIDE * ROW_BYTES) + job.sums_at)


def _block_of_rows(f: PhaseFunction, job: Tiles, view: View, row: Value, block: Value, count: Value) -> None:
    """Rows [row, row + 32) and the keys of a chunk that any of them sees."""
    there = f.index(f.minimum(view.rows - row, TALLEST))
    seen = view.least + f.index(f.divide(row + (there - 1), job.shared)) - block * ROWS
    pairs = f.index(f.divide(f.index(f.maximum(f.index(f.minimum(seen, count * ROWS)), 0)) + (2 * ROWS - 1), 2 * ROWS))
    steps = partial(_steps, f, job, view, row, there, block, pairs)
    f.when(f.compare("sgt", there, ROWS), lambda: steps(2), lambda: steps(1))


def _steps(f: PhaseFunction, job: Tiles, view: View, row: Value, there: Value, block: Value, pairs: Value,
           tops: int) -> None:  # fmt: skip
    sums = f.at(f.scratch, f.index(f.divide(row, TALLEST)) * job.block_bytes + job.sums_at)
    _score(f, job, row, pairs, tops)
    f.when(f.compare("sgt", pairs, 0), lambda: weigh(f, job, view, row, there, block, pairs, sums))
    _accumulate(f, job, sums, pairs, tops)


def _score(f: PhaseFunction, job: Tiles, row: Value, pairs: Value, tops: int) -> None:
    """Scores of 32 rows, two blocks at a time."""
    group_bytes = job.steps * job.row_bytes
    queries = f.at(f.scratch, f.index(f.divide(row, ROWS)) * group_bytes + job.queries_at)

    def pair(i: Value) -> None:
        keys = f.at(f.scratch, i * (job.steps * PAIR_BYTES) + job.keys_at)
        begin(f, tops, WIDE, None)
        for step in range(job.steps):
            rows = [f.at(queries, top * group_bytes + step * job.row_bytes) for top in range(tops)]
            _add(f, job, rows, f.at(keys, step * PAIR_BYTES))
        end(f, tops, WIDE, f.at(f.scratch, i * SLOT_BYTES + job.scores_at))

    f.loop(0, pairs, pair)


def _accumulate(f: PhaseFunction, job: Tiles, sums: Value, pairs: Value, tops: int) -> None:
    """sums += weights * values of a chunk."""
    group_bytes = job.pairs * job.row_bytes

    def step(number: Value) -> None:
        slot = f.at(sums, number * SLOT_BYTES)
        values = f.at(f.scratch, number * (job.pairs * PAIR_BYTES) + job.values_at)
        begin(f, tops, WIDE, slot)

        def pair(i: Value) -> None:
            weights = f.at(f.scratch, i * job.row_bytes + job.weights_at)
            _add(f, job, [f.at(weights, top * group_bytes) for top in range(tops)], f.at(values, i * PAIR_BYTES))

        f.loop(0, pairs, pair)
        end(f, tops, WIDE, slot)

    f.loop(0, job.steps, step)


def _add(f: PhaseFunction, job: Tiles, rows: list[Value], right: Value) -> None:
    add_products(f, job.dot, WIDE, Rows(rows, job.row_bytes // job.dot.parts, ROW_BYTES), right, right, 0)


def _finish(f: PhaseFunction, job: Tiles, view: View) -> None:
    """Sums over their weights' total; a row that saw nothing gives 0."""
    base = view.first * job.heads + view.group * job.shared

    def row(r: Value) -> None:
        total = across(f, "add", "float32", f.load(_FLOATS, f.scratch, r * ROW_BYTES + job.totals_at))
        factor = f.splat(f.binary("fdiv", 1.0, f.select(f.compare("oeq", total, 0.0), 1.0, total)), ROWS)
        token, head = f.index(f.divide(r, job.shared)), f.index(f.remainder(r, job.shared))
        target = f.at(f.pointer(job.result), (base + token * job.heads + head) * job.head_bytes)
        for number, place in enumerate(_places(job)):
            first = number * ROWS
            if first < job.depth:
                value = f.load(_FLOATS, _sums(f, job, r), place) * factor
                store(f, job.dtype, value, target, first * job.element_bytes, job.mask(f, first))

    f.loop(0, view.rows, row)

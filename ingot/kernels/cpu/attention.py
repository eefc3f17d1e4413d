"""Attention in one pass over the keys, queries in lanes: scores, softmax and output are all computed transposed.

    scoresᵀ[t, q] = K[t, :] · Qᵀ[:, q]      outputᵀ[e, q] = Σ over t of V[t, e] · weightsᵀ[t, q]

K and V are then left operands read as they lie in memory, Qᵀ and the weights are packed panels, and the softmax over
keys goes down the lanes without any horizontal step. Keys come in blocks with a running maximum and sum (Milakov,
Gimelshein: "Online normalizer calculation for softmax", 2018; Dao et al.: "FlashAttention", 2022). Query heads that
share a key head are one matrix of queries. Lanes without a query repeat the last one.
"""

from __future__ import annotations

import math as numbers

from ingot.dtypes import size_of
from ingot.ir.elementwise import FLOATS
from ingot.kernels import kernel
from ingot.kernels.cpu import math
from ingot.kernels.cpu.attention_mask import fill_lanes, mask_block, mask_row, masked, visible_keys
from ingot.kernels.cpu.attention_plan import ROWS, Plan, dot_of, heads_of, plan_of
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm import Left, Tile, for_rows, load_sums, multiply, store_sums, zeros
from ingot.kernels.cpu.gemm_copy import transposed
from ingot.kernels.cpu.gemm_plan import GIGAHERTZ, known
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.render import MEMORY, load, store
from ingot.kernels.node import Node
from ingot.plan.extent import product

_BLOCKS = (128, 256)  # keys whose scores stay in the first- or second-level cache


def _applies(node: Node, isa: Isa) -> bool:
    ports = [node.input(i) for i in range(3)]
    static = all(isinstance(port.shape[axis], int) for port in ports for axis in (1, 3))
    alike = len({port.dtype for port in ports}) == 1 and node.dtype in FLOATS and node.dtype in MEMORY
    mask = node.input(3) if node.has_input(3) else None
    known_mask = mask is None or ((mask.dtype == "bool" or mask.dtype in FLOATS) and mask.dtype in MEMORY)
    return static and alike and known_mask and all(port.shape[1] != 0 for port in ports)


def _vectors(node: Node, isa: Isa) -> tuple[int, ...]:
    queries, lanes = heads_of(node).queries, dot_of(node.dtype, isa).lanes
    needed = max(-(-queries // lanes), 1) if isinstance(queries, int) else max(ROWS[isa.registers])
    return tuple(vectors for vectors in ROWS[isa.registers] if vectors <= needed)


def _blocks(node: Node, isa: Isa) -> tuple[int, ...]:
    keys = heads_of(node).keys
    return _BLOCKS if isinstance(keys, str) else tuple(dict.fromkeys(min(block, max(keys, 1)) for block in _BLOCKS))


def _cost(node: Node, isa: Isa, vectors: int, block: int) -> float:
    shape, dot = heads_of(node), dot_of(node.dtype, isa)
    keys, rows = known(shape.keys), ROWS[isa.registers][vectors]
    items = known(shape.batch) * shape.groups * -(-known(shape.queries) // (vectors * dot.lanes))
    depth, step = shape.depth + shape.width, max(rows * vectors / 2, 4) / rows
    fixed = depth * vectors * 8 + -(-keys // block) * (shape.width * vectors * 3 + 100)
    return 0.5 + items * (keys * (depth * step + vectors * 14) + fixed) / (GIGAHERTZ * 1000)


@kernel("Attention", on="cpu", when=_applies, space={"vectors": _vectors, "block": _blocks}, cost=_cost)
def attention(build: KernelBuilder, node: Node, vectors: int, block: int) -> None:
    """A work item is `vectors` vectors of queries of one key head."""
    plan = plan_of(build, node, vectors, block)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        blocks = f.extent(plan.blocks)

        def item(index: Value) -> None:
            head, number = f.index(f.divide(index, blocks)), f.index(f.remainder(index, blocks))
            _emit_item(f, plan, head, number * plan.width)

        f.loop(begin, end, item)

    build.phase(product((plan.shape.batch, plan.shape.groups, plan.blocks)), body)


def _emit_item(f: PhaseFunction, plan: Plan, head: Value, first: Value) -> None:
    """Queries [first, first + width) of a key head."""
    if plan.by_lane:
        fill_lanes(f, plan, head, first)
    _pack_queries(f, plan, head, first)
    _start_state(f, plan)
    keys, row = f.index(visible_keys(f, plan, first)), mask_row(f, plan, head)

    def block(begin: Index, count: Index) -> None:
        _score(f, plan, head, begin, count)
        mask_block(f, plan, begin, count)
        _weigh(f, plan, begin, count, row)
        _accumulate(f, plan, head, begin, count)

    if plan.single:
        block(0, keys if plan.causal else f.extent(plan.shape.keys))
    else:
        f.loop(0, keys, lambda begin: block(begin, f.minimum(plan.block, keys - begin)), step=plan.block)
    _finish(f, plan, head, first)


# -- the steps of an item


def _query_rows(f: PhaseFunction, plan: Plan, first: Value, j: Value) -> list[Value]:
    """Numbers of the queries in vector j."""
    last = f.index(f.extent(plan.shape.queries)) - 1
    return [f.index(f.minimum(first + (j * plan.lanes + i), last)) for i in range(plan.lanes)]


def _pack_queries(f: PhaseFunction, plan: Plan, head: Value, first: Value) -> None:
    """Qᵀ times the scale: squares are transposed, those at the end of D are filled with zeros."""
    lanes, depth, size = plan.lanes, plan.shape.depth, size_of(plan.dtype)
    base = f.at(f.pointer(plan.query), head * f.extent(plan.shape.queries) * (depth * size))
    panel = f.at(f.scratch, plan.panel_at)

    def vectors(j: Value) -> None:
        rows = [f.at(base, query * (depth * size)) for query in _query_rows(f, plan, first, j)]

        def square(d: Value) -> None:
            mask = f.first_lanes(depth - d, lanes) if depth % lanes else None
            values = [load(f, plan.dtype, row, d * size, lanes, mask) * plan.scale for row in rows]
            place = f.at(panel, d * plan.line + j * plan.dot.sum_bytes)
            for i, column in enumerate(transposed(f, values)):
                f.store(column, place, i * plan.line)

        f.loop(0, depth, square, step=lanes)

    f.loop(0, plan.vectors, vectors)


def _start_state(f: PhaseFunction, plan: Plan) -> None:
    """Maximum -inf, sum 0, outputs 0."""
    _set_state(f, plan, 0, [f.constant(plan.dot.sums, -numbers.inf)] * plan.vectors)
    _set_state(f, plan, 1, [f.constant(plan.dot.sums, 0.0)] * plan.vectors)
    if not plan.single:
        sums = f.at(f.scratch, plan.sums_at)
        f.loop(0, plan.output.slot_bytes, lambda o: f.store(f.constant(plan.dot.sums, 0.0), sums, o),
               step=plan.dot.sum_bytes)  # fmt: skip


def _set_state(f: PhaseFunction, plan: Plan, index: int, values: list[Value]) -> None:
    for j, value in enumerate(values):
        f.store(value, f.scratch, plan.state_at + index * plan.line + j * plan.dot.sum_bytes)


def _state(f: PhaseFunction, plan: Plan, index: int) -> list[Value]:
    """Of each query: 0 the maximum so far, 1 the sum of its weights, 2 what the last block rescaled by."""
    place = plan.state_at + index * plan.line
    return [f.load(plan.dot.sums, f.scratch, place + j * plan.dot.sum_bytes) for j in range(plan.vectors)]


def _score(f: PhaseFunction, plan: Plan, head: Value, begin: Index, count: Index) -> None:
    """Scores of a block of keys. The last tile of all keys overlaps the one before; rows before the block are spare."""
    gemm, keys = plan.scores, f.extent(plan.shape.keys)
    stride = plan.key.stride(f)
    left = Left(plan.key.pointer(f, head), stride, size_of(plan.dot.left))
    panel, target = f.at(f.scratch, plan.panel_at), f.at(f.scratch, plan.scores_at)

    def tiles(tile: Tile) -> None:
        def one(t: Value) -> None:
            row = f.index(f.minimum(f.index(begin) + t, f.index(keys) - tile.rows))
            sums = multiply(f, gemm, tile, left.moved(f, row, 0), panel, plan.shape.depth, zeros(f, plan.dot, tile))
            store_sums(f, gemm, tile, f.at(target, (row - begin) * plan.line), sums)

        f.loop(0, count, one, step=tile.rows)

    for_rows(f, gemm, keys, tiles)


def _weigh(f: PhaseFunction, plan: Plan, begin: Index, count: Index, row: Value | None) -> None:
    """Scores of a block become weights relative to the running maximum; the state follows."""
    scores, size = f.at(f.scratch, plan.scores_at), plan.dot.sum_bytes
    changes = bool(plan.softcap) or plan.mask is not None or plan.causal

    def highest(t: Value, *peaks: Value) -> list[Value]:
        place, out = f.at(scores, t * plan.line), []
        for j, peak in enumerate(peaks):
            score = f.load(plan.dot.sums, place, j * size)
            if plan.softcap:
                score = math.tanh(f, score * (1 / plan.softcap)) * plan.softcap
            score = masked(f, plan, score, t, begin, j, row)
            if changes:
                f.store(score, place, j * size)
            out.append(f.select(f.compare("ogt", score, peak), score, peak))
        return out

    before = _state(f, plan, 0)
    peaks = f.loop(0, count, highest, before)
    _set_state(f, plan, 0, list(peaks))
    level = [f.select(f.compare("oeq", peak, -numbers.inf), 0.0, peak) for peak in peaks]
    factors = [math.exp(f, old - new) for old, new in zip(before, level, strict=True)]

    def weights(t: Value, *totals: Value) -> list[Value]:
        place = f.at(scores, t * plan.line)
        powers = [math.exp(f, f.load(plan.dot.sums, place, j * size) - level[j]) for j in range(plan.vectors)]
        for j, power in enumerate(powers):
            f.store(power, place, j * size)
        return [total + power for total, power in zip(totals, powers, strict=True)]

    scaled = [total * factor for total, factor in zip(_state(f, plan, 1), factors, strict=True)]
    _set_state(f, plan, 1, list(f.loop(0, count, weights, scaled)))
    _set_state(f, plan, 2, factors)


def _accumulate(f: PhaseFunction, plan: Plan, head: Value, begin: Index, count: Index) -> None:
    """outputᵀ, rescaled to the new maximum, plus Vᵀ times the weights of a block."""
    gemm, tile, width = plan.output, plan.output.tile, plan.shape.width
    size, stride = size_of(plan.dot.left), plan.value.stride(f)
    left = Left(f.at(plan.value.pointer(f, head), f.index(begin) * stride), size, stride)
    scores, slots = f.at(f.scratch, plan.scores_at), f.at(f.scratch, plan.sums_at)

    def one(t: Value) -> None:
        row = f.index(f.minimum(t * tile.rows, width - tile.rows))
        slot = f.at(slots, t * gemm.bytes_of(tile))
        start = zeros(f, plan.dot, tile)
        if not plan.single:
            factors = _state(f, plan, 2)
            start = [total * factors[i % plan.vectors] for i, total in enumerate(load_sums(f, gemm, tile, slot))]
        store_sums(f, gemm, tile, slot, multiply(f, gemm, tile, left.moved(f, row, 0), scores, count, start))

    f.loop(0, gemm.run, one)


def _finish(f: PhaseFunction, plan: Plan, head: Value, first: Value) -> None:
    """outputᵀ over the sums, transposed into the output; a query that sees no key gets 0."""
    lanes, width, size, tile = plan.lanes, plan.shape.width, size_of(plan.dtype), plan.output.tile
    slots, dense = f.at(f.scratch, plan.sums_at), f.at(f.scratch, plan.scores_at)
    totals = _state(f, plan, 1)
    inverse = [f.binary("fdiv", 1.0, f.select(f.compare("oeq", total, 0.0), 1.0, total)) for total in totals]
    whole, overlap = (plan.output.run - 1) * tile.rows, plan.output.run * tile.rows - width

    def line(e: Value) -> None:
        source = f.at(slots, f.select(f.compare("slt", e, whole), e, e + f.index(overlap)) * plan.line)
        for j, factor in enumerate(inverse):
            value = f.load(plan.dot.sums, source, j * plan.dot.sum_bytes) * factor
            f.store(value, f.at(dense, e * plan.line), j * plan.dot.sum_bytes)

    f.loop(0, width, line)
    base = f.at(f.pointer(plan.result), head * f.extent(plan.shape.queries) * (width * size))

    def vectors(j: Value) -> None:
        rows = [f.at(base, query * (width * size)) for query in _query_rows(f, plan, first, j)]

        def square(e: Value) -> None:
            place = f.at(dense, e * plan.line + j * plan.dot.sum_bytes)
            columns = transposed(f, [f.load(plan.dot.sums, place, i * plan.line) for i in range(lanes)])
            mask = f.first_lanes(width - e, lanes) if width % lanes else None
            for row, column in zip(rows, columns, strict=True):
                store(f, plan.dtype, column, row, e * size, mask)

        f.loop(0, width, square, step=lanes)

    f.loop(0, plan.vectors, vectors)

"""Which keys a query sees: causal limits and masks, brought to the form [key, query]."""

from __future__ import annotations

import math

from ingot.dtypes import size_of
from ingot.kernels.cpu.attention_plan import LANE_BYTES, Mask, Plan
from ingot.kernels.cpu.build import PhaseFunction
from ingot.kernels.cpu.gemm_copy import transposed
from ingot.kernels.cpu.llvm import Index, Value, element_of, vector
from ingot.kernels.cpu.render import broadcast, load


def visible_keys(f: PhaseFunction, plan: Plan, first: Value) -> Index:
    """Keys that any query of the item whose first one is `first` may see."""
    keys, positions = f.extent(plan.shape.keys), f.extent(plan.shape.positions)
    if not plan.causal:
        return keys
    end = f.index(f.minimum(f.index(f.remainder(first, positions)) + plan.width, positions))
    return f.maximum(f.minimum(end + keys - positions, keys), 0)


def fill_lanes(f: PhaseFunction, plan: Plan, head: Value, first: Value) -> None:
    """For every query of an item the last key it sees if causal, and where its row of the mask begins."""
    shape, mask = plan.shape, plan.mask
    keys, positions, queries = f.extent(shape.keys), f.extent(shape.positions), f.extent(shape.queries)
    batch, group = f.divide(head, shape.groups), f.remainder(head, shape.groups)

    def lane(number: Value) -> None:
        query = f.index(f.minimum(first + number, f.index(queries) - 1))
        own, position = f.divide(query, positions), f.index(f.remainder(query, positions))
        f.store(f.cast("trunc", position + keys - positions, "i32"), f.at(f.scratch, plan.limits_at), number * 4)
        if mask is not None and mask.kind == "full":
            place = _row_offset(f, mask, f.index(batch), f.index(group) * shape.shared + own, position)
            f.store(place, f.at(f.scratch, plan.offsets_at), number * LANE_BYTES)

    f.loop(0, plan.width, lane)


def _row_offset(f: PhaseFunction, mask: Mask, batch: Value, head: Value, position: Index) -> Value:
    """Bytes from the mask's begin to the row of a query."""
    b, h, s = (f.extent(stride) for stride in mask.strides[:3])
    return f.index((batch * b + head * h + f.index(position) * s) * size_of(mask.dtype))


def mask_row(f: PhaseFunction, plan: Plan, head: Value) -> Value | None:
    """Address of the row of a mask that all queries of an item share."""
    if plan.mask is None or plan.mask.kind == "full":
        return None
    batch, group = f.index(f.divide(head, plan.shape.groups)), f.index(f.remainder(head, plan.shape.groups))
    return f.at(f.pointer(plan.mask.handle), _row_offset(f, plan.mask, batch, group, 0))


def mask_block(f: PhaseFunction, plan: Plan, begin: Index, count: Index) -> None:
    """A full mask's columns [begin, begin + count) as rows of scratch: squares are transposed."""
    mask, lanes, line = plan.mask, plan.lanes, plan.line
    if mask is None or mask.kind != "full":
        return
    size, steps = size_of(mask.dtype), mask.strides[3] != 0
    source, target = f.pointer(mask.handle), f.at(f.scratch, plan.mask_at)
    remaining = f.index(f.extent(plan.shape.keys)) - begin

    def vectors(j: Value) -> None:
        place = f.at(f.scratch, j * (lanes * LANE_BYTES))
        offsets = [f.load("i64", place, plan.offsets_at + i * LANE_BYTES) for i in range(lanes)]
        rows = [f.at(source, offset + f.index(begin) * (size if steps else 0)) for offset in offsets]

        def square(t: Value) -> None:
            exists = f.first_lanes(remaining - t, lanes)
            values = [load(f, mask.dtype, row, t * size, lanes, exists) if steps
                      else broadcast(f, mask.dtype, row, 0, lanes) for row in rows]  # fmt: skip
            columns = transposed(f, [_additive(f, plan, value) for value in values])
            place = f.at(target, t * line + j * plan.dot.sum_bytes)
            for i, column in enumerate(columns):
                f.store(column, place, i * line)

        f.loop(0, count, square, step=lanes)

    f.loop(0, plan.vectors, vectors)


def _additive(f: PhaseFunction, plan: Plan, value: Value) -> Value:
    """A mask value in the scores' type: what is added, or for a bool 0 where it allows and -inf where not."""
    if element_of(value.type) == "i1":
        return f.select(value, f.constant(plan.dot.sums, 0.0), -math.inf)
    element = element_of(plan.dot.sums)
    wider = element == "double"
    return f.cast("fpext" if wider else "fptrunc", value, element) if element_of(value.type) != element else value


def masked(f: PhaseFunction, plan: Plan, score: Value, key: Value, begin: Index, j: int, row: Value | None) -> Value:
    """Scores of key `begin + key` for vector j of the queries, with -inf for those that must not see it."""
    mask = plan.mask
    if mask is not None:
        if row is not None:
            step = 0 if mask.strides[3] == 0 else size_of(mask.dtype)
            value = _additive(f, plan, broadcast(f, mask.dtype, row, (f.index(begin) + key) * step, plan.lanes))
        else:
            value = f.load(plan.dot.sums, f.at(f.scratch, plan.mask_at), key * plan.line + j * plan.dot.sum_bytes)
        allowed = f.compare("oeq", value, 0.0) if mask.dtype == "bool" else None
        score = score + value if allowed is None else f.select(allowed, score, -math.inf)
    if plan.causal:
        limits = f.load(vector("i32", plan.lanes), f.at(f.scratch, plan.limits_at), j * plan.lanes * 4)
        now = f.splat(f.cast("trunc", f.index(begin) + key, "i32"), plan.lanes)
        score = f.select(f.compare("sle", now, limits), score, -math.inf)
    return score

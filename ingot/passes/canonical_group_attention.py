"""com.microsoft's GroupQueryAttention: a cache in which every sequence has its own place, rotary embeddings, windows.

B sequences of S new tokens come behind what the cache holds of each; the cache then has room for R tokens a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ingot.ir.graph import dtype_of, shape, simplified
from ingot.ir.shapes import is_data_dependent
from ingot.passes.canonical_attention import Scores, attend, heads, joined_heads, turned_heads
from ingot.passes.canonical_table import MICROSOFT, Builder, Reject, Result, canonical, over, reject
from ingot.plan.extent import Extent

_PAST, _LAST, _TOTAL, _COSINES, _POSITIONS, _BIAS, _SINK = 3, 5, 6, 7, 9, 10, 11


@dataclass(frozen=True)
class Layout:
    """Lengths, and where the new tokens of each sequence start: [B,1,1,1], or None where all start at 0."""

    batch: Extent
    new: Extent
    held: Extent
    room: Extent
    starts: ir.Value | None


@canonical("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(op: Builder) -> Result:
    """Rotated queries and keys, the cache with the new keys in their places, causal Attention over it"""
    problem = _problem(op)
    if problem is not None:
        return problem
    query, key, value = _projections(op)
    layout = _layout(op, shape(query)[0], shape(query)[2])
    if isinstance(layout, Reject):
        return layout
    if op.attribute("do_rotary", 0):
        query, key = (_rotated(op, x, layout) for x in (query, key))
    keys, values = (_extended(op, index, new, layout) for index, new in enumerate((key, value)))
    mask = _mask(op, layout)
    if isinstance(mask, Reject):
        return mask
    scale = op.attribute("scale", 0.0) or int(shape(query)[3]) ** -0.5
    scores = Scores(query, keys, values, mask, mask is None, scale, op.attribute("softcap", 0.0))
    return joined_heads(op, attend(op, scores)), keys, values


def _problem(op: Builder) -> Reject | None:
    if op.given(_SINK) or op.attribute("smooth_softmax", 0) == 1:
        return reject("its softmax has a sink", "leave the sink and smooth_softmax out")
    if any(op.attribute(name, "NONE") not in ("NONE", b"NONE") for name in ("k_quant_type", "v_quant_type")):
        return reject("its cache is quantized", "keep the cache in floats")
    return None


def _projections(op: Builder) -> list[ir.Value]:
    """Query [B,H,S,D], key and value [B,G,S,D]."""
    count, groups = int(op.attribute("num_heads")), int(op.attribute("kv_num_heads"))
    if op.given(1):
        return [heads(op, op.x(0), count), heads(op, op.x(1), groups), heads(op, op.x(2), groups)]
    width = over(shape(op.x())[2], count + 2 * groups)
    assert isinstance(width, int)
    parts = op.split_axis(op.x(), 2, [count * width, groups * width, groups * width])
    return [heads(op, part, number) for part, number in zip(parts, (count, groups, groups), strict=True)]


def _layout(op: Builder, batch: Extent, new: Extent) -> Layout | Reject:
    totals = op.extents(_TOTAL)
    if totals is None or len(totals) != 1 or is_data_dependent(totals[0]):
        return reject("the length of its cache is known only at run time", "compute total_sequence_length from a shape")
    (total,), held = totals, shape(op.x(_PAST))[2] if op.given(_PAST) else 0
    if held == 0 and total == new:
        return Layout(batch, new, held, new, None)
    if held == 0:
        return reject(f"it has {new} tokens and no cache, but a total of {total}", "pass the cache, or the same length")
    room = simplified(f"max({held},{total})")
    length: ir.Value | Extent = new if isinstance(new, int) else op.size(new)
    last = op.view(op.x(_LAST), [batch, 1, 1, 1])
    text = "Cast %0 -> int64; Add $0 1 -> int64; Sub $1 %1 -> int64; Max $2 0 -> int64"
    assert not isinstance(length, str)
    return Layout(batch, new, held, room, op.pointwise(text, last, length))


def _rotated(op: Builder, x: ir.Value, layout: Layout) -> ir.Value:
    """Every token turned by the angle of its place."""
    if op.given(_POSITIONS):
        places = op.x(_POSITIONS)
    else:
        steps = op.steps(layout.new, 1, 2)
        starts = None if layout.starts is None else op.view(layout.starts, [layout.batch, 1])
        places = steps if starts is None else op.pointwise("Add %0 %1 -> int64", steps, starts)
        places = op.expand(places, [layout.batch, layout.new])
    caches = (op.x(_COSINES), op.x(_COSINES + 1))
    return turned_heads(op, x, caches, places, bool(op.attribute("rotary_interleaved", 0)))


def _extended(op: Builder, index: int, new: ir.Value, layout: Layout) -> ir.Value:
    """[B,G,R,D]: what the cache held before a sequence's start, its new tokens, zeros."""
    if layout.starts is None:
        return new
    batch, groups, _, width = shape(new)
    assert isinstance(groups, int) and isinstance(width, int)
    whole = op.concat([op.x(_PAST + index), op.Pad(new, pads=[0, 0, 0, 0, 0, 0, 1, 0], value=0)], 2)
    held, length = (size if isinstance(size, int) else op.size(size) for size in (layout.held, layout.new))
    text = "Less %0 %1 -> bool; Sub %0 %1 -> int64; Min $1 %3 -> int64; Add $2 %2 -> int64; Where $0 %0 $3 -> int64"
    places = op.pointwise(text, op.steps(layout.room, 2, 4), layout.starts, held, length)
    indices = op.expand(places, [batch, groups, layout.room, width])
    result: ir.Value = op.GatherElements(whole, indices, axis=2)
    return result


def _mask(op: Builder, layout: Layout) -> ir.Value | Reject | None:
    """Which keys a query sees, with the added bias; None where that is the plain causal mask."""
    window, bias = int(op.attribute("local_window_size", -1)), op.optional(_BIAS)
    if layout.starts is None and window < 0 and bias is None:
        return None
    if bias is not None and shape(bias)[-1] != layout.room:
        return reject(f"its bias is for {shape(bias)[-1]} keys, the cache has {layout.room}", "make them equally long")
    rows, keys = op.steps(layout.new, 2, 4), op.steps(layout.room, 3, 4)
    place = rows if layout.starts is None else op.pointwise("Add %0 %1 -> int64", rows, layout.starts)
    text = "LessOrEqual %1 %0 -> bool"
    if window >= 0:
        text += f"; Sub %0 %1 -> int64; Less $1 {window} -> bool; And $0 $2 -> bool"
    seen = op.pointwise(text, place, keys)
    return seen if bias is None else op.pointwise(f"Where %0 %1 -inf -> {dtype_of(bias)}", seen, bias)

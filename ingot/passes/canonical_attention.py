"""Attention of ONNX and com.microsoft: heads, caches and masks around one Attention; rotary embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ingot.ir.graph import dtype_of, shape, simplified
from ingot.passes.canonical_linear import matrix_product
from ingot.passes.canonical_table import MICROSOFT, Builder, Reject, Result, canonical, minus, over, reject
from ingot.plan.extent import Extent, product


@dataclass(frozen=True)
class Scores:
    """What Attention takes; `mask` is boolean (True: may attend) or added to the scores."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    causal: bool
    scale: float
    softcap: float = 0.0


def heads(op: Builder, x: ir.Value, count: Extent) -> ir.Value:
    """[B,S,H*D] as [B,H,S,D]."""
    batch, steps, width = shape(x)
    return op.transpose(op.view(x, [batch, steps, count, over(width, count)]), [0, 2, 1, 3])


def joined_heads(op: Builder, x: ir.Value) -> ir.Value:
    """[B,H,S,D] as [B,S,H*D]."""
    batch, count, steps, width = shape(x)
    return op.view(op.transpose(x, [0, 2, 1, 3]), [batch, steps, product((count, width))])


def attend(op: Builder, scores: Scores) -> ir.Value:
    """Attention over heads."""
    inputs = [scores.query, scores.key, scores.value, *([] if scores.mask is None else [scores.mask])]
    result: ir.Value = op.Attention(*inputs, scale=scores.scale, causal=int(scores.causal), softcap=scores.softcap)
    return result


@canonical("Attention")
def onnx_attention(op: Builder) -> Result:
    """Attention-23 to -25: 3-D or 4-D, with a cache before or within, masks, windows, and its scores as an output"""
    flat = len(shape(op.x())) == 3
    counts = [op.attribute("q_num_heads"), *[op.attribute("kv_num_heads")] * 2]
    query, key, value = (heads(op, op.x(i), counts[i]) if flat else op.x(i) for i in range(3))
    past: Extent = 0
    if op.given(4):
        past = shape(op.x(4))[2]
        key, value = op.concat([op.x(4), key], 2), op.concat([op.x(5), value], 2)
    width = shape(query)[3]
    if not isinstance(width, int):
        return reject("the width of its heads is symbolic", "give the heads a static width")
    scale = op.attribute("scale") or width**-0.5
    square = minus(shape(key)[2], shape(query)[2]) == past and not op.given(6)
    native = bool(op.attribute("is_causal", 0)) and square and not op.used(3)
    mask = _onnx_mask(op, query, key, past, explicit_causal=bool(op.attribute("is_causal", 0)) and not native)
    if isinstance(mask, Reject):
        return mask
    scores = Scores(query, key, value, mask, native, scale, op.attribute("softcap", 0.0))
    if op.used(3):
        y, inner = _spelled_out(op, scores, int(op.attribute("qk_matmul_output_mode", 0)))
    else:
        y, inner = attend(op, scores), None
    return joined_heads(op, y) if flat else y, key, value, inner


def _onnx_mask(op: Builder, query: ir.Value, key: ir.Value, past: Extent,
               explicit_causal: bool) -> ir.Value | Reject | None:  # fmt: skip
    """The mask input with everything else that forbids."""
    length = shape(key)[2]
    given = op.optional(3)
    if given is not None:
        padded = _padded_mask(op, given, length)
        if isinstance(padded, Reject):
            return padded
        given = padded
    allowed = _allowed(op, query, length, past, explicit_causal)
    return given if allowed is None else allowed if given is None else _both(op, given, allowed)


def _padded_mask(op: Builder, mask: ir.Value, length: Extent) -> ir.Value | Reject:
    """A mask as 4-D, forbidding the keys it does not reach."""
    sizes = shape(mask)
    missing = minus(length, sizes[-1])
    if not isinstance(missing, int):
        return reject(f"its mask has {sizes[-1]} keys, the cache {length}", "make the mask as long as the cache")
    if missing:
        value = 0 if dtype_of(mask) == "bool" else -np.inf
        mask = op.Pad(mask, pads=[*([0] * (2 * len(sizes) - 1)), missing], value=value)
    return op.view(mask, [*([1] * (4 - len(sizes))), *shape(mask)])


def _both(op: Builder, mask: ir.Value, allowed: ir.Value) -> ir.Value:
    t = dtype_of(mask)
    text = "And %0 %1 -> bool" if t == "bool" else f"Where %1 %0 -inf -> {t}"
    return op.pointwise(text, mask, allowed)


def _allowed(op: Builder, query: ir.Value, length: Extent, past: Extent, causal: bool) -> ir.Value | None:
    """Where key j may be seen by query i: j <= i + offset, windows around i + offset, j < the cache's valid length."""
    left, right = int(op.attribute("left_window_size", -1)), int(op.attribute("right_window_size", -1))
    conditions = []
    if causal:
        conditions.append("LessOrEqual %1 $0 -> bool")
    if left >= 0:
        conditions.append(f"Sub $0 {left} -> int64; GreaterOrEqual %1 $last -> bool")
    if right >= 0:
        conditions.append(f"Add $0 {right} -> int64; LessOrEqual %1 $last -> bool")
    if op.given(6):
        conditions.append("Less %1 %3 -> bool")
    if not conditions:
        return None
    rows, keys = op.steps(shape(query)[2], 0, 2), op.steps(length, 1, 2)
    valid = op.view(op.x(6), [shape(op.x(6))[0], 1, 1, 1]) if op.given(6) else None
    offset = _offset(op, valid, shape(query)[2], past)
    operands = [rows, keys, offset, *([] if valid is None else [valid])]
    return op.view(op.pointwise(_conjunction(conditions), *operands), _four(op, valid, shape(query)[2], length))


def _four(op: Builder, valid: ir.Value | None, queries: Extent, length: Extent) -> list[Extent]:
    return [1 if valid is None else shape(valid)[0], 1, queries, length]


def _offset(op: Builder, valid: ir.Value | None, queries: Extent, past: Extent) -> ir.Value | int:
    """How many keys come before the first query."""
    if valid is not None:
        length = queries if isinstance(queries, int) else op.size(queries)
        return op.pointwise("Sub %0 %1 -> int64", valid, length)
    return past if isinstance(past, int) else op.size(past)


def _conjunction(conditions: Sequence[str]) -> str:
    """`Add %0 %2` (the query's place), then the conditions, then their And."""
    parts, results = ["Add %0 %2 -> int64"], []
    for condition in conditions:
        for piece in condition.split("; "):
            parts.append(piece.replace("$last", f"${len(parts) - 1}"))
        results.append(len(parts) - 1)
    for other in results[1:]:
        parts.append(f"And ${results[0]} ${other} -> bool")
        results[0] = len(parts) - 1
    if results[0] != len(parts) - 1:
        raise AssertionError("the last instruction is the conjunction")
    return "; ".join(parts)


def _spelled_out(op: Builder, scores: Scores, mode: int) -> tuple[ir.Value, ir.Value]:
    """The result, and what `mode` asks for: 0 the products, 1 after the cap, 2 after the mask, 3 after the softmax."""
    t = dtype_of(scores.query)
    repeats = over(shape(scores.query)[1], shape(scores.key)[1])
    key, value = (_repeated(op, x, repeats) for x in (scores.key, scores.value))
    stages = [op.pointwise(f"Mul %0 {scores.scale} -> {t}", op.MatMul(scores.query, key, transpose_b=1))]
    cap = scores.softcap
    capped = f"Div %0 {cap} -> {t}; Tanh $0 -> {t}; Mul $1 {cap} -> {t}"
    stages.append(op.pointwise(capped, stages[0]) if cap else stages[0])
    if scores.mask is not None:
        boolean = dtype_of(scores.mask) == "bool"
        text = f"Where %1 %0 -inf -> {t}" if boolean else f"Add %0 %1 -> {t}"
        stages.append(op.pointwise(text, stages[1], scores.mask))
    else:
        stages.append(stages[1])
    peak = op.Reduce(stages[2], kind="max", axes=[3])
    softmax = op.Softmax(stages[2], axis=3)
    stages.append(op.pointwise(f"Equal %1 -inf -> bool; Where $0 0.0 %0 -> {t}", softmax, peak))
    return op.MatMul(stages[3], value), stages[mode]


def _repeated(op: Builder, x: ir.Value, repeats: Extent) -> ir.Value:
    """Every key head once for each of its query heads."""
    if repeats == 1:
        return x
    batch, count, steps, width = shape(x)
    spread = op.expand(op.view(x, [batch, count, 1, steps, width]), [batch, count, repeats, steps, width])
    return op.view(spread, [batch, product((count, repeats)), steps, width])


# com.microsoft


@canonical("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(op: Builder) -> Result:
    """Attention over 3-D query, key and value with a bias, a padding mask, an added bias and a cache"""
    count, query = int(op.attribute("num_heads")), op.x()
    if len(shape(query)) != 3 or not op.given(1) or not op.given(2):
        return reject("its query, key and value are packed", "pass query, key and value apart, 3-D")
    widths = [shape(op.x(0))[2], shape(op.x(0))[2], shape(op.x(2))[-1]]
    parts = [op.x(0), op.x(1), op.x(2)]
    if op.given(3):
        biases = op.split_axis(op.x(3), 0, widths)
        parts = [op.pointwise(f"Add %0 %1 -> {op.dtype}", part, bias) if len(shape(part)) == 3 else part
                 for part, bias in zip(parts, biases, strict=True)]  # fmt: skip
    split = [heads(op, part, count) if len(shape(part)) == 3 else part for part in parts]
    if op.given(6):
        split[1:] = [op.concat([op.x(6 + i), part], 2) for i, part in enumerate(split[1:])]
    mask = _microsoft_mask(op, op.optional(4), op.optional(5), shape(split[1])[2])
    return mask if isinstance(mask, Reject) else _finished(op, split, mask, op.attribute("unidirectional", 0))


def _finished(op: Builder, parts: Sequence[ir.Value], mask: ir.Value | None, causal: int) -> Result:
    query, key, value = parts
    width = shape(query)[3]
    if not isinstance(width, int):
        return reject("the width of its heads is symbolic", "give the heads a static width")
    scale = op.attribute("scale", 0.0) or width**-0.5
    y = joined_heads(op, attend(op, Scores(query, key, value, mask, bool(causal), scale)))
    return y, key, value


def _microsoft_mask(op: Builder, padding: ir.Value | None, bias: ir.Value | None,
                    length: Extent) -> ir.Value | Reject | None:  # fmt: skip
    """Padding ([B] lengths or [B,T] of 0 and 1) as an added mask, with the added bias."""
    if padding is None:
        return bias
    t = op.dtype
    filler = float(op.attribute("mask_filter_value", -10000.0))
    batch, *rest = shape(padding)
    if not rest:
        column = op.view(padding, [batch, 1, 1, 1])
        text = f"Cast %1 -> int64; Less %0 $0 -> bool; Where $1 0.0 {filler} -> {t}"
        mask = op.pointwise(text, op.steps(length, 3, 4), column)
    elif len(rest) == 1 and rest[0] == length:
        row = op.view(padding, [batch, 1, 1, length])
        mask = op.pointwise(f"Equal %0 0 -> bool; Where $0 {filler} 0.0 -> {t}", row)
    else:
        return reject(f"its padding mask has the shape {shape(padding)}", "pass [B] lengths or a [B,T] mask")
    return mask if bias is None else op.pointwise(f"Add %0 %1 -> {t}", mask, bias)


@canonical("Attention", domain=MICROSOFT)
def packed_attention(op: Builder) -> Result:
    """One product for query, key and value, then Attention"""
    count, t = int(op.attribute("num_heads")), op.dtype
    projected = matrix_product(op, op.x(), op.x(1))
    if op.given(2):
        projected = op.pointwise(f"Add %0 %1 -> {t}", projected, op.x(2))
    width = shape(projected)[2]
    sizes = op.attribute("qkv_hidden_sizes") or [over(width, 3)] * 3
    parts = [heads(op, part, count) for part in op.split_axis(projected, 2, sizes)]
    if op.attribute("do_rotary", 0) or op.given(4):
        return reject("it rotates, or keeps a cache of both keys and values in one tensor", "use MultiHeadAttention")
    mask = _microsoft_mask(op, op.optional(3), op.optional(5), shape(parts[1])[2])
    if isinstance(mask, Reject):
        return mask
    result = _finished(op, parts, mask, op.attribute("unidirectional", 0))
    return result[:1] if isinstance(result, tuple) else result


# rotary embeddings


@canonical("RotaryEmbedding")
def rotary(op: Builder) -> Result:
    """Pairs of x turned by the cached angles"""
    return _rotary(op, op.x(1), op.x(2), op.optional(3))


@canonical("RotaryEmbedding", domain=MICROSOFT)
def microsoft_rotary(op: Builder) -> Result:
    """Positions come before the caches; one position is where the sequence starts"""
    places = op.x(1)
    if op.attribute("is_packed_batching", 0) or op.attribute("scale", 1.0) != 1.0:
        return reject("its batches are packed or its angles scaled", "unpack them")
    if len(shape(places)) == 1:
        steps = shape(op.x())[1 if len(shape(op.x())) == 3 else 2]
        start = op.pointwise("Add %0 %1 -> int64", op.steps(steps, 1, 2), op.view(places, [1, 1]))
        places = op.expand(start, [shape(op.x())[0], steps])
    return _rotary(op, op.x(2), op.x(3), places)


def _rotary(op: Builder, cosine: ir.Value, sine: ir.Value, places: ir.Value | None) -> Result:
    x = op.x()
    flat = len(shape(x)) == 3
    count = op.attribute("num_heads", 0)
    if flat:
        if not count:
            return reject("its number of heads is not given", "set num_heads")
        batch, steps, width = shape(x)
        x = op.view(x, [batch, steps, count, over(width, count)])
    size = shape(x)[3]
    turned = int(op.attribute("rotary_embedding_dim", 0)) or size
    if not isinstance(size, int) or not isinstance(turned, int):
        return reject("the width of its heads is symbolic", "give the heads a static width")
    angles = [_angles(op, cache, places, x, flat) for cache in (cosine, sine)]
    y = _partly_turned(op, x, angles, turned, bool(op.attribute("interleaved", 0)))
    return op.view(y, shape(op.x()))


def turned_heads(op: Builder, x: ir.Value, caches: Sequence[ir.Value], places: ir.Value, interleaved: bool) -> ir.Value:
    """x[B,H,S,D] turned by the angles at its places [B,S]; what is wider than the angles stays."""
    angles = [_angles(op, cache, places, x, flat=False) for cache in caches]
    return _partly_turned(op, x, angles, 2 * int(shape(caches[0])[1]), interleaved)


def _partly_turned(op: Builder, x: ir.Value, angles: Sequence[ir.Value], turned: int, interleaved: bool) -> ir.Value:
    size = int(shape(x)[-1])
    y = _turned(op, _last(op, x, 0, turned), angles, dtype_of(x), interleaved)
    return op.concat([y, _last(op, x, turned, size - turned)], 3) if turned < size else y


def _angles(op: Builder, cache: ir.Value, places: ir.Value | None, x: ir.Value, flat: bool) -> ir.Value:
    """cos or sin as [B,S,1,R/2] or, for x[B,H,S,D], [B,1,S,R/2]."""
    values = cache if places is None else op.Gather(cache, places, axis=0)
    batch, steps, half = shape(values)
    return op.view(values, [batch, steps, 1, half] if flat else [batch, 1, steps, half])


def _last(op: Builder, x: ir.Value, start: int, size: int) -> ir.Value:
    """Part of the last axis."""
    sizes = shape(x)
    if start == 0 and sizes[-1] == size:
        return x
    rank = len(sizes)
    result: ir.Value = op.Slice(x, starts=[*([0] * (rank - 1)), start], steps=[1] * rank, sizes=[*sizes[:-1], size])
    return result


def _turned(op: Builder, x: ir.Value, angles: Sequence[ir.Value], t: str, interleaved: bool) -> ir.Value:
    """(a, b) to (a cos - b sin, a sin + b cos); pairs lie side by side, or half the width apart."""
    sizes = shape(x)
    half = int(sizes[-1]) // 2
    if interleaved:
        x = op.view(x, [*sizes[:-1], half, 2])
        angles = [op.view(angle, [*shape(angle), 1]) for angle in angles]
    width = 1 if interleaved else half
    a, b = _last(op, x, 0, width), _last(op, x, width, width)
    real = op.pointwise(f"Mul %0 %2 -> {t}; Mul %1 %3 -> {t}; Sub $0 $1 -> {t}", a, b, *angles)
    imaginary = op.pointwise(f"Mul %0 %3 -> {t}; Mul %1 %2 -> {t}; Add $0 $1 -> {t}", a, b, *angles)
    return op.view(op.concat([real, imaginary], len(shape(x)) - 1), [simplified(size) for size in sizes])


# activations of com.microsoft


@canonical("BiasGelu", "FastGelu", "QuickGelu", "Gelu", domain=MICROSOFT)
def gelu(op: Builder) -> Result:
    """Gelu of x, of x + bias, by tanh, or x * Sigmoid(alpha * x)"""
    kind, t = op.node.op_type, op.dtype
    if kind == "QuickGelu":
        alpha = float(str(np.float32(op.attribute("alpha", 1.702))))
        return op.pointwise(f"Mul %0 {alpha} -> {t}; Sigmoid $0 -> {t}; Mul %0 $1 -> {t}", op.x())
    name = "GeluTanh" if kind == "FastGelu" else "Gelu"
    if op.given(1):
        return op.pointwise(f"Add %0 %1 -> {t}; {name} $0 -> {t}", op.x(), op.x(1))
    return op.pointwise(f"{name} %0 -> {t}", op.x())

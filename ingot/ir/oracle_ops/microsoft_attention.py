"""com.microsoft attention in its three forms, and rotary embeddings.

Shape suffixes: B batch, S new tokens, T all tokens, N heads, H head size.

Reference: onnxruntime/docs/ContribOperators.md.
"""

from __future__ import annotations

import numpy as np

from ingot.ir.oracle_ops.table import MICROSOFT, meaning

Array = np.ndarray


def _heads(x_BSD: Array, heads: int) -> Array:
    batch, length, width = x_BSD.shape
    return x_BSD.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def _merged(x_BNSH: Array) -> Array:
    batch, heads, length, size = x_BNSH.shape
    return x_BNSH.transpose(0, 2, 1, 3).reshape(batch, length, heads * size)


def attend(query_BNSH: Array, key_BNTH: Array, value_BNTH: Array, bias: Array | float, scale: float | None,
           softcap: float = 0.0, sink_N: Array | None = None) -> Array:  # fmt: skip
    """softmax(q kᵀ scale + bias) v in float32"""
    query, key, value = (x.astype(np.float32) for x in (query_BNSH, key_BNTH, value_BNTH))
    scores = query @ key.swapaxes(-1, -2) * (scale or 1 / np.sqrt(query.shape[-1]))
    if softcap:
        scores = np.tanh(scores / softcap) * softcap
    scores = scores + bias
    top = scores.max(axis=-1, keepdims=True)
    sink = None if sink_N is None else sink_N.astype(np.float32).reshape(1, -1, 1, 1)
    top = top if sink is None else np.maximum(top, sink)
    powers = np.exp(scores - top)
    total = powers.sum(axis=-1, keepdims=True) + (0 if sink is None else np.exp(sink - top))
    return np.asarray(powers / total @ value)


def _causal(queries: int, total: int) -> Array:
    """-inf where a query would look at a later token; the last query sees everything."""
    return np.where(np.arange(total) > np.arange(total - queries, total)[:, None], -np.inf, 0).astype(np.float32)


def _mask_bias(mask: Array | None, batch: int, queries: int, total: int, filtered: float) -> Array | float:
    """What ONNX Runtime adds to the scores: 0 or `filtered`, from lengths [B], ends and starts [2B] or 0/1 masks."""
    if mask is None:
        return 0.0
    if mask.ndim == 1:
        places = np.arange(total)
        ends = mask[:batch, None]
        starts = mask[batch : 2 * batch, None] if mask.size == 2 * batch else 0
        kept = (places < ends) & (places >= starts)
    else:
        kept = mask > 0
    if kept.ndim == 4:  # [B,1,M,M] holds the mask of the longest sequence
        kept = kept[:, :, total - queries : total, :total]
    elif kept.ndim == 3:
        kept = kept[:, None]
    else:
        kept = kept[:, None, None]
    return np.where(kept, 0, filtered).astype(np.float32)


@meaning("Attention", domain=MICROSOFT)
def attention(x: Array, weight: Array, bias: Array | None = None, mask: Array | None = None, past: Array | None = None,
              attention_bias: Array | None = None, past_length: Array | None = None, *, num_heads: int,
              unidirectional: int = 0, qkv_hidden_sizes: list[int] | None = None, scale: float = 0.0,
              mask_filter_value: float = -10000.0, do_rotary: int = 0, rotary_embedding_dim: int = 0,
              past_present_share_buffer: int = 0) -> tuple[Array, Array]:  # fmt: skip
    """Self-attention with its input projection; present is [2,B,N,T,H]."""
    if do_rotary or past_present_share_buffer:
        raise NotImplementedError("com.microsoft::Attention with rotary embeddings or a shared cache buffer")
    projected = x.astype(np.float32) @ weight.astype(np.float32) + (0 if bias is None else bias)
    widths = qkv_hidden_sizes or [weight.shape[1] // 3] * 3
    parts = np.split(projected, np.cumsum(widths)[:2], axis=-1)
    query, key, value = (_heads(part, num_heads) for part in parts)
    if past is not None:
        key, value = np.concatenate([past[0], key], 2), np.concatenate([past[1], value], 2)
    total = key.shape[2]
    added = _mask_bias(mask, x.shape[0], x.shape[1], total, mask_filter_value)
    added = added + (0 if attention_bias is None else attention_bias)
    added = added + (_causal(x.shape[1], total) if unidirectional else 0)
    y = attend(query, key, value, added, scale)
    return _merged(y).astype(x.dtype), np.stack([key, value]).astype(x.dtype)


@meaning("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(query: Array, key: Array | None = None, value: Array | None = None,
                         bias: Array | None = None, mask: Array | None = None, attention_bias: Array | None = None,
                         past_key: Array | None = None, past_value: Array | None = None,
                         past_length: Array | None = None, indirection: Array | None = None, *, num_heads: int,
                         mask_filter_value: float = -10000.0, scale: float = 0.0,
                         unidirectional: int = 0) -> tuple[Array, Array, Array]:  # fmt: skip
    """Attention over projected inputs, packed or not; present key and value are [B,N,T,H]."""
    if past_length is not None or indirection is not None:
        raise NotImplementedError("com.microsoft::MultiHeadAttention with a shared cache buffer or beams")
    q, k, v = _unpacked(query, key, value, bias, num_heads)
    if past_key is not None and past_value is not None:
        k, v = np.concatenate([past_key, k], 2), np.concatenate([past_value, v], 2)
    queries, total = q.shape[2], k.shape[2]
    added = _mask_bias(mask, q.shape[0], queries, total, mask_filter_value)
    added = added + (0 if attention_bias is None else attention_bias)
    added = added + (_causal(queries, total) if unidirectional else 0)
    return _merged(attend(q, k, v, added, scale)).astype(query.dtype), k, v


def _unpacked(query: Array, key: Array | None, value: Array | None, bias: Array | None,
              heads: int) -> tuple[Array, Array, Array]:  # fmt: skip
    """Query, key and value as [B,N,·,H] from [B,S,D], [B,L,N,2,H] or [B,S,N,3,H]; keys may come as [B,N,L,H]."""
    if query.ndim == 5:
        parts = [query[:, :, :, i].transpose(0, 2, 1, 3) for i in range(3)]
    elif key is not None and key.ndim == 5:
        parts = [_heads(query, heads), *(key[:, :, :, i].transpose(0, 2, 1, 3) for i in range(2))]
    else:
        assert key is not None and value is not None
        parts = [x if x.ndim == 4 else _heads(x, heads) for x in (query, key, value)]
    if bias is not None:
        offsets = np.cumsum([parts[0].shape[-1] * heads, parts[1].shape[-1] * heads])
        shifts = [b.reshape(1, heads, 1, -1) for b in np.split(bias, offsets)]
        whole = [True, key is None or key.ndim != 4, value is None or value.ndim != 4]
        parts = [x + b if add else x for x, b, add in zip(parts, shifts, whole, strict=True)]
    return parts[0], parts[1], parts[2]


@meaning("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(query: Array, key: Array | None, value: Array | None, past_key: Array | None,
                          past_value: Array | None, last_position: Array, total_length: Array,
                          cosines: Array | None = None, sines: Array | None = None, position_ids: Array | None = None,
                          attention_bias: Array | None = None, sink: Array | None = None, *, num_heads: int,
                          kv_num_heads: int, scale: float = 0.0, softcap: float = 0.0, local_window_size: int = -1,
                          do_rotary: int = 0, rotary_interleaved: int = 0, smooth_softmax: int = 0,
                          **_quantised: object) -> tuple[Array, Array, Array]:  # fmt: skip
    """Causal attention with a cache: `last_position` [B] is each sequence's length - 1, new tokens included."""
    q, k, v = _grouped(query, key, value, num_heads, kv_num_heads)
    batch, _, length, size = q.shape
    ends = last_position.reshape(-1).astype(np.int64) + 1
    prompt = length == int(total_length.item())
    starts = np.zeros_like(ends) if prompt and past_key is None else np.maximum(ends - length, 0)
    if do_rotary and cosines is not None and sines is not None:
        places = starts[:, None] + np.arange(length) if position_ids is None else position_ids
        q, k = (_rotated(x, cosines[places], sines[places], bool(rotary_interleaved)) for x in (q, k))
    held = 0 if past_key is None else past_key.shape[2]
    present_key, present_value = (
        _extended(past, new, starts, max(held, int(total_length.item())))
        for past, new in ((past_key, k), (past_value, v))
    )
    outputs = np.zeros((batch, num_heads, length, size), np.float32)
    sinks = np.zeros(num_heads, np.float32) if sink is None and smooth_softmax == 1 else sink
    for b in range(batch):
        total = int(starts[b]) + length
        keys, values = (np.repeat(p[b : b + 1, :, :total], num_heads // kv_num_heads, 1)
                        for p in (present_key, present_value))  # fmt: skip
        added = _causal(length, total) + _window(length, total, local_window_size)
        if attention_bias is not None:
            added = added + attention_bias[min(b, attention_bias.shape[0] - 1)][:, :, :total]
        outputs[b] = attend(q[b : b + 1], keys, values, added, scale, softcap, sinks)[0]
    return _merged(outputs).astype(query.dtype), present_key, present_value


def _grouped(query: Array, key: Array | None, value: Array | None, heads: int,
             kv_heads: int) -> tuple[Array, Array, Array]:  # fmt: skip
    if key is not None and value is not None:
        return _heads(query, heads), _heads(key, kv_heads), _heads(value, kv_heads)
    packed = _heads(query, heads + 2 * kv_heads)
    return packed[:, :heads], packed[:, heads : heads + kv_heads], packed[:, heads + kv_heads :]


def _extended(past: Array | None, new: Array, starts: Array, room: int) -> Array:
    """The cache of `room` tokens a sequence with the new ones written behind its start."""
    cache = np.zeros((*new.shape[:2], room, new.shape[3]), new.dtype)
    for b, start in enumerate(starts):
        if past is not None:
            cache[b, :, :start] = past[b, :, :start]
        cache[b, :, start : start + new.shape[2]] = new[b]
    return cache


def _window(queries: int, total: int, size: int) -> Array | float:
    """-inf for tokens more than `size` before the query."""
    if size < 0:
        return 0.0
    distance = np.arange(total - queries, total)[:, None] - np.arange(total)
    return np.where(distance >= size, -np.inf, 0).astype(np.float32)


def _rotated(x_BNSH: Array, cosines_BSR: Array, sines_BSR: Array, interleaved: bool) -> Array:
    """Pairs of the first 2R elements of every head turned by their angle; the rest stays."""
    half = cosines_BSR.shape[-1]
    x = x_BNSH.astype(np.float32)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    cosines, sines = cosines_BSR[:, None].astype(np.float32), sines_BSR[:, None].astype(np.float32)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else np.split(turned, 2, axis=-1)
    real, imaginary = first * cosines - second * sines, first * sines + second * cosines
    pairs = np.stack([real, imaginary], -1).reshape(turned.shape)
    both = pairs if interleaved else np.concatenate([real, imaginary], -1)
    return np.concatenate([both, rest], -1).astype(x_BNSH.dtype)


@meaning("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding(x: Array, position_ids: Array, cosines: Array, sines: Array, *, interleaved: int = 0,
                     num_heads: int = 0, rotary_embedding_dim: int = 0, scale: float = 1.0,
                     is_packed_batching: int = 0) -> Array:  # fmt: skip
    """x [B,S,D] or [B,N,S,H]; position_ids [B,S] or an offset [1]."""
    heads = num_heads if rotary_embedding_dim else x.shape[-1] // (2 * cosines.shape[-1])
    wide = x if x.ndim == 4 else _heads(x, heads)
    length = wide.shape[2]
    places = position_ids + np.arange(length)[None] if position_ids.size == 1 else position_ids
    places = np.broadcast_to(places.reshape(-1, length), (x.shape[0], length))
    y = _rotated(wide, cosines[places], sines[places], bool(interleaved))
    return y if x.ndim == 4 else _merged(y)

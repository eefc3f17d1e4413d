"""Attention: softmax(query key^T) value per head; PackedAttention, whose operands are one tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.errors import GraphError
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_table import EPILOGUE, Attribute, TensorType, narrowed, op


def _attention_type(query: TensorType, key: TensorType, value: TensorType, mask: TensorType | None,
                    **_: Any) -> TensorType:  # fmt: skip
    heads, groups = query.shape[1], key.shape[1]
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise GraphError(f"Attention: {heads} query heads are no multiple of {groups} key heads")
    return TensorType(query.dtype, (*query.shape[:3], value.shape[3]))


@op("Attention", "query key value mask?", _attention_type, scale=Attribute("float"), causal=Attribute("int", 0),
    softcap=Attribute("float", 0.0))  # fmt: skip
def attention(query_BHSD: Array, key_BGTD: Array, value_BGTE: Array, mask: Array | None, *, scale: float, causal: int,
              softcap: float) -> Array:  # fmt: skip
    """softmax(cap(scale * query key^T) + mask) value, with cap(x) = softcap * tanh(x / softcap) unless softcap is 0

    H is a multiple of G: consecutive query heads share a key head. mask broadcasts to [B,H,S,T]; it is added, or where
    bool, False forbids. causal: query s sees the keys t <= s + T - S. A query that sees no key gives 0.
    """
    batch, heads, queries, depth = query_BHSD.shape
    groups, keys = key_BGTD.shape[1:3]
    query = wide(query_BHSD).reshape(batch, groups, heads // groups, queries, depth)
    scores = np.matmul(query, np.swapaxes(wide(key_BGTD), -1, -2)[:, :, None]) * query.dtype.type(scale)
    scores = scores.reshape(batch, heads, queries, keys)
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    scores = _masked(scores, mask)
    if causal:
        scores = np.where(np.tri(queries, keys, keys - queries, dtype=bool), scores, -np.inf)
    weights = _softmax(scores).reshape(batch, groups, heads // groups, queries, keys)
    result = np.matmul(weights.astype(query.dtype), wide(value_BGTE)[:, :, None])
    return narrowed(result.reshape(batch, heads, queries, value_BGTE.shape[3]), query_BHSD.dtype.name)


def _packed_type(packed: TensorType, mask: TensorType | None, *, heads: int, groups: int, **_: Any) -> TensorType:
    batch, length, width = packed.shape
    if not isinstance(width, int) or width % (heads + 2 * groups) or heads % groups:
        raise GraphError(f"PackedAttention: {width} columns are not of {heads} queries, {groups} keys and values")
    return TensorType(packed.dtype, (batch, heads, length, width // (heads + 2 * groups)))


@op("PackedAttention", "packed mask?", _packed_type, heads=Attribute("int"), groups=Attribute("int"),
    scale=Attribute("float"), causal=Attribute("int", 0), softcap=Attribute("float", 0.0), epilogue=EPILOGUE)
def packed_attention(packed_BSN: Array, mask: Array | None, *, heads: int, groups: int, **settings: Any) -> Array:
    """Attention of one product's columns: all heads of the query, then the key's, then the value's; with an epilogue"""
    batch, length, _ = packed_BSN.shape
    split = packed_BSN.reshape(batch, length, heads + 2 * groups, -1).swapaxes(1, 2)
    return attention(*np.split(split, (heads, heads + groups), axis=1), mask, **settings)


def _masked(scores: Array, mask: Array | None) -> Array:
    if mask is None:
        return scores
    return np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + wide(mask)


def _softmax(scores: Array) -> Array:
    peak = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    powers = np.exp(scores - np.where(np.isneginf(peak), 0, peak))
    sums = powers.sum(axis=-1, keepdims=True)
    return np.asarray(powers / np.where(sums == 0, 1, sums))

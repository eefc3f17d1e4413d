"""CacheUpdate, PagedAttention, and both in one: keys and values of many sequences in blocks of a pool that outlives the
run.

The pool of a layer is cache[blocks, 2, G, block_size * D]: keys of a block and group are [D, block_size], so that
block_size keys are multiplied at once, values are [block_size, D]. A slot is block * block_size + offset. A token whose
position is negative is padding: it is written nowhere, sees nothing and gives 0. Native code updates the pool where it
is (`STATEFUL`): a plan keeps the output in the input's memory. positions, slots, owners and tables are a step's inputs,
which nothing in the step writes.

A pool of int8 has a scale for each token and head: block_size of them, float32, lie behind the [D, block_size] keys,
and behind the values, so that a line has block_size * (D + 4) bytes.
"""

from __future__ import annotations

import numpy as np

from ingot.errors import GraphError
from ingot.ir.elementwise import Array, cast, wide
from ingot.ir.ops_table import Attribute, TensorType, narrowed, op

STATEFUL = frozenset({"CacheUpdate", "CachedAttention"})
SCALE_BYTES, LARGEST, LEAST = 4, 127, 1e-30  # of a pool of int8: LEAST keeps scales of zeros from being none


def line_of(block: int, depth: int, dtype: str) -> int:
    """Elements of a block's keys, or values, of a group."""
    return block * (depth + (SCALE_BYTES if dtype == "int8" else 0))


def block_of(line: int, depth: int, dtype: str) -> int:
    """Tokens of a block whose line has so many elements."""
    return line // line_of(1, depth, dtype)


def _scales(pool: Array, size: int, depth: int) -> Array:
    """A view of the scales [blocks, 2, G, size] of a pool of int8."""
    return pool[..., size * depth :].view(np.float32)


def _parts(cache: Array, depth: int) -> tuple[Array, Array]:
    """Keys and values [blocks, G, block_size, D], wide."""
    groups, size = cache.shape[2], block_of(cache.shape[3], depth, cache.dtype.name)
    kept = wide(cache[..., : size * depth].astype(np.float32))
    keys = kept[:, 0].reshape(-1, groups, depth, size).swapaxes(2, 3)
    values = kept[:, 1].reshape(-1, groups, size, depth)
    if cache.dtype != np.int8:
        return keys, values
    scales = wide(_scales(cache, size, depth))[..., None]
    return keys * scales[:, 0], values * scales[:, 1]


def _update_type(cache: TensorType, projected: TensorType, *_: TensorType | None, heads: int, groups: int,
                 epsilon: float, early: int = 0) -> tuple[TensorType, TensorType]:  # fmt: skip
    depth, width = depth_of(cache, projected.shape[-1], heads, groups), projected.shape[-1]
    if depth * (heads + 2 * groups) != width or heads % groups:
        raise GraphError(f"CacheUpdate: {width} columns are not {heads} + 2 x {groups} heads of {depth}")
    return cache, TensorType(projected.dtype, (projected.shape[0], heads, depth))


def depth_of(cache: TensorType, width: int | str, heads: int, groups: int) -> int:
    """Elements of a head, of columns that hold queries, keys and values."""
    if not isinstance(width, int) or cache.shape[1:3] != (2, groups):
        raise GraphError(f"CacheUpdate: a pool {cache.shape} does not hold keys and values of {groups} groups")
    return width // (heads + 2 * groups)


@op("CacheUpdate", "cache projected positions slots cosine? sine? query_scale? key_scale?", _update_type,
    heads=Attribute("int"), groups=Attribute("int"), epsilon=Attribute("float", 1e-6),
    early=Attribute("int", 0))  # fmt: skip
def cache_update(cache: Array, projected_TN: Array, positions_T: Array, slots_T: Array, cosine_PR: Array | None,
                 sine_PR: Array | None, query_scale: Array | None, key_scale: Array | None, *, heads: int, groups: int,
                 epsilon: float, early: int = 0) -> tuple[Array, Array]:  # fmt: skip
    """(the pool with the tokens' keys and values at their slots, the queries [T, H, D])

    projected: queries of H heads, keys and values of G. Queries and keys are normalised (rms, times a scale [D]) where
    scales are given, then the first 2R elements of each head are rotated by the angles of the token's position. early:
    a hint for launches, which say when the one behind may begin.
    """
    tokens, width = projected_TN.shape
    depth = width // (heads + 2 * groups)
    all_THD = wide(projected_TN).reshape(tokens, heads + 2 * groups, depth)
    query, key, value = np.split(all_THD, [heads, heads + groups], axis=1)
    query, key = _normalised(query, query_scale, epsilon), _normalised(key, key_scale, epsilon)
    query, key = (_rotated(x, positions_T, cosine_PR, sine_PR) for x in (query, key))
    pool = cache.copy()
    size = block_of(cache.shape[3], depth, cache.dtype.name)
    kept = (positions_T >= 0) & (slots_T >= 0)
    block, offset = np.divmod(slots_T[kept], size)
    for part, x in enumerate((key[kept], value[kept])):
        numbers, line = cast(x, cache.dtype.name) if cache.dtype != np.int8 else x, pool[:, part, :, : size * depth]
        if cache.dtype == np.int8:
            scale = np.maximum(np.abs(x).max(-1), LEAST) / LARGEST
            numbers = np.rint(x / scale[..., None]).astype(np.int8)
            _scales(pool, size, depth)[block, part, :, offset] = scale
        placed = line.reshape(-1, groups, *((depth, size) if part == 0 else (size, depth)))
        if part == 0:
            placed[block, :, :, offset] = numbers
        else:
            placed[block, :, offset] = numbers
        pool[:, part, :, : size * depth] = placed.reshape(line.shape)
    return pool, narrowed(query, projected_TN.dtype.name)


def _normalised(x_THD: Array, scale: Array | None, epsilon: float) -> Array:
    if scale is None:
        return x_THD
    square = np.mean(x_THD * x_THD, axis=-1, keepdims=True)
    return np.asarray(x_THD / np.sqrt(square + x_THD.dtype.type(epsilon)) * wide(scale))


def _rotated(x_THD: Array, positions_T: Array, cosine_PR: Array | None, sine_PR: Array | None) -> Array:
    """The halves (a, b) of the rotated elements become (a cos - b sin, b cos + a sin)."""
    if cosine_PR is None or sine_PR is None:
        return x_THD
    place = np.clip(positions_T, 0, len(cosine_PR) - 1)
    cosine, sine = (wide(table)[place][:, None] for table in (cosine_PR, sine_PR))
    half = cosine.shape[-1]
    a, b, rest = x_THD[..., :half], x_THD[..., half : 2 * half], x_THD[..., 2 * half :]
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine, rest], axis=-1)


def _paged_type(query: TensorType, cache: TensorType, *_: TensorType, scale: float, window: int,
                softcap: float, early: int = 0) -> TensorType:  # fmt: skip
    heads, depth, groups, line = query.shape[1], query.shape[2], cache.shape[2], cache.shape[3]
    if not all(isinstance(size, int) for size in (heads, depth, groups, line)):
        raise GraphError("PagedAttention: heads, groups, their size and that of blocks are fixed numbers")
    if int(heads) % int(groups) or int(line) % line_of(1, int(depth), cache.dtype):
        raise GraphError(f"PagedAttention: a pool {cache.shape} does not fit queries {query.shape}")
    return query


@op("PagedAttention", "query cache positions owners tables", _paged_type, scale=Attribute("float"),
    window=Attribute("int", 0), softcap=Attribute("float", 0.0), early=Attribute("int", 0))  # fmt: skip
def paged_attention(query_THD: Array, cache: Array, positions_T: Array, owners_T: Array, tables_SW: Array, *,
                    scale: float, window: int, softcap: float, early: int = 0) -> Array:  # fmt: skip
    """Attention of a token to the positions up to its own of its sequence, whose blocks are tables[owners[t]]

    window: it sees that many positions, its own included; 0 all. softcap: as Attention's. early: as CacheUpdate's.
    """
    tokens, heads, depth = query_THD.shape
    groups, size = cache.shape[2], block_of(cache.shape[3], depth, cache.dtype.name)
    result = np.zeros(query_THD.shape, wide(query_THD).dtype)
    for t in range(tokens):
        count = int(positions_T[t]) + 1
        if count <= 0:
            continue
        first = max(count - window, 0) if window else 0
        keys, values = (part.transpose(1, 0, 2, 3).reshape(groups, -1, depth)
                        for part in _parts(cache[tables_SW[owners_T[t]][: -(-count // size)]], depth))  # fmt: skip
        query = wide(query_THD[t]).reshape(groups, heads // groups, depth)
        scores = query @ keys[:, first:count].transpose(0, 2, 1) * query.dtype.type(scale)
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = powers / powers.sum(axis=-1, keepdims=True)
        result[t] = (weights @ values[:, first:count]).reshape(heads, depth)
    return narrowed(result, query_THD.dtype.name)


def _cached_type(cache: TensorType, projected: TensorType, positions: TensorType, slots: TensorType,
                 owners: TensorType, tables: TensorType, *angles: TensorType | None, heads: int, groups: int,
                 epsilon: float, **attention: float) -> tuple[TensorType, TensorType]:  # fmt: skip
    pool, query = _update_type(cache, projected, positions, slots, *angles, heads=heads, groups=groups, epsilon=epsilon)
    return pool, _paged_type(query, pool, positions, owners, tables, **attention)  # type: ignore[arg-type]


@op("CachedAttention", "cache projected positions slots owners tables cosine? sine?", _cached_type,
    heads=Attribute("int"), groups=Attribute("int"), epsilon=Attribute("float", 1e-6), scale=Attribute("float"),
    window=Attribute("int", 0), softcap=Attribute("float", 0.0), early=Attribute("int", 0))  # fmt: skip
def cached_attention(cache: Array, projected_TN: Array, positions_T: Array, slots_T: Array, owners_T: Array,
                     tables_SW: Array, cosine_PR: Array | None, sine_PR: Array | None, *, heads: int, groups: int,
                     epsilon: float, scale: float, window: int, softcap: float,
                     early: int = 0) -> tuple[Array, Array]:  # fmt: skip
    """(pool, PagedAttention(query, pool, …)) of (pool, query) = CacheUpdate(cache, projected, …)"""
    pool, query = cache_update(cache, projected_TN, positions_T, slots_T, cosine_PR, sine_PR, None, None, heads=heads,
                               groups=groups, epsilon=epsilon)  # fmt: skip
    return pool, paged_attention(query, pool, positions_T, owners_T, tables_SW, scale=scale, window=window,
                                 softcap=softcap)  # fmt: skip

"""Which experts a row's scores choose, and which rows of an expert a block has."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def keys(scores, count: tl.constexpr, size: tl.constexpr, wide: tl.constexpr):
    """Of each of `count` scores, filled up to `size`, a number: they are in order as the scores are, of equal ones the
    first is the largest, and no two are alike. Scores that are no numbers come last. wide: scores of 32 bits, else
    their lowest bits are zeros, and take the places."""
    places = tl.arange(0, size)
    found = tl.load(scores + places, places < count, other=float("-inf"), cache_modifier=".cg").to(tl.float32)
    bits = (tl.where(found == found, found, float("-inf")) + 0.0).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    made = (order.to(tl.int64) << 32) if wide else (order & -size)
    return made | (size - 1 - places)


@triton.jit
def without(found, best, wide: tl.constexpr):
    """The keys but the largest."""
    least = found * 0 + (-9223372036854775808 if wide else -2147483648)
    return tl.where(found == best, least, found)


@triton.jit
def place_of(key, size: tl.constexpr):
    """Whose key it is."""
    return (size - 1 - (key & (size - 1))).to(tl.int32)


@triton.jit
def score_of(key, size: tl.constexpr, wide: tl.constexpr):
    """The score that the key was made of."""
    order = (key >> 32).to(tl.int32) if wide else key
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    return (bits if wide else bits & -size).to(tl.float32, bitcast=True)


@triton.jit
def powers(scores, best, count: tl.constexpr, size: tl.constexpr):
    """The sum of all scores' powers, of what they are more than the best."""
    places = tl.arange(0, size)
    found = tl.load(scores + places, places < count, other=float("-inf"), cache_modifier=".cg").to(tl.float32)
    return tl.sum(tl.exp(found - best), 0)


@triton.jit
def tiles_of(rows, height: tl.constexpr, low: tl.constexpr, high: tl.constexpr):
    """How many tiles of `height` rows each expert has, of those with `low` to `high` rows."""
    return tl.where((rows >= low) & (rows <= high), (rows + height - 1) // height, 0)


@triton.jit
def tile_of(rows, tiles, number, count: tl.constexpr, size: tl.constexpr, height: tl.constexpr):
    """(expert, its first row, how many rows it has) of one of the tiles."""
    ends = tl.cumsum(tiles, 0)
    expert = tl.minimum(tl.sum((ends <= number).to(tl.int32)), count - 1)
    mine = tl.arange(0, size) == expert
    begin = tl.sum(tl.where(mine, ends - tiles, 0))
    return expert, (number - begin) * height, tl.sum(tl.where(mine, rows, 0))

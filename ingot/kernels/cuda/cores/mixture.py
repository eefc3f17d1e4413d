"""Which experts a row's scores choose. Scores that are no numbers come last; the shares they lead to are no numbers."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def score(scores, places, count: tl.constexpr):
    """Scores to compare: there is an order among them whatever they are."""
    found = tl.load(scores + places, places < count, other=float("-inf"), cache_modifier=".cg").to(tl.float32)
    return tl.where(found == found, found, float("-inf"))


@triton.jit
def ranks(scores, count: tl.constexpr, size: tl.constexpr, step: tl.constexpr):
    """Of each of `count` scores, filled up to `size`, how many come before it: larger ones, and the same of lower
    numbers."""
    mine = tl.arange(0, size)
    own = score(scores, mine, count)
    found = tl.zeros((size,), tl.int32)
    for start in tl.static_range(0, size, step):
        others = start + tl.arange(0, step)
        other = score(scores, others, count)
        lower = (other[:, None] == own[None, :]) & (others[:, None] < mine[None, :])
        found += tl.sum(((other[:, None] > own[None, :]) | lower).to(tl.int32), 0)
    return found


@triton.jit
def nth(found, place, size: tl.constexpr):
    """The number of the score that `place` others come before."""
    return tl.sum(tl.where(found == place, tl.arange(0, size), 0))


@triton.jit
def shares(scores, found, chosen: tl.constexpr, normalised: tl.constexpr, count: tl.constexpr, size: tl.constexpr):
    """Of each score its share: of all, or of those that are chosen."""
    places = tl.arange(0, size)
    own = tl.load(scores + places, places < count, other=float("-inf"), cache_modifier=".cg").to(tl.float32)
    powers = tl.exp(own - tl.max(score(scores, places, count), 0))
    counted = found < chosen if normalised else places < count
    return powers / tl.sum(tl.where(counted, powers, 0.0), 0)


@triton.jit
def tiles_of(counts, count: tl.constexpr, size: tl.constexpr, apart: tl.constexpr, height: tl.constexpr):
    """How many tiles of `height` rows there are, where each expert's rows are in tiles of its own."""
    experts = tl.arange(0, size)
    rows = tl.load(counts + experts * apart, experts < count, other=0)
    return tl.sum((rows + height - 1) // height)


@triton.jit
def tile_of(counts, number, count: tl.constexpr, size: tl.constexpr, apart: tl.constexpr, height: tl.constexpr):
    """(expert, its first row, how many rows it has) of one of those tiles."""
    experts = tl.arange(0, size)
    rows = tl.load(counts + experts * apart, experts < count, other=0)
    tiles = (rows + height - 1) // height
    ends = tl.cumsum(tiles, 0)
    expert = tl.minimum(tl.sum((ends <= number).to(tl.int32)), count - 1)
    mine = experts == expert
    begin = tl.sum(tl.where(mine, ends - tiles, 0))
    return expert, (number - begin) * height, tl.sum(tl.where(mine, rows, 0))

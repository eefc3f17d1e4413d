"""Which tiles, blocks of K and runs of tiles a matrix product may use, and what they are likely to cost."""

from __future__ import annotations

from functools import lru_cache

from ingot.kernels.cpu.gemm import Tile
from ingot.kernels.cpu.gemm_dot import Dot
from ingot.plan.extent import Extent

# Most rows per number of vectors: the weights and a broadcast take registers as well (9x3 was spilled).
_TILES = {32: ((14, 2), (12, 2), (8, 3), (6, 4), (14, 1)), 16: ((6, 2), (4, 3), (5, 2), (12, 1))}
_FEW_ROWS = {32: ((1, 8), (2, 8), (3, 8), (4, 6)), 16: ((1, 8), (2, 6), (3, 4))}
_BLOCKS = (384, 768)  # steps of K
TYPICAL = 64  # rows, where only the run knows
_ITEMS = 48  # work items that keep 16 threads busy
_CHUNKS = 16  # worth cutting panels for
_RUN_ROWS = 192
_RUN_PRODUCTS = 1 << 14  # products of vectors that make an item worth its start
_KEPT_BYTES = 1 << 21  # of x, beside the weights that pass
_KEPT_ROWS = 512
GIGAHERTZ = 2.6
_LATENCY = 4
_CYCLES_PER_LOAD = 0.13  # beside the arithmetic that hides most of it; measured over tiles of 13x1 to 6x4
_BYTES_PER_MICROSECOND = 20_000


def known(extent: Extent) -> int:
    """An extent, or a typical one where it is symbolic."""
    return extent if isinstance(extent, int) else TYPICAL


@lru_cache(maxsize=4096)
def tiles_for(rows: Extent, columns: Extent, lanes: int, registers: int) -> tuple[Tile, ...]:
    """Tiles worth trying: as large as the registers allow, of equal heights where the rows are known."""
    blocks = -(-columns // lanes) if isinstance(columns, int) else 1 << 30
    few = [(r, v) for r, v in _FEW_ROWS[registers] if r == rows]
    found: dict[Tile, None] = {}
    for limit, vectors in (*few, *_TILES[registers]):
        if vectors <= max(blocks, 1):
            height = limit if isinstance(rows, str) else balanced(rows, limit)
            found[Tile(height, vectors)] = None
    return tuple(found)


def balanced(rows: int, limit: int) -> int:
    """Height of equal tiles, at most `limit`, that cover `rows` with as few tiles as possible."""
    count = max(-(-rows // limit), 1)
    return max(-(-rows // count), 1)


@lru_cache(maxsize=4096)
def depths_for(steps: Extent, rows: Extent) -> tuple[int, ...]:
    """Steps of K per block: equal parts; all of it where a single pass over the weights is all there is."""
    if isinstance(steps, str):
        return (_BLOCKS[0],)
    if isinstance(rows, int) and rows <= 4:
        return (max(steps, 1),)
    parts = {-(-steps // max(-(-steps // block), 1)) for block in _BLOCKS}
    return tuple(sorted({max(-(-part // 8) * 8, 8) for part in parts}))


def run_for(rows: Extent, tile: Tile, panels: Extent, steps: Extent, batch: int = 1) -> int:
    """Tiles per work item: many for the sake of the panel of weights, few enough for all threads to have work."""
    tiles = -(-known(rows) // tile.rows)
    parts = -(-_ITEMS // max(known(panels) * batch, 1))
    fair = -(-tiles // parts)
    worthwhile = -(-_RUN_PRODUCTS // (tile.rows * tile.vectors * max(known(steps), 1)))
    return max(1, min(max(fair, worthwhile), tiles, -(-_RUN_ROWS // tile.rows)))


def group_for(rows: Extent, tile: Tile, row_bytes: int) -> int:
    """Tiles that pass a panel of weights one after the other: as many rows of x as stay in the second-level cache."""
    limit = max(1, min(_KEPT_BYTES // max(row_bytes, 1), _KEPT_ROWS) // tile.rows)
    if isinstance(rows, str):
        return max(1, min(limit, _RUN_ROWS // tile.rows))
    tiles = max(-(-rows // tile.rows), 1)
    return -(-tiles // -(-tiles // limit))


def grain_for(tile: Tile, steps: int, run: int, panels: Extent, groups: Extent) -> int:
    """Tiles below which a thread's chunk is not worth its start: a panel's, or fewer where there are few panels."""
    worthwhile = -(-_RUN_PRODUCTS // (tile.rows * tile.vectors * max(steps, 1)))
    parts = -(-_CHUNKS // max(known(panels) * (groups if isinstance(groups, int) else 1), 1))
    return max(worthwhile, -(-run // parts))


def cost(dot: Dot, tile: Tile, rows: Extent, columns: Extent, steps: Extent, depth: int,
         weights: float) -> float:  # fmt: skip
    """Microseconds on one core; `weights`: bytes of the right operand, read once."""
    m, n, k = known(rows), known(columns), known(steps)
    panels, tiles = -(-n // (tile.vectors * dot.lanes)), -(-m // tile.rows)
    height = min(tile.rows, m)
    sums = height * tile.vectors
    widening = tile.vectors if dot.right != dot.left else 0
    step = max(sums * dot.cycles + widening / 2, _LATENCY) + (height + tile.vectors) * _CYCLES_PER_LOAD
    blocks = -(-k // depth)
    cycles = panels * tiles * (k * step + 40 + blocks * (20 + 2 * sums))
    moved = weights / _BYTES_PER_MICROSECOND
    compute = cycles / (GIGAHERTZ * 1000)
    return 0.5 + max(compute, moved) + 0.1 * min(compute, moved)

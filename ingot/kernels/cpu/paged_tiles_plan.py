"""What the generator of PagedAttention in tile registers knows of a node: extents, and how scratch is laid out."""

from __future__ import annotations

from dataclasses import dataclass

from ingot.ir.ops_paged import line_of
from ingot.kernels.cpu.build import Handle, KernelBuilder
from ingot.kernels.cpu.gemm_tiles import HALVED, ROW_BYTES, ROWS, TALLEST, TILE_BYTES, TileDot, configuration
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.cpu.paged_plan import Paged, applies, paged_of
from ingot.kernels.node import Node

WIDE = 2  # tiles of 16 keys, or of 16 elements of values, whose sums are held at once
SLOT_BYTES = TALLEST * WIDE * ROW_BYTES  # of a block of rows' sums
PAIR_BYTES = WIDE * TILE_BYTES  # of two tiles of keys or values
_MOST_ROWS = 128  # of a work item: they share what is made of keys and values
_CHUNK = 16  # blocks whose scores are kept
_FEWEST_ROWS = 2  # of a token: one alone waits longer for tiles than vectors take


@dataclass(frozen=True)
class Tiles(Paged):
    """The kernel; places are offsets into scratch.

    queries: [16 rows together][32 elements][part][row][64 bytes]. keys: [two blocks][32 elements][block][16 pairs of
    elements][16 keys][2]. values: [32 elements][two blocks][16 elements][16 pairs of keys][16][2]. scores, of 32 rows:
    [two blocks][row][32 keys]. weights, of 32 rows: [16 rows][two blocks][part][row][64 bytes]. sums: [32 rows][32
    elements][row][32]. scales: of a chunk's keys, then of its values.
    """

    dot: TileDot
    tokens: int
    registers: Handle
    queries_at: int
    keys_at: int
    values_at: int
    scales_at: int
    scores_at: int
    weights_at: int
    sums_at: int
    peaks_at: int
    totals_at: int
    chunk: int = _CHUNK

    @property
    def steps(self) -> int:
        """Tiles of a head's elements."""
        return -(-self.depth // self.dot.depth)

    @property
    def pairs(self) -> int:
        """Pairs of blocks of a chunk: what a tile of weights covers."""
        return self.chunk // 2

    @property
    def row_bytes(self) -> int:
        """Of a tile of rows, all parts."""
        return self.dot.parts * TILE_BYTES

    @property
    def block_bytes(self) -> int:
        """Of the sums of 32 rows."""
        return self.steps * SLOT_BYTES


@dataclass(frozen=True, eq=False)
class View:
    """Consecutive tokens of one sequence and the group of heads; blocks [oldest, blocks) are what any of them sees.
    `least`: keys up to the first token's own."""

    first: Value
    group: Value
    tokens: Value
    rows: Value
    table: Value
    least: Value
    context: Value
    oldest: Value
    blocks: Value


def tiled(node: Node, isa: Isa) -> bool:
    """Whether tile registers take the node: keys and values that bfloat16 holds exactly, blocks of 16 tokens."""
    if not isa.has("amx_bf16") or not applies(node, isa) or node.dtype != "float32":
        return False
    (_, heads, depth), (_, _, groups, line) = node.input(0).shape, node.input(1).shape
    assert isinstance(heads, int) and isinstance(depth, int) and isinstance(groups, int)
    dtype = node.input(1).dtype
    fits = dtype in ("bfloat16", "int8") and line == line_of(ROWS, depth, dtype)
    return fits and depth % 2 == 0 and heads // groups >= _FEWEST_ROWS


def tiles_of(build: KernelBuilder, node: Node) -> Tiles:
    """Claim operands and scratch for a node."""
    given, dot = paged_of(build, node), HALVED
    tokens = max(_MOST_ROWS // given.shared, 1)
    steps, pairs = -(-given.depth // dot.depth), _CHUNK // 2
    blocks = -(-tokens * given.shared // TALLEST)
    packed = steps * pairs * PAIR_BYTES
    return Tiles(
        **vars(given),
        dot=dot,
        tokens=tokens,
        registers=build.pack(configuration()),
        queries_at=build.scratch(blocks * 2 * steps * dot.parts * TILE_BYTES),
        keys_at=build.scratch(packed),
        values_at=build.scratch(packed),
        scales_at=build.scratch(2 * _CHUNK * ROW_BYTES),
        scores_at=build.scratch(pairs * SLOT_BYTES),
        weights_at=build.scratch(2 * pairs * dot.parts * TILE_BYTES),
        sums_at=build.scratch(blocks * steps * SLOT_BYTES),
        peaks_at=build.scratch(blocks * TALLEST * 4),
        totals_at=build.scratch(blocks * TALLEST * ROW_BYTES),
    )

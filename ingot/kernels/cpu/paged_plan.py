"""What the generator of PagedAttention knows of a node before it writes code: extents, tiles, places in scratch."""

from __future__ import annotations

from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.elementwise import FLOATS
from ingot.ir.ops_paged import block_of
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.paged_pool import Pool, pool_of
from ingot.kernels.cpu.pointwise_dims import can_mask
from ingot.kernels.cpu.render import MEMORY
from ingot.kernels.node import Node
from ingot.plan.extent import Extent

WAYS = 2  # partial sums of a score, so that additions do not wait for each other
ROWS = 16  # of a tile
CHUNK = 8  # blocks whose scores are kept
_SCORE_ROWS = {32: 8, 16: 2}  # by registers: rows and vectors of products held at once
_SUM_ROWS, _SUM_VECTORS = {32: 4, 16: 2}, 4


@dataclass(frozen=True)
class Tile:
    """Consecutive tokens of one sequence, and the group of heads."""

    first: Value
    group: Value
    tokens: int


@dataclass(frozen=True)
class Paged:
    """What every kernel knows: `shared` query heads use a group's keys."""

    pool: Pool
    heads: int
    shared: int
    depth: int
    dtype: str
    lanes: int
    scale: float
    window: int
    softcap: float
    width: Extent
    query: Handle
    positions: Handle
    owners: Handle
    tables: Handle
    result: Handle

    @property
    def groups(self) -> int:
        """Heads of keys."""
        return self.pool.groups

    @property
    def element_bytes(self) -> int:
        """Of an element of queries and results."""
        return size_of(self.dtype)

    @property
    def pool_bytes(self) -> int:
        """Of an element of keys and values."""
        return size_of(self.pool.dtype)

    @property
    def head_bytes(self) -> int:
        """Of a head of queries and results."""
        return self.depth * self.element_bytes

    def position(self, f: PhaseFunction, token: Value) -> Value:
        """positions[token]"""
        return f.cast("sext", f.load("i32", f.pointer(self.positions), token * 4), "i64")

    def owner(self, f: PhaseFunction, token: Value) -> Value:
        """owners[token]"""
        return f.cast("sext", f.load("i32", f.pointer(self.owners), token * 4), "i64")

    def block_number(self, f: PhaseFunction, table: Value, place: Value) -> Value:
        """The block at a place of a sequence's table."""
        return f.cast("sext", f.load("i32", table, place * 4), "i64")

    def mask(self, f: PhaseFunction, place: int) -> Value | None:
        """Of the elements of a head from `place` on, where they do not fill a vector."""
        left = self.depth - place
        return f.first_lanes(left, self.lanes) if left < self.lanes else None

    def table(self, f: PhaseFunction, token: Value) -> Value:
        """The table of a token's sequence."""
        return f.at(f.pointer(self.tables), self.owner(f, token) * f.extent(self.width) * 4)


@dataclass(frozen=True)
class Lanes(Paged):
    """The kernel of vectors: places are offsets into scratch."""

    tokens: int
    score_rows: int
    sum_rows: int
    sum_vectors: int
    query_at: int
    sums_at: int
    scores_at: int
    peaks_at: int
    totals_at: int
    factors_at: int
    limits_at: int
    chunk: int = CHUNK

    @property
    def line_bytes(self) -> int:
        """Of a row's query or sums in scratch: whole vectors."""
        return -(-self.depth // self.lanes) * self.lanes * 4

    @property
    def score_bytes(self) -> int:
        """Of a row's scores in scratch."""
        return self.chunk * self.pool.block * 4

    def line(self, f: PhaseFunction, at: int, row: Index) -> Value:
        """A row's query (at query_at) or sums (at sums_at)."""
        return f.at(f.scratch, f.index(row) * self.line_bytes + at)

    def scores(self, f: PhaseFunction, row: Index) -> Value:
        """A row's scores of the chunk."""
        return f.at(f.scratch, f.index(row) * self.score_bytes + self.scores_at)


def applies(node: Node, isa: Isa) -> bool:
    """Whether blocks are whole vectors, tails can be masked and types read."""
    query, cache = node.input(0), node.input(1)
    if any(not isinstance(size, int) or size == 0 for size in (*query.shape[1:], *cache.shape[1:])):
        return False
    depth, line = query.shape[2], cache.shape[3]
    assert isinstance(depth, int) and isinstance(line, int)
    dtypes = [query.dtype, cache.dtype]
    floats = all(dtype in (*FLOATS, "int8") and dtype in MEMORY and dtype != "float64" for dtype in dtypes)
    floats = floats and query.dtype != "int8"
    integers = all(node.input(i).dtype == "int32" for i in (2, 3, 4))
    whole = block_of(line, depth, cache.dtype) % isa.lanes == 0
    return floats and integers and whole and (depth % isa.lanes == 0 or can_mask(isa, dtypes))


def paged_of(build: KernelBuilder, node: Node) -> Paged:
    """Claim operands for a node."""
    (_, heads, depth), attributes = node.input(0).shape, node.attributes
    assert isinstance(heads, int) and isinstance(depth, int)
    pool = pool_of(build, node.input(1), build.input(1), depth)
    return Paged(
        pool, heads, heads // pool.groups, depth, node.dtype, build.isa.lanes, float(attributes["scale"]),
        int(attributes.get("window", 0)), float(attributes.get("softcap", 0.0)), node.input(4).shape[1], build.input(0),
        build.input(2), build.input(3), build.input(4), build.output(),
    )  # fmt: skip


def lanes_of(build: KernelBuilder, node: Node) -> Lanes:
    """Claim operands and scratch for a node."""
    given, isa = paged_of(build, node), build.isa
    tokens = max(ROWS // given.shared, 1)
    rows, line = tokens * given.shared, -(-given.depth // isa.lanes) * isa.lanes * 4
    return Lanes(
        **vars(given),
        tokens=tokens,
        score_rows=_SCORE_ROWS[isa.registers],
        sum_rows=_SUM_ROWS[isa.registers],
        sum_vectors=_SUM_VECTORS,
        query_at=build.scratch(rows * line),
        sums_at=build.scratch(rows * line),
        scores_at=build.scratch(rows * CHUNK * given.pool.block * 4),
        peaks_at=build.scratch(rows * 4),
        totals_at=build.scratch(rows * 4),
        factors_at=build.scratch(rows * 4),
        limits_at=build.scratch(rows * 8),
    )

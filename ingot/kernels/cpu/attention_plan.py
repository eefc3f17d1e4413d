"""What the generator of Attention knows of a node before it writes code: extents, products, places in scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ingot.dtypes import size_of
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.gemm import Gemm, Tile
from ingot.kernels.cpu.gemm_dot import NARROW, Dot, dot_for
from ingot.kernels.cpu.gemm_plan import balanced
from ingot.kernels.cpu.gemm_prepare import prepared
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, ceil_div, product

ROWS = {32: {1: 14, 2: 14, 3: 9}, 16: {1: 10, 2: 6, 3: 4}}
LANE_BYTES = 8  # of a lane's offset into the mask


@dataclass(frozen=True)
class Heads:
    """Extents of q[B,H,S,D], k[B,G,T,D], v[B,G,T,E]; `shared` query heads use a key head."""

    batch: Extent
    groups: int
    shared: int
    positions: Extent
    keys: Extent
    depth: int
    width: int

    @property
    def queries(self) -> Extent:
        """Queries per key head."""
        return product((self.shared, self.positions))


def heads_of(node: Node) -> Heads:
    """The node's extents, of which heads, D and E are static."""
    batch, heads, positions, depth = node.input(0).shape
    groups, keys, width = node.input(1).shape[1], node.input(1).shape[2], node.input(2).shape[3]
    assert isinstance(heads, int) and isinstance(groups, int) and isinstance(depth, int) and isinstance(width, int)
    return Heads(batch, groups, heads // groups, positions, keys, depth, width)


def dot_of(dtype: str, isa: Isa) -> Dot:
    """Products of queries, keys and values; 16-bit floats are widened beforehand."""
    dot = dot_for("float32" if dtype in NARROW else dtype, isa)
    assert dot is not None
    return dot


@dataclass(frozen=True)
class Rows:
    """A matrix per key head in memory, its rows `pitch` elements apart."""

    handle: Handle
    pitch: Extent
    rows: Extent
    size: int

    def pointer(self, f: PhaseFunction, head: Value) -> Value:
        """Address of a head's matrix."""
        return f.at(f.pointer(self.handle), head * f.extent(self.rows) * f.extent(self.pitch) * self.size)

    def stride(self, f: PhaseFunction) -> Index:
        """Bytes from row to row."""
        return f.extent(self.pitch) * self.size


@dataclass(frozen=True)
class Mask:
    """The mask's dtype and its element strides along [B, H, S, T], 0 where it is repeated.

    kind "key": one row for all queries of an item. "full": a row for every query, transposed block by block.
    """

    kind: Literal["key", "full"]
    handle: Handle
    dtype: str
    strides: tuple[Extent, ...]


def mask_of(build: KernelBuilder, node: Node, shape: Heads) -> Mask | None:
    """The node's mask, if it has one."""
    if not node.has_input(3):
        return None
    port = node.input(3)
    dims = (1,) * (4 - len(port.shape)) + port.shape
    strides = tuple(product(dims[axis + 1 :]) if dims[axis] != 1 else 0 for axis in range(4))
    alike = strides[2] == 0 and (strides[1] == 0 or shape.shared == 1)
    return Mask("key" if alike else "full", build.input(3), port.dtype, strides)


@dataclass(frozen=True, eq=False)
class Plan:
    """One kernel: `scores` is K by Qᵀ, `output` Vᵀ by the weights; the places are offsets into scratch."""

    shape: Heads
    dot: Dot
    vectors: int
    block: int
    dtype: str
    scale: float
    softcap: float
    causal: bool
    scores: Gemm
    output: Gemm
    query: Handle
    key: Rows
    value: Rows
    result: Handle
    mask: Mask | None
    panel_at: int
    scores_at: int
    mask_at: int
    sums_at: int
    state_at: int
    limits_at: int
    offsets_at: int

    @property
    def lanes(self) -> int:
        """Queries in a vector."""
        return self.dot.lanes

    @property
    def width(self) -> int:
        """Queries in an item."""
        return self.vectors * self.lanes

    @property
    def line(self) -> int:
        """Bytes of a number for each of an item's queries."""
        return self.vectors * self.dot.sum_bytes

    @property
    def single(self) -> bool:
        """Whether one block holds all keys."""
        return isinstance(self.shape.keys, int) and self.shape.keys <= self.block

    @property
    def blocks(self) -> Extent:
        """Items per key head."""
        return ceil_div(self.shape.queries, self.width)

    @property
    def by_lane(self) -> bool:
        """Whether queries of an item differ in where they are in the mask or in what they may see."""
        return self.causal or (self.mask is not None and self.mask.kind == "full")


def plan_of(build: KernelBuilder, node: Node, vectors: int, block: int) -> Plan:
    """Claim operands and scratch for a node."""
    shape, dot, mask = heads_of(node), dot_of(node.dtype, build.isa), mask_of(build, node, heads_of(node))
    limit, causal = ROWS[build.isa.registers][vectors], bool(node.attributes.get("causal", 0))
    tile = Tile(balanced(shape.keys, limit) if isinstance(shape.keys, int) else limit, vectors)
    lines = Tile(balanced(shape.width, limit), vectors)
    steps: Extent = "keys" if causal else shape.keys
    scores = Gemm(dot, tile, shape.keys, shape.queries, shape.depth, max(shape.depth, 1), 1)
    output = Gemm(dot, lines, shape.width, shape.queries, steps, block, ceil_div(shape.width, lines.rows))  # type: ignore[arg-type]
    line, squares = vectors * dot.sum_bytes, -(-max(shape.width, block) // dot.lanes) * dot.lanes
    key, value = (_rows(build, node, index, dot) for index in (1, 2))
    return Plan(
        shape, dot, vectors, block, node.dtype, float(node.attributes["scale"]),
        float(node.attributes.get("softcap", 0.0)), causal, scores, output, build.input(0), key, value, build.output(),
        mask,
        panel_at=build.scratch(-(-shape.depth // dot.lanes) * dot.lanes * line),
        scores_at=build.scratch((squares + 2 * tile.rows) * line) + tile.rows * line,
        mask_at=build.scratch(squares * line if mask is not None and mask.kind == "full" else 0),
        sums_at=build.scratch(output.slot_bytes),
        state_at=build.scratch(3 * line),
        limits_at=build.scratch(vectors * dot.lanes * 4),
        offsets_at=build.scratch(vectors * dot.lanes * LANE_BYTES),
    )  # fmt: skip


def _rows(build: KernelBuilder, node: Node, index: int, dot: Dot) -> Rows:
    port = node.input(index)
    batch, groups, rows, width = port.shape
    if port.dtype == dot.left:
        return Rows(build.input(index), width, rows, size_of(dot.left))
    made = prepared(build, index, product((batch, groups, rows)), width, dot)
    return Rows(made.handle, made.pitch, rows, size_of(dot.left))

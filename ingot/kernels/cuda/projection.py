"""Projection: a ladder of launches from one row, where weights stream through registers, to thousands in large tiles.

    one row      norm, product, expression in one launch; a block asks for its weights before it waits for the input,
                 and keeps asking (projection_ring), or there are as many blocks as groups of columns (projection_row)
    few rows     rows normalised by a launch of their own, tiles of 16 to 64 rows, the depth split among blocks
    many rows    the same with large tiles
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ingot.kernels import kernel
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.gemm import Tile
from ingot.kernels.cuda.kept import keep
from ingot.kernels.cuda.ladder import Rung, only
from ingot.kernels.cuda.paged_update import LARGEST
from ingot.kernels.cuda.projection_ring import COLUMNS, bricks, form, lines, ring
from ingot.kernels.cuda.projection_row import Work, operands_in, store
from ingot.kernels.cuda.projection_row import stream as stream_row
from ingot.kernels.cuda.render import can_render
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.cuda.streaming import Block, can_stream, stored
from ingot.kernels.cuda.words import source_of
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, ceil_div, product

_GROUP = 8  # row tiles that share their columns in the second level of cache
_FLOAT = 4
_FEW = 128  # rows: to here depths are divided among blocks

# One row: columns of a block, depth of a step, warps.
_SMALL, _DEEP = 1 << 24, 8192
_LARGE = 1 << 20  # bytes of weights from which on blocks that stay pay
RING = "ring"  # begins the names of such streams
STREAMS = ("1x2048w4", "2x2048w4", "4x2048w4", "1x1024w2", "2x4096w8", "4x4096w8")


def applies(node: Node, target: Any) -> bool:
    weight = node.input(1)
    if weight.constant is None or not can_stream(weight.dtype, node.dtype, (int(weight.shape[0]),), target):
        return False
    if node.has_input(2) and node.input(2).constant is None:
        return False
    return operands_fit(node)


def operands_fit(node: Node) -> bool:
    """Whether what the expression reads beside the sums is one number, a row of columns or as large as the result."""
    work, ports = Work.of(node), _operands(node)
    fits = all(p.elements == 1 or p.shape == node.output.shape or p.elements == work.columns for p in ports)
    return fits and can_render(node.epilogue, [*["float32"] * work.parts, *(p.dtype for p in ports)])


def _operands(node: Node) -> list[Port]:
    return [node.input(k) for k in operands_in(node) if node.has_input(k)]


def _streams(node: Node, target: Architecture) -> tuple[str, ...]:
    work = Work.of(node)

    def fits(block: Block) -> bool:
        size = block.columns * block.depth * work.parts // (32 * block.warps)
        row = power_of_two(work.depth) // (32 * block.warps)
        return block.depth <= max(power_of_two(work.depth), 2048) and max(size, row) <= 128  # that a thread holds

    return tuple(text for text in STREAMS if fits(Block.parse(text))) + tuple(filter(None, [ring_of(node, target)]))


def ring_of(node: Node, target: Architecture) -> str | None:
    """The stream of blocks that stay, where all of a step's do and one row is usual: tiles of more find weights in
    bricks later than in lines (prompts of 8,192 tokens took 7 % longer on an H200)."""
    fits = node.attributes.get("early") and Rung(1, 1).takes(Work.of(node).rows)
    return form(node, target) if fits else None


def _cost(node: Node, target: Architecture, stream: str) -> float:
    """Of one row; what was best for most shapes on an H200, unless it is timed."""
    weight, work = node.input(1), Work.of(node)
    assert isinstance(weight.bytes, int)
    usual = "4x2048w4"
    if (found := ring_of(node, target)) and weight.bytes >= _LARGE:
        usual = found
    elif weight.dtype not in LARGEST:
        small = work.columns * work.depth <= _SMALL
        usual = "2x4096w8" if work.parts > 1 or work.depth > _DEEP else "1x2048w4" if small else "2x2048w4"
    return target.pace.step + weight.bytes / (target.bandwidth * 900) + 0.01 * (stream != usual)


def usual(node: Node, target: Architecture) -> str:
    """The stream that one row takes where nothing is timed."""
    return min(_streams(node, target), key=lambda stream: _cost(node, target, stream))


@kernel("Projection", on="cuda", when=applies, space={"stream": _streams}, cost=_cost)
def projection(build: CudaBuilder, node: Node, stream: str) -> None:
    """expression(parts of norm(x)[M, K] @ w[K, N]); the weights are stored in lines [N, K] or in bricks"""
    rows_of(build, node, kept(build, node, stream.startswith(RING)), stream)


def kept(build: CudaBuilder, node: Node, bricked: bool) -> Handle:
    """The weights as they are stored."""
    weight = node.input(1).constant
    assert weight is not None
    return build.pack(bricks(weight, Work.of(node).parts) if bricked else stored(weight))


def rows_of(build: CudaBuilder, node: Node, packed: Handle, stream: str) -> None:
    """The launches for all numbers of rows there may be."""
    work, bricked, one = Work.of(node), stream.startswith(RING), Rung(1, 1)
    if one.takes(work.rows):
        with only(build, one, work.rows):
            if bricked:
                ring(build, work, packed, stream)
            else:
                stream_row(build, work, packed, Block.parse(stream))
    more_rows(build, node, packed, bricked)


def more_rows(build: CudaBuilder, node: Node, packed: Handle, bricked: bool) -> None:
    """The launches for more rows than one, if there may be more."""
    work = Work.of(node)
    if not Rung(2).takes(work.rows):
        return
    with only(build, Rung(2), work.rows):
        sides = _sides(build, work, packed, bricked)
    by_tiles(build, work, sides, rungs(work, node.input(1).dtype))


# more rows


def rungs(work: Work, dtype: str) -> list[tuple[Rung, Tile]]:
    """Ranges of rows and their tiles; columns are those of one part."""
    half = work.parts > 1
    if dtype == "float32":
        return [(Rung(2, 16), Tile(16, 32, 64, 4, 3)), (Rung(17), Tile(64, 64, 32, 4, 3))]
    if dtype in LARGEST:
        return [
            (Rung(2, 128), Tile(128, 32 if half else 64, 128, 4, 4)),
            (Rung(129, 1024), Tile(128, 128, 128, 8, 3 if half else 4)),
            (Rung(1025), Tile(128, 128 if half else 256, 128, 8, 3)),
        ]
    return [
        (Rung(2, 16), Tile(16, 32 if half else 64, 128, 4, 4)),
        (Rung(17, 32), Tile(32, 32 if half else 64, 128, 4, 4)),
        (Rung(33, 64), Tile(64, 32 if half else 64, 128, 4, 4)),
        (Rung(65, 128), Tile(128, 32 if half else 64, 64, 4, 4)),
        (Rung(129, 512), Tile(128, 64 if half else 128, 64, 8 if half else 4, 4)),
        (Rung(513), Tile(128, 128 if half else 256, 64, 8, 3)),
    ]


@dataclass(frozen=True)
class Sides:
    """What tiles are loaded from: rows, weights, and what the rows are to be multiplied by, where they were rounded.
    bricked: whether the weights lie so. accumulate: how a tile's sums come about, where not by loading both sides."""

    rows: Handle
    weights: Handle
    sizes: Handle | None = None
    bricked: bool = False
    accumulate: Callable[[FunctionBuilder, Work, Tile, int], None] | None = None


def _sides(build: CudaBuilder, work: Work, packed: Handle, bricked: bool) -> Sides:
    """Rows normalised where there is a norm, and rounded to eight bits where the weights have them."""
    rounded = packed.dtype in LARGEST
    if not rounded and not build.node.has_input(2):
        return Sides(build.input(0), packed, bricked=bricked)
    rows, sizes = prepared(build, work, packed.dtype if rounded else build.node.dtype, work.depth,
                           source_of("columns") if rounded and not bricked else "columns")  # fmt: skip
    return Sides(rows, packed, sizes, bricked)


def prepared(build: CudaBuilder, work: Work, dtype: str, depth: int, source: str) -> tuple[Handle, Handle | None]:
    """Rows [rows, depth], normalised where there is a norm, with zeros beyond their own depth; of eight bits with the
    size [rows] that each is to be multiplied by. source: which number lies at the place `columns`."""
    node, block = build.node, power_of_two(depth)
    f = build.function(warps=min(max(block // 1024, 4), 16), stages=1)
    f.emit(f"columns = tl.arange(0, {block})\nsource = {source}\nrow = tl.program_id(0).to(tl.int64)")
    inside = f"columns < {depth}" if depth == work.depth else f"(source < {work.depth}) & (columns < {depth})"
    if node.has_input(2):
        f.emit(f"scale = tl.load({f.pointer(build.input(2))} + source, {inside}, other=0.0).to(tl.float32)")
    f.wait()
    x = f"{f.pointer(build.input(0))} + row * {work.depth} + source"
    f.emit(f"x = tl.load({x}, {inside}, other=0.0).to(tl.float32)")
    if node.has_input(2):
        f.emit(f"square = tl.sum(x * x) / {work.depth} + {node.attributes['epsilon']!r}")
        f.emit("x = x * (1.0 / libdevice.sqrt(square)) * scale")
    kept = keep(f, dtype, work.rows, depth)
    f.launch(work.rows)
    return kept


def by_tiles(build: CudaBuilder, work: Work, sides: Sides, ladder: Sequence[tuple[Rung, Tile]]) -> None:
    """Launches for each range of rows."""
    for rung, tile in ladder:
        if rung.takes(work.rows):
            with only(build, rung, work.rows):
                _tiles(build, work, sides, tile, rung)


def _split_of(work: Work, tile: Tile, rung: Rung, target: Architecture) -> int:
    """How many blocks share a tile's depth: enough to keep the processors busy, while each has some steps."""
    if rung.high is None or rung.high > _FEW:
        return 1
    blocks, steps = -(-work.columns // tile.columns) * -(-rung.high // tile.rows), -(-work.depth // tile.depth)
    split = 1
    while blocks * split * 2 <= 3 * target.processors and steps // (split * 2) >= 4:
        split *= 2
    return split


def _tiles(build: CudaBuilder, work: Work, sides: Sides, tile: Tile, rung: Rung) -> None:
    """Tiles of the result; where the depth is split, the last block of a tile adds the parts."""
    split = _split_of(work, tile, rung, build.target)
    f = build.function(warps=tile.warps, stages=tile.stages)
    rows = f.extent(work.rows)
    down, across = ceil_div(work.rows, tile.rows), -(-work.columns // tile.columns)
    _open(f, work, tile, down, across)
    steps = ceil_div(work.depth, tile.depth)
    f.emit(f"share = {ceil_div(steps, split)}\npart = tl.program_id(1)")
    inside = f"(rows < {rows})[:, None] & (columns < {work.columns})[None, :]"
    f.emit(f"inside = {inside}\nplace = rows[:, None] * {work.columns} + columns[None, :]")
    f.wait()
    if sides.accumulate is None:
        _accumulate(f, work, tile, sides, split, rung.high is not None and rung.high <= _FEW)
    else:
        sides.accumulate(f, work, tile, split)
    if sides.sizes is not None:
        f.emit(f"sizes = tl.load({f.pointer(sides.sizes)} + rows_in)[:, None]")
        for part in range(work.parts):
            f.emit(f"sums{part} = sums{part} * sizes")
    sums = [f"sums{part}" for part in range(work.parts)]
    tiles = product((down, across))
    if split == 1:
        _finish(f, build, sums)
    else:
        _join(f, build, work, sums, rung, split, tiles)
    f.launch(tiles, split)


def _open(f: FunctionBuilder, work: Work, tile: Tile, down: Extent, across: int) -> None:
    """The block's rows and columns: tiles in groups of rows, so that what they share stays in the cache."""
    f.emit(f"number = tl.program_id(0)\ngroup = number // ({_GROUP * across})\nfirst = group * {_GROUP}")
    f.emit(f"height = tl.minimum({f.extent(down)} - first, {_GROUP})\nwithin = number % ({_GROUP * across})")
    f.emit("row = first + within % height\ncolumn = within // height")
    f.emit(f"rows = row * {tile.rows} + tl.arange(0, {tile.rows})")
    f.emit(f"columns = column * {tile.columns} + tl.arange(0, {tile.columns})")
    f.emit(f"depths = tl.arange(0, {tile.depth})\nrows_in = tl.minimum(rows, {f.extent(work.rows)} - 1)")
    exact = work.columns % tile.columns == 0
    f.emit("columns_in = columns" if exact else f"columns_in = tl.minimum(columns, {work.columns - 1})")


def _accumulate(f: FunctionBuilder, work: Work, tile: Tile, sides: Sides, split: int, few: bool) -> None:
    """Sums of a tile. Where a tile may have few rows, rows beyond the last one are not asked for: as copies of the last
    they all come from one line of the second level of cache."""
    x, weight = sides.rows, sides.weights
    f.emit(f"left = {f.pointer(x)} + rows_in.to(tl.int64)[:, None] * {work.depth} + depths[None, :]")
    across, along, begin = f"columns_in * {work.depth}", "depths", f.pointer(weight)
    if sides.bricked and work.columns % tile.columns:
        across, along = lines(work, "columns_in")
    elif sides.bricked:  # the tile's place apart, so that a thread's columns lie a known way from each other
        across, along = lines(work, f"tl.arange(0, {tile.columns})")
        begin += f" + column * {tile.columns * work.depth}"
    f.emit(f"right = {begin} + ({across})[None, :] + {along}[:, None]")
    for part in range(work.parts):
        f.emit(f"sums{part} = tl.zeros(({tile.rows}, {tile.columns}), tl.float32)")
    steps, apart, width = -(-work.depth // tile.depth), tile.depth, work.columns
    if sides.bricked:
        apart, width = tile.depth * COLUMNS, -(-width // COLUMNS) * COLUMNS
    bounds = f"0, {steps}" if split == 1 else f"part * share, tl.minimum(part * share + share, {steps})"
    cast = "" if weight.dtype == x.dtype else f".to({LANGUAGE[x.dtype]})"
    precision = ', input_precision="tf32x3"' if x.dtype == "float32" else ""
    precision = f", max_num_imprecise_acc={tile.depth}" if x.dtype in LARGEST else precision
    with f.block(f"for step in range({bounds}):"):
        b, inside = "", [f"(rows < {f.extent(work.rows)})[:, None]"] if few else []
        if work.depth % tile.depth:
            rest = f"(depths < {work.depth} - step * {tile.depth})"
            b = f", {rest}[:, None], other=0.0"
            inside.append(f"{rest}[None, :]")
        a = f", {' & '.join(inside)}, other=0.0" if inside else ""
        f.emit(f"a = tl.load(left + step * {tile.depth}{a})")
        for part in range(work.parts):
            place = f"right + step * {apart} + {part * width * work.depth}"
            f.emit(f"b{part} = tl.load({place}{b}){cast}")
            f.emit(f"sums{part} = tl.dot(a, b{part}, sums{part}{precision})")


def _join(f: FunctionBuilder, build: CudaBuilder, work: Work, sums: Sequence[str], rung: Rung, split: int,
          tiles: Extent) -> None:  # fmt: skip
    """The last block of a tile adds all parts of the depth, in their order, and leaves the counter as it was."""
    most = rung.cut(work.rows)
    partial = f.pointer(build.temporary(product((split, work.parts, most, work.columns, _FLOAT)), "float32"))
    ticket = f"{f.pointer(build.counter(product((tiles_cut(tiles, work, rung), _FLOAT))))} + tl.program_id(0)"
    f.emit(f"stride = {f.extent(work.rows)} * {work.columns}")
    for number, name in enumerate(sums):
        f.emit(f"tl.store({partial} + (part * {work.parts} + {number}) * stride + place, {name}, inside)")
    f.emit(f"tl.debug_barrier()\nticket = tl.atomic_add({ticket}, 1, sem='acq_rel')")
    with f.block(f"if ticket == {split - 1}:"):
        f.emit(f"tl.store({ticket}, 0)")
        wholes = []
        for number in range(work.parts):
            f.emit(f"whole{number} = tl.load({partial} + {number} * stride + place, inside, cache_modifier='.cg')")
            with f.block(f"for other in tl.static_range(1, {split}):"):
                f.emit(f"whole{number} += tl.load({partial} + (other * {work.parts} + {number}) * stride + place, "
                       "inside, cache_modifier='.cg')")  # fmt: skip
            wholes.append(f"whole{number}")
        _finish(f, build, wholes)


def tiles_cut(tiles: Extent, work: Work, rung: Rung) -> Extent:
    """Most tiles there are of a range of rows."""
    return tiles if isinstance(tiles, int) or rung.high is None else product((work.columns, rung.high // 16 + 1))


# the end


def _finish(f: FunctionBuilder, build: CudaBuilder, sums: Sequence[str]) -> None:
    operands = {}
    for k in operands_in(build.node):
        port, pointer = build.node.input(k), f.pointer(build.input(k))
        if port.elements == 1:
            operands[k] = f.let(f"tl.load({pointer})")
        elif port.shape == build.node.output.shape:
            operands[k] = f.let(f"tl.load({pointer} + place, inside)")
        else:
            operands[k] = f.let(f"tl.load({pointer} + columns_in)[None, :]")
    store(f, build, sums, operands, "place", "inside")

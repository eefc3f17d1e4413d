"""Mixture of many rows: a pair is a row and one of its experts. Each expert has a list of its pairs, in any order, and
tiles of the products take their rows from it; results lie at their pairs' places, so that the order changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.expression import parse
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.gemm import Tile
from ingot.kernels.cuda.kept import keep
from ingot.kernels.cuda.ladder import Rung, only
from ingot.kernels.cuda.mixture_work import NORM, SCORES, Mix, Stacks, X
from ingot.kernels.cuda.paged_update import LARGEST
from ingot.kernels.cuda.projection_row import finish
from ingot.kernels.cuda.render import converted, render
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.cuda.words import source_of
from ingot.plan.extent import Extent, product

_APART = 32  # numbers between experts' counters, which many blocks add to at once: a cache line each
_GROUP = 8  # row tiles that share their columns in the second level of cache
_FLOAT = 4
_GROUPS_FROM = 90  # the capability from which four warps multiply together, and sums take fewer registers


@dataclass(frozen=True)
class _Rows:
    """Rows as tiles load them, and what their sums are to be multiplied by, where they were rounded."""

    rows: Handle
    sizes: Handle | None = None


@dataclass(frozen=True)
class _Lists:
    """Counts of experts' pairs, the pairs [experts, rows], and a share for each pair."""

    counts: Handle
    pairs: Handle
    shares: Handle


@dataclass(frozen=True)
class Range:
    """Experts with `low` to `high` rows (None: or more), and the tiles that these are divided into: of gate and up,
    whose columns are those of one of them, and of down."""

    low: int
    high: int | None
    gate: Tile
    down: Tile


def ranges(weights: str, target: Architecture) -> tuple[Range, ...]:
    """How experts are divided whose weights are of that type. Products of eight bits with few rows are made of halves,
    which hold them."""
    if weights == "float32":
        return (Range(1, None, Tile(16, 32, 64, 4, 3), Tile(16, 32, 64, 4, 3)),)
    depth = 128 if weights in LARGEST else 64
    if target.capability < _GROUPS_FROM:
        return (
            Range(1, 16, Tile(16, 32, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
            Range(17, None, Tile(64, 32, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
        )
    return (
        Range(1, 16, Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4)),
        Range(17, 64, Tile(64, 32, 128, 4, 4), Tile(64, 64, 128, 4, 4)),
        Range(65, None, Tile(128, 128, depth, 8, 3), Tile(128, 128, depth, 8 if weights in LARGEST else 4, 4)),
    )


def many_rows(build: CudaBuilder, mix: Mix, stacks: Stacks, inner: Handle) -> None:
    """The launches for sizes of more than a few rows."""
    lists = _Lists(
        build.counter(mix.count * _APART * 4), build.temporary(product((mix.count, mix.rows, 4)), "int32"),
        build.temporary(product((mix.pairs, _FLOAT)), "float32"),
    )  # fmt: skip
    parts = build.temporary(product((mix.pairs, mix.width, size_of(mix.kept))), mix.kept)
    many = Rung(mix.few + 1)
    with only(build, many, mix.rows):
        rows = _choose(build, mix, lists)
    _by_count(build, mix, lambda part: _gates(build, mix, stacks, rows, lists, inner, part))
    with only(build, many, mix.rows):
        between = _rounded_inner(build, mix, inner) if mix.weights in LARGEST else _Rows(inner)
    _by_count(build, mix, lambda part: _downs(build, mix, stacks, between, lists, parts, part))
    with only(build, many, mix.rows):
        _sum(build, mix, lists, parts)


def _by_count(build: CudaBuilder, mix: Mix, emit: Callable[[Range], None]) -> None:
    """A launch for each range of rows that an expert may have."""
    for part in ranges(mix.weights, build.target):
        rung = Rung(max(part.low, mix.few + 1))
        if rung.takes(mix.rows):
            with only(build, rung, mix.rows):
                emit(part)


# the choice


def _choose(build: CudaBuilder, mix: Mix, lists: _Lists) -> _Rows:
    """A block is a row: its experts and shares, its place in their lists, and what tiles load of it."""
    f, rounded = _opened(build, mix.width, "row"), mix.weights in LARGEST
    normed = build.node.has_input(NORM)
    f.emit(f"source = {source_of('columns') if rounded else 'columns'}")
    if normed:
        f.emit(f"scale = tl.load({f.pointer(build.input(NORM))} + source, inside, other=0.0).to(tl.float32)")
    f.wait()
    scores = f"{f.pointer(build.input(SCORES))} + row * {mix.count}"
    mix.choose(f, scores)
    f.emit(f"slots = tl.arange(0, {power_of_two(mix.chosen)})\nchosen = slots < {mix.chosen}")
    f.emit("experts, shares = slots * 0, slots * 0.0")
    for slot in range(mix.chosen):
        f.emit(f"experts = tl.where(slots == {slot}, expert{slot}, experts)")
        f.emit(f"shares = tl.where(slots == {slot}, share{slot}, shares)")
    f.emit(f"pairs = row * {mix.chosen} + slots\ntl.store({f.pointer(lists.shares)} + pairs, shares, chosen)")
    f.emit(f"places = tl.atomic_add({f.pointer(lists.counts)} + experts * {_APART}, 1, chosen, sem='relaxed')")
    f.emit(f"tl.store({f.pointer(lists.pairs)} + experts * {f.extent(mix.rows)} + places, pairs, chosen)")
    made = _Rows(build.input(X))
    if normed or rounded:
        f.emit(f"x = tl.load({f.pointer(build.input(X))} + row.to(tl.int64) * {mix.width} + source, inside, "
               "other=0.0).to(tl.float32)")  # fmt: skip
        if normed:
            f.emit(f"square = tl.sum(x * x) / {mix.width} + {build.node.attributes['epsilon']!r}")
            f.emit("x = x * (1.0 / libdevice.sqrt(square)) * scale")
        made = _Rows(*keep(f, mix.weights if rounded else mix.kept, mix.rows, mix.width))
    f.launch(mix.rows)
    return made


def _opened(build: CudaBuilder, width: int, name: str) -> FunctionBuilder:
    """A block is a row of some width."""
    block = power_of_two(width)
    f = build.function(warps=min(max(block // 1024, 4), 16), stages=1)
    f.emit(f"{name} = tl.program_id(0)\ncolumns = tl.arange(0, {block})\ninside = columns < {width}")
    return f


def _rounded_inner(build: CudaBuilder, mix: Mix, inner: Handle) -> _Rows:
    """What lies between the products, to eight bits pair by pair."""
    f = _opened(build, mix.inner, "row")
    f.wait()
    place = f"{f.pointer(inner)} + row.to(tl.int64) * {mix.inner} + {source_of('columns')}"
    f.emit(f"x = tl.load({place}, inside, other=0.0).to(tl.float32)")
    made = _Rows(*keep(f, mix.weights, mix.pairs, mix.inner))
    f.launch(mix.pairs)
    return made


# products


def _gates(build: CudaBuilder, mix: Mix, stacks: Stacks, rows: _Rows, lists: _Lists, inner: Handle,
           part: Range) -> None:  # fmt: skip
    with _each_tile(build, mix, lists, part, part.gate, inner, mix.inner) as f:
        f.emit(f"lines = pairs // {mix.chosen}")
        _accumulate(f, rows, (stacks.gate, stacks.up), part.gate, mix.width, mix.inner)
        _scaled(f, rows, [stacks.scale(f, k, f"expert * {mix.inner} + columns_in") for k in range(2)])
        act = parse(build.node.attributes["activation"])
        f.emit(f"made = {render(f, act, ['sums0'], ['float32'])} * sums1")


def _downs(build: CudaBuilder, mix: Mix, stacks: Stacks, rows: _Rows, lists: _Lists, parts: Handle,
           part: Range) -> None:  # fmt: skip
    with _each_tile(build, mix, lists, part, part.down, parts, mix.width) as f:
        f.emit("lines = pairs")
        _accumulate(f, rows, (stacks.down,), part.down, mix.inner, mix.width)
        _scaled(f, rows, [stacks.scale(f, 2, f"expert * {mix.width} + columns_in")])
        f.emit(f"made = sums0 * tl.load({f.pointer(lists.shares)} + pairs)[:, None]")


@contextmanager
def _each_tile(build: CudaBuilder, mix: Mix, lists: _Lists, part: Range, tile: Tile, result: Handle,
               width: int) -> Iterator[FunctionBuilder]:  # fmt: skip
    """A launch of a block for each tile of [pairs, width]; what is `made` inside becomes that of the result."""
    f = build.function(warps=tile.warps, stages=tile.stages)
    across = -(-width // tile.columns)
    f.wait()
    _begin(f, mix, lists, part, tile, across)
    with f.block(f"if number < total * {across}:"):
        _tile(f, mix, lists, tile, width)
        yield f
        place = f"{f.pointer(result)} + pairs.to(tl.int64)[:, None] * {width} + columns[None, :]"
        f.emit(f"tl.store({place}, {converted('made', 'float32', mix.kept)}, inside)")
    f.launch(_most_tiles(mix, part, tile, across))


def _most_tiles(mix: Mix, part: Range, tile: Tile, across: int) -> Extent:
    """Blocks for any choice: as many experts as can have so many rows, each with a tile that is not full."""
    full = 0 if part.high == tile.rows else tile.rows
    if isinstance(mix.pairs, int):
        return (min(mix.count, mix.pairs // part.low) + (mix.pairs // full if full else 0)) * across
    experts = f"min({mix.count},({mix.pairs})//{part.low})"
    return product((f"{experts}+({mix.pairs})//{full}" if full else experts, across))


def _begin(f: FunctionBuilder, mix: Mix, lists: _Lists, part: Range, tile: Tile, across: int) -> None:
    """The block's tile: in groups of rows, so that what they share stays in the cache."""
    high = part.high or 2**31 - 1
    f.emit(f"number = tl.program_id(0)\nexperts = tl.arange(0, {mix.size})")
    counts = f"{f.pointer(lists.counts)} + experts * {_APART}, experts < {mix.count}, other=0"
    f.emit(f"every = tl.load({counts})")
    f.emit(f"tiles = {f.core('mixture', 'tiles_of')}(every, {tile.rows}, {part.low}, {high})\ntotal = tl.sum(tiles, 0)")
    f.emit(f"first = number // {_GROUP * across} * {_GROUP}\nheight = tl.minimum(total - first, {_GROUP})")
    f.emit(f"within = number % {_GROUP * across}")


def _tile(f: FunctionBuilder, mix: Mix, lists: _Lists, tile: Tile, width: int) -> None:
    """Its expert, pairs and columns."""
    f.emit("row = first + within % height")
    sizes = f"{mix.count}, {mix.size}, {tile.rows}"
    f.emit(f"expert, begin, count = {f.core('mixture', 'tile_of')}(every, tiles, row, {sizes})")
    f.emit(f"rows = begin + tl.arange(0, {tile.rows})\nexists = rows < count")
    f.emit(f"pairs = tl.load({f.pointer(lists.pairs)} + expert * {f.extent(mix.rows)} + rows, exists, other=0)")
    f.emit(f"columns = within // height * {tile.columns} + tl.arange(0, {tile.columns})")
    exact = width % tile.columns == 0
    f.emit("columns_in = columns" if exact else f"columns_in = tl.minimum(columns, {width - 1})")
    f.emit(f"inside = exists[:, None] & (columns < {width})[None, :]")


def _accumulate(f: FunctionBuilder, rows: _Rows, stacks: Sequence[Handle], tile: Tile, depth: int, width: int) -> None:
    """`sums0`, … of the tile with each of the expert's matrices."""
    f.emit(f"depths = tl.arange(0, {tile.depth})")
    f.emit(f"left = {f.pointer(rows.rows)} + lines.to(tl.int64)[:, None] * {depth} + depths[None, :]")
    for part, stack in enumerate(stacks):
        own = f"{f.pointer(stack)} + expert.to(tl.int64) * {width * depth}"
        f.emit(f"right{part} = {own} + (columns_in * {depth})[None, :] + depths[:, None]")
        f.emit(f"sums{part} = tl.zeros(({tile.rows}, {tile.columns}), tl.float32)")
    narrow, dtype = rows.rows.dtype, stacks[0].dtype
    cast = "" if dtype == narrow else f".to({LANGUAGE[narrow]})"
    end = {"float32": ', input_precision="tf32x3"'}.get(narrow, "")
    end = f", max_num_imprecise_acc={tile.depth}" if narrow in LARGEST else end
    with f.block(f"for step in range(0, {-(-depth // tile.depth)}):"):
        a, b = "", ""
        if depth % tile.depth:
            rest = f"(depths < {depth} - step * {tile.depth})"
            a, b = f", {rest}[None, :], other=0.0", f", {rest}[:, None], other=0.0"
        f.emit(f"a = tl.load(left + step * {tile.depth}{a})")
        for part in range(len(stacks)):
            f.emit(f"b{part} = tl.load(right{part} + step * {tile.depth}{b}){cast}")
            f.emit(f"sums{part} = tl.dot(a, b{part}, sums{part}{end})")


def _scaled(f: FunctionBuilder, rows: _Rows, scales: Sequence[str]) -> None:
    """Sums of rounded rows and columns."""
    if rows.sizes is not None:
        f.emit(f"sizes = tl.load({f.pointer(rows.sizes)} + lines)[:, None]")
    for part, scale in enumerate(scales):
        if rows.sizes is not None or scale:
            f.emit(f"sums{part} = sums{part}{' * sizes' if rows.sizes is not None else ''}"
                   f"{f' * (1.0{scale})[None, :]' if scale else ''}")  # fmt: skip


def _sum(build: CudaBuilder, mix: Mix, lists: _Lists, parts: Handle) -> None:
    """A block is a row: its pairs' results in their order. Counters are left as they were."""
    f = _opened(build, mix.width, "row")
    f.emit(f"experts = tl.arange(0, {mix.size})")
    f.wait()
    f.emit(f"line = {f.pointer(parts)} + row.to(tl.int64) * {mix.chosen * mix.width} + columns")
    f.emit(f"sums = tl.zeros(({power_of_two(mix.width)},), tl.float32)")
    with f.block(f"for slot in tl.static_range(0, {mix.chosen}):"):
        f.emit(f"sums += tl.load(line + slot * {mix.width}, inside, other=0.0).to(tl.float32)")
    finish(f, build, ["sums"], f"row * {mix.width} + columns", "inside")
    f.emit(f"tl.store({f.pointer(lists.counts)} + experts * {_APART}, 0, (experts < {mix.count}) & (row == 0))")
    f.launch(mix.rows)

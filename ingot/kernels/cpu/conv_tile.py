"""Code for one row of a convolution: tiles of sums in registers, taps clipped at the map's borders.

What happens at a tap is the kernel's own: it brings the two functions of a `Method`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_epilogue import INLINE_LIMIT, Epilogue, block_values, finish, rendered_lines
from ingot.kernels.cpu.conv_shape import Direct, RowPlan, row_plan
from ingot.kernels.cpu.conv_window import Tile, runs, tap_range, unravel
from ingot.kernels.cpu.llvm import Index, Value, bytes_of, vector
from ingot.plan.extent import product

SECOND_CACHE = 2  # LLVM's word for how near a prefetch shall bring a line
FAR_BYTES = 1 << 18  # of weights, beyond which they do not stay in the second cache
Sums = Sequence[Value]
Clip = tuple[Index, Index] | None  # the taps of the row axis that a single column has, where known at run time only


@dataclass(frozen=True)
class Taps:
    """Where a kernel stands when it accumulates along the row: pointers at tap 0 of column 0."""

    tile: Tile
    clip: Clip
    block: Index
    x: Value
    weights: Value
    ahead: Value | None = None


@dataclass(frozen=True)
class Method:
    """What differs between kernels: the sums that a tile starts from, what the taps along a row add to them, and what
    becomes of them before the epilogue."""

    initial: Callable[[Site, Row, Tile, Clip], Sums]
    accumulate: Callable[[Site, Taps, Sums], Sums]
    complete: Callable[[Site, Row, Tile, Clip, Sums], Sums] = lambda site, row, tile, clip, sums: sums


@dataclass(frozen=True)
class Site:
    """A kernel function under construction, with everything that is the same for all its items."""

    f: PhaseFunction
    shape: Direct
    row: RowPlan
    x: Handle
    weights: Handle
    epilogue: Epilogue
    method: Method
    aside: int | None  # scratch for a tile's sums where the epilogue is too long to be written out for each of them
    passes_shift: int | None = None  # 2 to this: how often a panel of far weights is passed, at least

    def bytes(self, axis: int) -> Index:
        """From an input position to the next along spatial axis `axis`; 0 is the first one."""
        return self.f.extent(self.shape.steps[axis + 1])

    @property
    def block_bytes(self) -> Index:
        """From an input channel block to the next."""
        return self.f.extent(self.shape.steps[0])

    @property
    def type(self) -> str:
        """Vector type of the sums."""
        return vector(self.shape.accumulator, self.shape.lanes)


@dataclass(frozen=True)
class Row:
    """One output row of one panel: pointers, and the clipped taps of the outer axes."""

    x: Value  # block 0, the input row that tap 0 of every outer axis reads, column 0
    weights: Value
    panel: Index
    taps: tuple[tuple[Index, Index], ...]
    block: Index  # first output channel block, counted over groups
    blocks: Index  # output blocks of this panel that exist
    element: Index  # output element of column 0 in the first block
    area: Index  # output elements from a channel block to the next
    ahead: Value | None = None  # plus a weight's address >> `passes_shift`: what of the next panel to fetch meanwhile


Order = tuple[Literal["image", "panel", "row"], Literal["image", "panel", "row"], Literal["image", "panel", "row"]]


def emit_phase(build: KernelBuilder, shape: Direct, x: Handle, weights: Handle, epilogue: Epilogue, method: Method,
               order: Order) -> None:  # fmt: skip
    """A phase whose work items are the runs of tiles of all rows, panels and images; `order` is from slow to fast."""
    plan = row_plan(shape)
    loops = {"image": (shape.batch,), "panel": (shape.panels,), "row": (*(a.output for a in shape.outer), plan.items)}
    sizes = [size for name in order for size in loops[name]]
    long = rendered_lines(epilogue) * shape.columns * shape.vectors > INLINE_LIMIT
    aside = build.scratch(shape.columns * bytes_of(vector(shape.accumulator, shape.lanes))) if long else None
    passes = product((shape.batch, *loops["row"]))
    far = order[0] == "panel" and isinstance(passes, int) and shape.panels * shape.panel_bytes > FAR_BYTES
    shift = (passes - 1).bit_length() if far and isinstance(passes, int) else None

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        site = Site(f, shape, plan, x, weights, epilogue, method, aside, shift)

        def item(index: Value) -> None:
            numbers = iter(unravel(f, index, sizes))
            place = {name: [next(numbers) for _ in loops[name]] for name in order}
            *position, run = place["row"]
            passed = f.remainder(index, f.extent(passes)) if shift is not None else None
            emit_row(site, place["image"][0], place["panel"][0], position, run, passed)

        f.loop(begin, end, item)

    build.phase(product(sizes), body)


def emit_row(
    site: Site, image: Index, panel: Index, position: Sequence[Index], run: Index, passed: Index | None
) -> None:
    """Run `run` of a row's tiles; the first one brings what lies left of them, the last one what lies right. `passed`:
    how often this panel of weights was passed before, where each pass fetches its share of the next one."""
    f, plan, shape = site.f, site.row, site.shape
    row = _row(site, image, panel, position)
    if passed is not None:
        row = replace(row, ahead=_ahead(site, row, f.index(passed)))
    edges = _spelled_edges if plan.spelled else _counted_edges
    left, right = edges(site, row)
    _guarded(f, plan, run, 0, left)
    count = f.extent(plan.count)
    begin = run * plan.group
    end = f.minimum(begin + plan.group, count)
    whole = Tile(0, shape.columns, (range(shape.columns),) * shape.row.kernel)

    def tile(index: Index) -> None:
        emit_tile(site, row, whole, index * shape.columns + plan.first)

    if count == 1 or (isinstance(begin, int) and isinstance(end, int) and end - begin == 1):
        tile(0)
    elif count != 0:
        f.loop(begin, end, tile)
    _guarded(f, plan, run, f.extent(plan.items) - 1, right)


def _guarded(f: PhaseFunction, plan: RowPlan, run: Index, wanted: Index, body: Callable[[], None] | None) -> None:
    if body is None:
        return
    if plan.items == 1:
        body()
    else:
        f.when(f.compare("eq", f.index(run), wanted), body)


def _spelled_edges(site: Site, row: Row) -> tuple[Callable[[], None] | None, Callable[[], None] | None]:
    def all_of(tiles: Sequence[Tile]) -> Callable[[], None] | None:
        def emit() -> None:
            for tile in tiles:
                emit_tile(site, row, tile, tile.first)

        return emit if tiles else None

    return all_of(site.row.left), all_of(site.row.right)


def _counted_edges(site: Site, row: Row) -> tuple[Callable[[], None] | None, Callable[[], None] | None]:
    """Single columns before and after the whole tiles, with the taps of the row axis clipped at run time."""
    f, plan, shape = site.f, site.row, site.shape

    def column(index: Value) -> None:
        one = Tile(0, 1, (range(1),) * shape.row.kernel)
        emit_tile(site, row, one, index, tap_range(f, shape.row, index))

    def between(begin: Index, end: Index) -> Callable[[], None]:
        return lambda: f.loop(begin, end, column)  # type: ignore[return-value]

    output = f.extent(shape.row.output)
    after = f.extent(plan.count) * shape.columns + plan.first
    left = between(0, f.minimum(plan.first, output)) if plan.first else None
    return left, between(after, output)


def _row(site: Site, image: Index, panel: Index, position: Sequence[Index]) -> Row:
    f, shape = site.f, site.shape
    per_group, blocks = shape.panels_per_group, shape.output_blocks
    group, within = f.divide(panel, per_group), f.remainder(panel, per_group)
    block = group * blocks + within * shape.vectors if shape.groups > 1 else panel * shape.vectors
    exist = shape.vectors if blocks % shape.vectors == 0 else f.minimum(blocks - within * shape.vectors, shape.vectors)
    channels = image * (shape.input_blocks * shape.groups) + (group * shape.input_blocks if shape.groups > 1 else 0)
    x = f.at(f.pointer(site.x), channels * site.block_bytes)
    for number, (place, axis) in enumerate(zip(position, shape.outer, strict=True)):
        x = f.at(x, (place * axis.stride - axis.begin) * site.bytes(number))
    area = f.extent(shape.output_area) * shape.lanes
    line: Index = image * (shape.groups * blocks) + block
    for place, axis in zip(position, shape.outer, strict=True):
        line = line * f.extent(axis.extent) + (place * axis.spread + axis.phase)
    element = (line * f.extent(shape.row.extent) + shape.row.phase) * shape.lanes
    taps = tuple(tap_range(f, axis, place) for axis, place in zip(shape.outer, position, strict=True))
    return Row(x, f.at(f.pointer(site.weights), panel * shape.panel_bytes), panel, taps, block, exist, element, area)


def _ahead(site: Site, row: Row, passed: Value) -> Value:
    """next panel + passed · share − (panel's address >> shift)"""
    f, shift = site.f, site.passes_shift
    assert shift is not None
    here = f.value("i64", f"ptrtoint ptr {row.weights.text} to i64")
    share = passed * (site.shape.panel_bytes >> shift) - f.index(f.binary("lshr", here, shift))
    return opaque(f, f.at(row.weights, share + site.shape.panel_bytes))


def fetch_ahead(f: PhaseFunction, taps: Taps, site: Site, weights: Value, lines: int) -> None:
    """With `lines` lines of weights, their share of the next panel."""
    assert taps.ahead is not None and site.passes_shift is not None
    here = f.value("i64", f"ptrtoint ptr {weights.text} to i64")
    far = f.at(taps.ahead, f.binary("lshr", here, site.passes_shift))
    for line in range(max(lines >> site.passes_shift, 1)):
        f.prefetch(far, line * 64, SECOND_CACHE)


def emit_tile(site: Site, row: Row, tile: Tile, column: Index, clip: Clip = None) -> None:
    """Sums of one tile, then its epilogue; `clip` bounds the taps of a single column."""
    f, shape = site.f, site.shape
    start = f.at(row.x, (column * shape.row.stride - shape.row.begin) * site.bytes(len(shape.outer)))

    def block(index: Index, x: Value, weights: Value, *sums: Value) -> Sums:
        return _outer_taps(site, row, Taps(tile, clip, index, x, weights, row.ahead), 0, sums)

    step, sums = shape.panel_bytes // shape.input_blocks, site.method.initial(site, row, tile, clip)
    pointers = opaque(f, start), opaque(f, row.weights)
    sums = walk(f, (0, shape.input_blocks), block, pointers, (site.block_bytes, step), sums)
    _store(site, row, tile, column, site.method.complete(site, row, tile, clip, sums))


def zeros(site: Site, row: Row, tile: Tile, clip: Clip) -> Sums:
    """Sums that start from nothing."""
    return [site.f.constant(site.type, 0)] * (tile.width * site.shape.vectors)


def opaque(f: PhaseFunction, pointer: Value) -> Value:
    """The same pointer, its derivation hidden from LLVM: loop strength reduction would otherwise try to rewrite every
    address in terms of all the divisions behind it, which takes longer than the rest of the compilation."""
    return f.value("ptr", f'call ptr asm "", "=r,0"(ptr {pointer.text})')


def walk(f: PhaseFunction, bounds: tuple[Index, Index], body: Callable[..., Sums], pointers: tuple[Value, Value],
         steps: tuple[Index, Index], sums: Sums, by: int = 1) -> Sums:  # fmt: skip
    """A loop, or its only iteration; both pointers (of x and of the weights) move along."""
    begin, end = bounds
    start = [f.at(pointer, begin * step) for pointer, step in zip(pointers, steps, strict=True)]
    if isinstance(begin, int) and isinstance(end, int) and end - begin == by:
        return body(begin, *start, *sums)

    def iteration(index: Value, x: Value, weights: Value, *sums: Value) -> Sums:
        following = f.at(x, steps[0] * by), f.at(weights, steps[1] * by)
        return [*following, *body(index, x, weights, *sums)]

    return f.loop(begin, end, iteration, (*start, *sums), step=by)[2:]


def _outer_taps(site: Site, row: Row, taps: Taps, axis: int, sums: Sums) -> Sums:
    """The taps of axis `axis` and those after it."""
    shape = site.shape
    if axis == len(shape.outer):
        return site.method.accumulate(site, taps, sums)

    def tap(index: Index, x: Value, weights: Value, *sums: Value) -> Sums:
        return _outer_taps(site, row, replace(taps, x=x, weights=weights), axis + 1, sums)

    steps = shape.outer[axis].dilation * site.bytes(axis), shape.tap_bytes(axis)
    return walk(site.f, row.taps[axis], tap, (taps.x, taps.weights), steps, sums)


def row_taps(site: Site, taps: Taps, sums: Sums, at_tap: Callable[[range, Value, Value, Sums], Sums]) -> Sums:
    """`at_tap(columns, x, weights, sums)` for every tap along the row: loops over those that reach the same columns."""
    shape = site.shape
    steps = shape.row.dilation * site.bytes(len(shape.outer)), shape.tap_bytes(len(shape.outer))
    spelled = [(ends, taps.tile.taps[ends[0]]) for ends in runs(taps.tile.taps)]
    for bounds, columns in [(taps.clip, range(1))] if taps.clip else spelled:

        def tap(index: Index, x: Value, weights: Value, *sums: Value, columns: range = columns) -> Sums:
            return at_tap(columns, x, weights, sums)

        if columns:
            sums = walk(site.f, bounds, tap, (taps.x, taps.weights), steps, sums)
    return sums


def _store(site: Site, row: Row, tile: Tile, column: Index, sums: Sums) -> None:
    """The epilogue of a tile, vector by vector of channels."""
    f, shape = site.f, site.shape
    for v in range(shape.vectors):
        def store(v: int = v) -> None:
            values = block_values(f, site.epilogue, row.block + v)
            element = row.element + v * row.area + column * (shape.row.spread * shape.lanes)
            own = sums[v :: shape.vectors]
            (_store_unrolled if site.aside is None else _store_looped)(site, values, element, own)

        if isinstance(row.blocks, int) or v == 0:
            store()
        else:
            f.when(f.compare("sgt", row.blocks, v), store)


def _store_unrolled(site: Site, values: Sequence[Value | None], element: Index, sums: Sums) -> None:
    for column, total in enumerate(sums):
        finish(site.f, site.epilogue, total, values, element, column * site.shape.row.spread * site.shape.lanes)


def _store_looped(site: Site, values: Sequence[Value | None], element: Index, sums: Sums) -> None:
    """A long epilogue runs in a loop over sums put aside."""
    f, lanes, size = site.f, site.shape.lanes, bytes_of(site.type)
    aside = f.at(f.scratch, site.aside or 0)
    for column, total in enumerate(sums):
        f.store(total, aside, column * size)

    def column_body(column: Value) -> None:
        total = f.load(site.type, aside, column * size)
        finish(f, site.epilogue, total, values, element + column * (site.shape.row.spread * lanes))

    f.loop(0, len(sums), column_body)

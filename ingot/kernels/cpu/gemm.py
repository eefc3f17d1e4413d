"""The matrix product all of Linear, MatMul and Attention are made of.

A tile of `rows` × `vectors` sums stays in registers while K goes by: each step loads `vectors` packed weights and
broadcasts one value of every row. K is cut into blocks whose panel of weights stays in the first-level cache while all
tiles of a work item pass over it (Goto, van de Geijn: "Anatomy of high-performance matrix multiplication", 2008);
between blocks the sums wait in scratch. The last tile overlaps the one before it rather than being smaller, so that one
tile serves any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ingot.kernels.cpu.build import PhaseFunction
from ingot.kernels.cpu.gemm_dot import Dot
from ingot.kernels.cpu.llvm import Function, Index, Value
from ingot.plan.extent import Extent, ceil_div

LINE = 64
SECOND_CACHE = 2  # LLVM's word for how near a prefetch shall bring a line
NEAR_BYTES = 4096  # how far ahead to fetch weights that a single tile uses
SMALL_ROWS = (4, 1)  # tiles for run-time row counts below the main tile's
UNROLLED_PRODUCTS = 64


@dataclass(frozen=True)
class Tile:
    """Sums kept in registers: `rows` × `vectors`."""

    rows: int
    vectors: int

    @property
    def unroll(self) -> int:
        """Steps of K per iteration: enough to hide the loop, few enough to compile fast."""
        return next((u for u in (8, 4) if u * self.rows * self.vectors <= UNROLLED_PRODUCTS), 2)


@dataclass(frozen=True)
class Left:
    """Rows to multiply: address of row 0 at step 0, bytes from row to row and from step to step."""

    pointer: Value
    row: Index
    step: Index

    def moved(self, f: Function, rows: Index, steps: Index) -> Left:
        """The same from another row and step on."""
        offset = f.index(rows) * self.row + f.index(steps) * self.step
        return replace(self, pointer=f.at(self.pointer, offset))


@dataclass(frozen=True)
class Gemm:
    """A product of `rows` by `columns` over `steps` groups of K; an item is `run` tiles of one panel of `vectors`."""

    dot: Dot
    tile: Tile
    rows: Extent
    columns: Extent
    steps: Extent
    depth: int
    run: int
    far: bool = False  # whether packed weights come from memory: each tile then fetches its share of the next block

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.tile.vectors * self.dot.lanes

    @property
    def panels(self) -> Extent:
        """Panels of columns."""
        return ceil_div(self.columns, self.width)

    @property
    def groups(self) -> Extent:
        """Work items along the rows."""
        return ceil_div(self.rows, self.run * self.tile.rows)

    @property
    def step_bytes(self) -> int:
        """Packed weights of one step of a panel."""
        return self.tile.vectors * self.dot.right_bytes

    @property
    def panel_bytes(self) -> Extent:
        """Packed weights of a panel."""
        return self.steps * self.step_bytes if isinstance(self.steps, int) else f"({self.steps})*{self.step_bytes}"

    def bytes_ahead(self, tile: Tile) -> int:
        """How much of the next block a tile fetches per iteration, so that the tiles of an item fetch all of it."""
        return -(-tile.unroll * self.step_bytes // self.run) if self.far else 0

    @property
    def one_block(self) -> bool:
        """Whether K needs no cutting."""
        return isinstance(self.steps, int) and self.steps <= self.depth

    def bytes_of(self, tile: Tile) -> int:
        """Scratch that a tile's sums take."""
        return tile.rows * tile.vectors * self.dot.sum_bytes

    @property
    def slot_bytes(self) -> int:
        """Scratch for the sums of all tiles of an item, small tiles included."""
        rows = max(self.run * self.tile.rows, self.tile.rows + SMALL_ROWS[0])
        return self.bytes_of(replace(self.tile, rows=rows))

    def tiles(self) -> list[Tile]:
        """Tiles to generate, largest first: with static rows the one that fits, otherwise small ones as well."""
        rows = self.tile.rows
        if isinstance(self.rows, int):
            return [replace(self.tile, rows=max(min(rows, self.rows), 1))]
        return [replace(self.tile, rows=r) for r in (rows, *(s for s in SMALL_ROWS if s < rows))]


Sums = list[Value]
Start = Callable[[PhaseFunction, Tile, Value], Sums]
Finish = Callable[[PhaseFunction, Tile, Value, "Sums | None", Value], None]
"""(f, tile, first row, sums or None where they are in scratch, address of the tile's scratch)"""
Panel = Callable[[PhaseFunction, Index, Index], Value]
"""(f, first step, steps) -> address of a block's packed weights"""


def zeros(f: PhaseFunction, dot: Dot, tile: Tile) -> Sums:
    """Sums of nothing."""
    return [f.constant(dot.sums, 0)] * (tile.rows * tile.vectors)


def multiply(f: Function, gemm: Gemm, tile: Tile, left: Left, right: Value, steps: Index,
             sums: Sequence[Value], ahead: Value | None = None) -> Sums:  # fmt: skip
    """Sums plus the products of `steps` steps from the given addresses on; fetches `gemm.bytes_ahead` from `ahead`."""
    unroll = tile.unroll
    whole = f.divide(steps, unroll)
    bases = _row_bases(f, left, tile.rows)

    def advance(count: int) -> Callable[..., list[Value]]:
        share = gemm.bytes_ahead(tile) if ahead is not None and count == unroll else 0

        def body(_: Value, *state: Value) -> list[Value]:
            inner, (weights, far), pointers = list(state[: len(sums)]), state[len(sums) :][:2], state[len(sums) + 2 :]
            for place in range(0, share, LINE):
                f.prefetch(far, place, SECOND_CACHE)
            for u in range(count):
                _keep_loads_below(f)
                inner = _step(f, gemm, tile, _row_places(f, pointers, left, tile.rows, u), weights, u, inner)
            moved = [f.at(pointer, left.step * count) for pointer in pointers]
            return [*inner, f.at(weights, gemm.step_bytes * count), f.at(far, share), *moved]

        return body

    state = f.loop(0, whole, advance(unroll), [*sums, right, right if ahead is None else ahead, *bases])
    rest = f.remainder(steps, unroll)
    if rest != 0 and not (isinstance(gemm.steps, int) and gemm.steps % unroll == gemm.depth % unroll == 0):
        state = f.loop(0, rest, advance(1), state)
    return list(state[: len(sums)])


def _keep_loads_below(f: Function) -> None:
    """No load moves up past this point: weights of a later step would take registers that the sums need."""
    f.emit('call void asm sideeffect "", "~{memory}"()')


def _step(f: Function, gemm: Gemm, tile: Tile, places: Sequence[tuple[Value, Index]], weights: Value, number: int,
          sums: Sequence[Value]) -> Sums:  # fmt: skip
    dot, vectors = gemm.dot, tile.vectors
    offset = number * gemm.step_bytes
    panel = [dot.weights(f, weights, offset + j * dot.right_bytes) for j in range(vectors)]
    out = list(sums)
    for r, (pointer, place) in enumerate(places):
        value = dot.broadcast(f, pointer, place)
        for j in range(vectors):
            out[r * vectors + j] = dot.product(f, value, panel[j], out[r * vectors + j])
    return out


_ROWS_PER_BASE = 3  # rows at 0, 1 and 2 strides from a base register: what an x86 address can express


def _row_bases(f: Function, left: Left, rows: int) -> list[Value]:
    """Addresses to keep in registers: one where the stride is known, otherwise one for every few rows."""
    if isinstance(left.row, int):
        return [left.pointer]
    return [f.at(left.pointer, left.row * r) for r in range(0, rows, _ROWS_PER_BASE)]


def _row_places(f: Function, bases: Sequence[Value], left: Left, rows: int, step: int) -> list[tuple[Value, Index]]:
    """(pointer, byte offset) of each row at a step."""
    forward = left.step * step
    if isinstance(left.row, int):
        base = bases[0] if isinstance(forward, int) else f.at(bases[0], forward)
        return [(base, r * left.row + (forward if isinstance(forward, int) else 0)) for r in range(rows)]
    places: list[tuple[Value, Index]] = []
    for r in range(rows):
        base = f.at(bases[r // _ROWS_PER_BASE], left.row * (r % _ROWS_PER_BASE))
        places.append((base, forward))
    return places


def emit_item(
    f: PhaseFunction, gemm: Gemm, left: Left, panel: Panel, first: Value, last: Index, slots: Value, start: Start,
    finish: Finish,
) -> None:  # fmt: skip
    """Tiles that cover rows [first, last): `left` at row 0, `slots` is scratch for their sums."""
    rows, steps = f.extent(gemm.rows), f.extent(gemm.steps)

    def block(begin: Index, count: Index, place: tuple[Value, Value] | None) -> None:
        right = panel(f, begin, count)

        def tiles(tile: Tile) -> None:
            def one(t: Value) -> None:
                row = f.index(f.minimum(first + t * tile.rows, f.index(rows) - tile.rows))
                slot = f.at(slots, t * gemm.bytes_of(tile))
                far = _share_ahead(f, gemm, tile, right, count, t)
                _emit_tile(f, gemm, tile, left.moved(f, row, begin), right, count, row, slot, far, place, start, finish)

            f.loop(0, f.divide(f.index(last) - first + (tile.rows - 1), tile.rows), one)

        for_rows(f, gemm, rows, tiles)

    if gemm.one_block:
        block(0, steps, None)
        return
    blocks = f.maximum(f.divide(steps + (gemm.depth - 1), gemm.depth), 1)
    even = isinstance(steps, int) and steps % gemm.depth == 0

    def numbered(number: Value) -> None:
        begin = number * gemm.depth
        count = gemm.depth if even else f.minimum(gemm.depth, f.index(steps) - begin)
        block(begin, count, (f.compare("eq", number, 0), f.compare("eq", number, f.index(blocks) - 1)))

    f.loop(0, blocks, numbered)


def _share_ahead(f: Function, gemm: Gemm, tile: Tile, right: Value, count: Index, number: Value) -> Value | None:
    """Where the part begins of the block behind the one at `right` that tile `number` fetches."""
    if not gemm.far:
        return None
    if gemm.run == 1:
        return f.at(right, NEAR_BYTES)
    share = f.index(f.divide(count, tile.unroll)) * gemm.bytes_ahead(tile)
    return f.at(right, f.index(count) * gemm.step_bytes + number * share)


def _emit_tile(f: PhaseFunction, gemm: Gemm, tile: Tile, left: Left, right: Value, count: Index, row: Value,
               slot: Value, far: Value | None, place: tuple[Value, Value] | None, start: Start,
               finish: Finish) -> None:  # fmt: skip
    """One tile over one block of K; `place` says whether it is the first and whether it is the last of several."""
    if place is None:
        finish(f, tile, row, multiply(f, gemm, tile, left, right, count, start(f, tile, row), far), slot)
        return
    first, last = place
    f.when(first, lambda: store_sums(f, gemm, tile, slot, start(f, tile, row)))
    sums = multiply(f, gemm, tile, left, right, count, load_sums(f, gemm, tile, slot), far)
    store_sums(f, gemm, tile, slot, sums)
    f.when(last, lambda: finish(f, tile, row, None, slot))


def for_rows(f: PhaseFunction, gemm: Gemm, rows: Index, emit: Callable[[Tile], None]) -> None:
    """Emit for the largest tile that has no more rows than there are."""

    def choose(tiles: Sequence[Tile]) -> None:
        if len(tiles) == 1:
            emit(tiles[0])
        else:
            f.when(f.compare("sge", f.index(rows), tiles[0].rows), lambda: emit(tiles[0]), lambda: choose(tiles[1:]))

    choose(gemm.tiles())


def load_sums(f: Function, gemm: Gemm, tile: Tile, slot: Value) -> Sums:
    """A tile's sums from scratch."""
    size = gemm.dot.sum_bytes
    return [f.load(gemm.dot.sums, slot, i * size, align=LINE // 2) for i in range(tile.rows * tile.vectors)]


def store_sums(f: Function, gemm: Gemm, tile: Tile, slot: Value, sums: Sequence[Value]) -> None:
    """A tile's sums to scratch."""
    for i, value in enumerate(sums):
        f.store(value, slot, i * gemm.dot.sum_bytes, align=LINE // 2)

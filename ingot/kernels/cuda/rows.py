"""Tiles of rows by columns: what is reduced lies along the columns, wherever it lies in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ingot.kernels.cuda.axes import Axis, collapse, offset, unravel
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.plan.extent import Extent, ceil_div, product

WHOLE = 8192  # elements of a row that is held in registers at once
_PER_WARP = 256
_MANY = 4096  # rows from which on a warp has twice as many elements: fewer waits for each other, 14 µs instead of 15.7


@dataclass(frozen=True)
class Rows:
    """`kept` axes number the rows, `reduced` ones the columns; strides per operand, the first of which is x."""

    kept: tuple[Axis, ...]
    reduced: tuple[Axis, ...]

    @property
    def count(self) -> Extent:
        """How many rows there are."""
        return product(a.size for a in self.kept)

    @property
    def length(self) -> Extent:
        """How many columns a row has."""
        return product(a.size for a in self.reduced)

    @property
    def contiguous(self) -> bool:
        """Whether x's columns lie side by side."""
        return not self.kept or self.kept[-1].strides[0] != 1 or self.kept[-1].size == 1


def rows_of(kept: Sequence[Axis], reduced: Sequence[Axis]) -> Rows:
    """Both lists collapsed; axes are given in memory order of x. Where nothing is kept there is one row."""
    still = Axis(1, (0,) * len((*kept, *reduced)[0].strides)) if kept or reduced else Axis(1, ())
    return Rows(tuple(collapse(kept or [still])), tuple(collapse(reduced or [still])))


@dataclass(frozen=True)
class Shape:
    """Rows and columns of a tile; `whole`: a tile's columns are all there are; `share`: elements a warp."""

    rows: int
    columns: int
    whole: bool
    share: int = _PER_WARP

    @property
    def warps(self) -> int:
        """A few elements for each thread."""
        return min(max(power_of_two(self.rows * self.columns // self.share), 1), 16)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


def shape_for(rows: Rows) -> Shape:
    """A tile for the rows."""
    length = rows.length
    if not rows.contiguous:
        columns = min(power_of_two(length), 64) if isinstance(length, int) else 32
        across = rows.kept[-1].size
        return Shape(min(power_of_two(across), 64) if isinstance(across, int) else 32, columns, length == columns)
    if not isinstance(length, int) or length > WHOLE:
        return Shape(1, 2048, False)
    columns = power_of_two(length)
    many = isinstance(rows.count, int) and rows.count >= _MANY
    return Shape(max(1024 // columns, 1) if rows.count != 1 else 1, columns, True, _PER_WARP * (1 + many))


@dataclass(eq=False)
class Tile:
    """A function over tiles being written: `with tile.columns(): …` for each pass over the columns."""

    f: FunctionBuilder
    rows: Rows
    shape: Shape
    places: list[str] = field(default_factory=list)
    _columns: list[str] = field(default_factory=list)

    @property
    def mask(self) -> str:
        """Of the tile's elements that exist, in the pass being written."""
        return "inside"

    @contextmanager
    def columns(self) -> Iterator[None]:
        """A pass over the columns: a loop, unless the tile holds them all."""
        if self.shape.whole:
            if not self._columns:
                self._name_columns("0")
            yield
            return
        with self.f.block(f"for start in range(0, {self.f.extent(self.rows.length)}, {self.shape.columns}):"):
            self._name_columns("start")
            yield

    def _name_columns(self, start: str) -> None:
        f = self.f
        f.emit(f"column = {start} + tl.arange(0, {self.shape.columns})[None, :]")
        f.emit(f"inside = (row < {f.extent(self.rows.count)}) & (column < {f.extent(self.rows.length)})")
        self._columns = unravel(f, "column", [a.size for a in self.rows.reduced])

    def row_offset(self, operand: int) -> str:
        """Text of the operand's place for a row."""
        return offset(self.f, self.places, [a.strides[operand] for a in self.rows.kept])

    def offset(self, operand: int) -> str:
        """Text of the operand's place for an element."""
        columns = offset(self.f, self._columns, [a.strides[operand] for a in self.rows.reduced])
        return f"{self.row_offset(operand)} + {columns}"

    def varies(self, operand: int) -> tuple[bool, bool]:
        """Whether the operand differs from row to row, and from column to column."""
        return (any(a.strides[operand] != 0 for a in self.rows.kept),
                any(a.strides[operand] != 0 for a in self.rows.reduced))  # fmt: skip

    def load(self, handle: Handle, operand: int, other: str = "") -> str:
        """A variable with the operand's elements for the tile: as much of it as varies."""
        down, across = self.varies(operand)
        existing = {(True, True): "inside", (True, False): f"row < {self.f.extent(self.rows.count)}",
                    (False, True): f"column < {self.f.extent(self.rows.length)}"}  # fmt: skip
        mask = f", {existing[down, across]}" if (down, across) in existing else ""
        fill = f", other={other}" if other and mask else ""
        return self.f.let(f"tl.load({self.f.pointer(handle)} + {self.offset(operand)}{mask}{fill})")

    def load_row(self, handle: Handle, operand: int) -> str:
        """A variable with one element per row."""
        mask = f", row < {self.f.extent(self.rows.count)}" if self.varies(operand)[0] else ""
        return self.f.let(f"tl.load({self.f.pointer(handle)} + {self.row_offset(operand)}{mask})")

    def launch(self) -> None:
        """One block per tile of rows."""
        self.f.launch(ceil_div(self.rows.count, self.shape.rows))


def open_tile(build: CudaBuilder, rows: Rows, shape: Shape | None = None) -> Tile:
    """A function that has found its rows."""
    shape = shape or shape_for(rows)
    f = build.function(warps=shape.warps, stages=2)
    tile = Tile(f, rows, shape)
    f.emit(f"row = tl.program_id(0) * {shape.rows} + tl.arange(0, {shape.rows})[:, None]")
    tile.places = unravel(f, "row", [a.size for a in rows.kept])
    return tile

"""Windows that slide over spatial axes: which of their taps lie inside the input, and how a row splits into tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ingot.kernels.cpu.build import PhaseFunction
from ingot.kernels.cpu.llvm import Index
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product


@dataclass(frozen=True)
class Axis:
    """One spatial axis: tap k of output position o reads input position o * stride - begin + k * dilation.

    Position o is element o * spread + phase of an output axis of `span` elements (its own length unless given)."""

    input: Extent
    output: Extent
    kernel: int
    stride: int = 1
    dilation: int = 1
    begin: int = 0
    end: int = 0
    spread: int = 1
    phase: int = 0
    span: Extent | None = None

    @property
    def extent(self) -> Extent:
        """Elements of the output along this axis."""
        return self.output if self.span is None else self.span

    @property
    def clipped_before(self) -> bool:
        """Whether a window may start before the input."""
        return self.begin > 0

    @property
    def clipped_after(self) -> bool:
        """Whether a window may end after the input."""
        if isinstance(self.input, int) and isinstance(self.output, int):
            return self.origin(self.output - 1) + (self.kernel - 1) * self.dilation >= self.input
        return self.end > 0

    @property
    def pointwise(self) -> bool:
        """Whether output position o reads input position o and nothing else."""
        return self.kernel == 1 and self.stride == 1 and self.input == self.output and not (self.begin or self.end)

    def origin(self, position: int) -> int:
        """Input position of tap 0 (before the input where negative)."""
        return position * self.stride - self.begin

    def columns(self, tap: int, first: int, width: int) -> range:
        """Of `width` output positions from `first` on those whose tap lies inside the (static) input, from 0."""
        assert isinstance(self.input, int)
        inside = [c for c in range(width) if 0 <= self.origin(first + c) + tap * self.dilation < self.input]
        return range(inside[0], inside[-1] + 1) if inside else range(0)


def conv_axes(node: Node, kernel: Sequence[int]) -> tuple[Axis, ...]:
    """The spatial axes of a Conv or Pool node."""
    names = ("strides", "dilations", "pads")
    strides, dilations, pads = (node.attributes[name] for name in names)
    rank = len(kernel)
    ports = node.input(0).shape[2:], node.output.shape[2:]
    return tuple(map(Axis, *ports, kernel, strides, dilations, pads[:rank], pads[rank:]))


def flattened(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Axes that a 1×1 window does not mix become one."""
    if not all(axis.pointwise for axis in axes):
        return axes
    size = product(axis.output for axis in axes)
    return (Axis(size, size, 1),)


def tap_range(f: PhaseFunction, axis: Axis, position: Index) -> tuple[Index, Index]:
    """(first, last + 1) tap inside the input for an output position."""
    origin = position * axis.stride - axis.begin
    first: Index = 0
    last: Index = axis.kernel
    if axis.clipped_before:
        first = f.divide(f.maximum((axis.dilation - 1) - origin, 0), axis.dilation)
    if axis.clipped_after:
        inside = f.maximum(f.extent(axis.input) - origin + (axis.dilation - 1), 0)
        last = f.minimum(f.divide(inside, axis.dilation), axis.kernel)
    return first, last


@dataclass(frozen=True)
class Tile:
    """A run of output columns; `taps[k]` are those, counted from `first`, whose tap k lies inside the input."""

    first: int
    width: int
    taps: tuple[range, ...]

    @property
    def whole(self) -> bool:
        """Whether no tap leaves the input."""
        return all(len(columns) == self.width for columns in self.taps)


def tiles_of(axis: Axis, width: int) -> list[Tile]:
    """A static row cut into tiles of `width` columns, the last one perhaps narrower."""
    assert isinstance(axis.output, int)
    starts = range(0, axis.output, width)
    widths = [min(width, axis.output - start) for start in starts]
    return [
        Tile(start, size, tuple(axis.columns(tap, start, size) for tap in range(axis.kernel)))
        for start, size in zip(starts, widths, strict=True)
    ]


def balanced(columns: int, limit: int) -> int:
    """Width of equal tiles, at most `limit` wide, that cover `columns` with as few tiles as possible."""
    count = -(-columns // limit)
    return max(-(-columns // count), 1) if count else 1


def unravel(f: PhaseFunction, index: Index, sizes: Sequence[Extent]) -> tuple[Index, ...]:
    """Row-major coordinates of a flat index; the first one is not reduced."""
    coordinates: list[Index] = []
    for size in reversed(sizes[1:]):
        coordinates.append(f.remainder(index, f.extent(size)))
        index = f.divide(index, f.extent(size))
    return (index, *reversed(coordinates))


def runs(columns: Sequence[range]) -> Iterator[tuple[int, int]]:
    """Maximal [first, last) stretches of equal entries."""
    first = 0
    for position in range(1, len(columns) + 1):
        if position == len(columns) or columns[position] != columns[first]:
            yield first, position
            first = position

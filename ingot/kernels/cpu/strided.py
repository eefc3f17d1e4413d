"""Strided copies as data: what every operator that only moves elements becomes, and the algebra that simplifies it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from ingot.dtypes import HOST_ONLY, size_of
from ingot.kernels import PLAIN, Ports
from ingot.kernels.cpu.build import Handle, KernelBuilder
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.layout import physical_shape, to_blocked
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, add, evaluate, product, symbols_of

GUESS = 48  # what a symbol is taken for where only the order of magnitude matters
WIDEST = 8  # bytes of the largest element a register lane takes
BYTES_PER_MICROSECOND = 10_000


@dataclass(frozen=True)
class Stride:
    """A product of a number and symbolic extents, in elements; equal products compare equal."""

    number: int = 1
    factors: tuple[str, ...] = ()

    def times(self, extent: Extent) -> Stride:
        """The stride `extent` times as long."""
        if self.number == 0 or extent == 0:
            return STILL
        if isinstance(extent, int):
            return Stride(self.number * extent, self.factors)
        return Stride(self.number, tuple(sorted((*self.factors, extent))))

    @property
    def extent(self) -> Extent:
        """As an expression."""
        return product((self.number, *self.factors)) if self.number else 0


UNIT, STILL = Stride(1), Stride(0)


@dataclass(frozen=True)
class Axis:
    """`extent` steps of a loop, each of which moves the source by one stride and the target by another."""

    extent: Extent
    source: Stride
    target: Stride

    @property
    def contiguous(self) -> bool:
        """Whether both sides advance element by element."""
        return self.source == UNIT and self.target == UNIT


@dataclass(frozen=True)
class Move:
    """target[target_offset + Σ iₖ·axesₖ.target] = source[source_offset + Σ iₖ·axesₖ.source] for all indices i.

    `element` bytes each; offsets in elements. Without a source every element becomes `fill`, its bits as an integer.
    """

    element: int
    source: Handle | None
    target: Handle
    axes: tuple[Axis, ...]
    source_offset: Extent = 0
    target_offset: Extent = 0
    fill: int = 0

    @property
    def elements(self) -> Extent:
        """How many elements are moved."""
        return product(axis.extent for axis in self.axes)


def guess(extent: Extent) -> int:
    """The order of magnitude of an extent."""
    return max(evaluate(extent, dict.fromkeys(symbols_of(extent), GUESS)), 0)


def total(extents: Sequence[Extent]) -> Extent:
    """Sum of extents."""
    zero: Extent = 0
    return reduce(add, extents, zero)


def row_major(shape: Sequence[Extent]) -> list[Stride]:
    """Strides of a dense array."""
    strides = [UNIT]
    for size in reversed(shape[1:]):
        strides.append(strides[-1].times(size))
    return strides[::-1][: len(shape)]


def stored_shape(port: Port, isa: Isa) -> tuple[Extent, ...]:
    """Shape of the array in memory."""
    return physical_shape(port.shape, port.layout, isa.lanes)


def element_size(port: Port) -> int:
    """Bytes of one element."""
    return size_of(port.dtype)


def stored_input(build: KernelBuilder, index: int) -> Handle:
    """Input `index`; a constant in the layout its port asks for."""
    port = build.node.input(index)
    if port.constant is None or port.layout == "plain":
        return build.input(index)
    return build.pack(to_blocked(port.constant, build.isa.lanes))


def layouts_with_blocked(node: Node, allowed: bool) -> Sequence[Ports]:
    """All feature maps plain or, where the op allows it, all blocked; feature maps have a rank of three or more."""
    port = node.output
    if not allowed or len(port.shape) < 3 or not isinstance(port.shape[1], int) or element_size(port) > WIDEST:
        return (PLAIN,)
    blocked = Ports(("blocked",) * len(node.inputs), ("blocked",) * len(node.outputs))
    return (PLAIN, blocked)


def movable(node: Node) -> bool:
    """Whether the first input's elements are plain bytes."""
    return node.dtype not in HOST_ONLY


def move_cost(node_bytes: Extent, overhead: float = 0.5) -> float:
    """Microseconds one core needs to move so many bytes."""
    return overhead + guess(node_bytes) / BYTES_PER_MICROSECOND


# simplification: fewer axes, wider elements


def simplified(move: Move) -> Move:
    """The same copy with as few axes and as wide elements as it allows."""
    if move.element > WIDEST:
        move = _split_elements(move, move.element // WIDEST)
    axes: list[Axis] = []
    for axis in (axis for axis in move.axes if axis.extent != 1):
        if axes and _mergeable(axes[-1], axis):
            axes[-1] = Axis(product((axes[-1].extent, axis.extent)), axis.source, axis.target)
        else:
            axes.append(axis)
    return _widened(replace(move, axes=tuple(axes)))


def _mergeable(outer: Axis, inner: Axis) -> bool:
    """Whether the outer axis continues where the inner one ends, on both sides."""
    return outer.source == inner.source.times(inner.extent) and outer.target == inner.target.times(inner.extent)


def _split_elements(move: Move, parts: int) -> Move:
    """Elements of `parts` times the widest one as an innermost axis."""
    axes = [Axis(a.extent, a.source.times(parts), a.target.times(parts)) for a in move.axes]
    offsets = product((move.source_offset, parts)), product((move.target_offset, parts))
    return replace(move, element=WIDEST, axes=(*axes, Axis(parts, UNIT, UNIT)),
                   source_offset=offsets[0], target_offset=offsets[1])  # fmt: skip


def _widened(move: Move) -> Move:
    """A short contiguous innermost axis becomes part of the element, where everything else is a multiple of it."""
    if not move.axes or move.source is None or not move.axes[-1].contiguous:
        return move
    *outer, last = move.axes
    width = last.extent
    if width not in (2, 4, 8) or not isinstance(width, int) or move.element * width > WIDEST or not outer:
        return move
    strides = [stride for axis in outer for stride in (axis.source, axis.target)]
    offsets = (move.source_offset, move.target_offset)
    if any(stride.number % width for stride in strides) or any(o for o in offsets if not _divides(width, o)):
        return move
    axes = tuple(Axis(a.extent, _shortened(a.source, width), _shortened(a.target, width)) for a in outer)
    source, target = (o // width if isinstance(o, int) else o for o in offsets)
    return replace(move, element=move.element * width, axes=axes, source_offset=source, target_offset=target)


def _divides(width: int, offset: Extent) -> bool:
    return isinstance(offset, int) and offset % width == 0


def _shortened(stride: Stride, width: int) -> Stride:
    return Stride(stride.number // width, stride.factors)



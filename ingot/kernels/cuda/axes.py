"""Tensors as axes with strides, in any layout: collapsed, and written as index arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingot.kernels.cuda.build import FunctionBuilder
from ingot.kernels.node import Port
from ingot.plan.extent import Extent, product

LAST, HEADS = "channels_last", "heads_inside"


@dataclass(frozen=True)
class Axis:
    """`size` places; operand k moves `strides[k]` elements from one to the next."""

    size: Extent
    strides: tuple[Extent, ...]


def memory_order(rank: int, layout: str) -> tuple[int, ...]:
    """Axes from the outermost in memory to the innermost."""
    if layout == HEADS:
        return (0, 2, 1, *range(3, rank))
    return (0, *range(2, rank), 1) if layout == LAST else tuple(range(rank))


def strides_of(shape: Sequence[Extent], layout: str = "plain") -> tuple[Extent, ...]:
    """Elements from one place of each axis to the next."""
    order = memory_order(len(shape), layout)
    return tuple(product(shape[a] for a in order[order.index(axis) + 1 :]) for axis in range(len(shape)))


def broadcast_strides(port: Port, shape: Sequence[Extent]) -> tuple[Extent, ...]:
    """Strides of an operand along the axes of a larger shape: 0 where it is broadcast."""
    missing = len(shape) - len(port.shape)
    own = strides_of(port.shape, port.layout)
    return (*[0] * missing, *(0 if size == 1 else stride for size, stride in zip(port.shape, own, strict=True)))


def ordered(shape: Sequence[Extent], layout: str, strides: Sequence[Sequence[Extent]]) -> list[Axis]:
    """The shape's axes in memory order of the layout; `strides` per operand. A number has one axis of one place."""
    if not shape:
        return [Axis(1, (0,) * len(strides))]
    return [Axis(shape[a], tuple(s[a] for s in strides)) for a in memory_order(len(shape), layout)]


def collapse(axes: Sequence[Axis]) -> list[Axis]:
    """The same places with as few axes as possible; axes of size 1 are gone."""
    merged: list[Axis] = []
    for axis in axes:
        if axis.size == 1:
            continue
        outer = merged[-1] if merged else None
        if outer and all(o == product((axis.size, i)) for o, i in zip(outer.strides, axis.strides, strict=True)):
            merged[-1] = Axis(product((outer.size, axis.size)), axis.strides)
        else:
            merged.append(axis)
    return merged or [Axis(1, axes[0].strides if axes else ())]


def unravel(f: FunctionBuilder, index: str, sizes: Sequence[Extent]) -> list[str]:
    """Variables with the place along each axis of the element number `index`."""
    places: list[str] = []
    rest = index
    for size in reversed(sizes[1:]):
        number = f.extent(size)
        places.append(f.let(f"{rest} % {number}", "i"))
        rest = f.let(f"{rest} // {number}", "i")
    return [rest, *reversed(places)]


def offset(f: FunctionBuilder, places: Sequence[str], strides: Sequence[Extent]) -> str:
    """Text of the sum of places times strides."""
    terms = [p if s == 1 else f"{p} * {f.extent(s)}" for p, s in zip(places, strides, strict=True) if s != 0]
    return " + ".join(terms) or "0"

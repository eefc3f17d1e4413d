"""Pad: a copy and fills where the border is constant, mapped coordinates where it repeats the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.copying import copy_bytes, multiply
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.moving import CHUNK_BYTES, move_phase
from ingot.kernels.cpu.strided import (
    STILL,
    WIDEST,
    Axis,
    Move,
    Stride,
    element_size,
    guess,
    layouts_with_blocked,
    movable,
    move_cost,
    row_major,
    stored_input,
    stored_shape,
    total,
)  # fmt: skip
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, add, product

Pads = Sequence[tuple[int, int]]


def _pads(node: Node) -> list[tuple[int, int]]:
    """(begin, end) per axis of the array in memory."""
    pads = node.attributes["pads"]
    rank = len(pads) // 2
    pairs = list(zip(pads[:rank], pads[rank:], strict=True))
    return [*pairs, (0, 0)] if node.output.layout == "blocked" else pairs


def _layouts(node: Node, isa: Isa) -> Sequence[Ports]:
    return layouts_with_blocked(node, len(node.output.shape) > 2 and _pads(node)[1] == (0, 0))


def _cost(node: Node, isa: Isa) -> float:
    return move_cost(product((2, node.output.bytes)))


# constant borders


def _constant(node: Node, isa: Isa) -> bool:
    fits = element_size(node.output) <= WIDEST or node.attributes.get("value", 0) == 0
    return movable(node) and node.attributes.get("mode", "constant") == "constant" and fits


def bits_of(value: Any, dtype: str) -> int:
    """The element's bits as a signed integer."""
    return int.from_bytes(np.asarray(value).astype(numpy_dtype(dtype)).tobytes(), "little", signed=True)


@kernel("Pad", on="cpu", when=_constant, cost=_cost, layouts=_layouts)
def pad_constant(build: KernelBuilder, node: Node) -> None:
    """y = x within a constant border; a negative pad crops."""
    pads, shape = _pads(node), stored_shape(node.input(0), build.isa)
    source, target = row_major(shape), row_major(stored_shape(node.output, build.isa))
    kept = [add(size, min(begin, 0) + min(end, 0)) for size, (begin, end) in zip(shape, pads, strict=True)]
    skipped = [product((max(-begin, 0), stride.extent)) for (begin, _), stride in zip(pads, source, strict=True)]
    first = [product((max(begin, 0), stride.extent)) for (begin, _), stride in zip(pads, target, strict=True)]
    size = element_size(node.output)
    inside = Move(size, stored_input(build, 0), build.output(), tuple(map(Axis, kept, source, target)),
                  total(skipped), total(first))  # fmt: skip
    fill = bits_of(node.attributes.get("value", 0), node.output.dtype)
    move_phase(build, [inside, *_borders(build.output(), pads, kept, target, size, fill)])


def _borders(output: Handle, pads: Pads, kept: Sequence[Extent], target: Sequence[Stride], size: int,
             fill: int) -> list[Move]:  # fmt: skip
    """Fills of each axis' borders: within x's range on the axes before, over the whole result on those after."""
    whole = [add(count, max(b, 0) + max(e, 0)) for count, (b, e) in zip(kept, pads, strict=True)]
    moves = []
    for axis, (begin, end) in enumerate(pads):
        before: list[Extent] = [product((max(b, 0), s.extent)) for (b, _), s in zip(pads[:axis], target, strict=False)]
        beyond = add(kept[axis], max(begin, 0))
        for start, width in ((0, begin), (beyond, end)):
            if width > 0:
                sizes = [*kept[:axis], width, *whole[axis + 1 :]]
                axes = tuple(Axis(n, STILL, stride) for n, stride in zip(sizes, target, strict=True))
                place = total([*before, product((start, target[axis].extent))])
                moves.append(Move(size, None, output, axes, target_offset=place, fill=fill))
    return moves


# borders taken from the input


def _repeating(node: Node, isa: Isa) -> bool:
    return (movable(node) and node.attributes.get("mode") in _COORDINATES
            and min(node.attributes["pads"], default=0) >= 0)  # fmt: skip


def _edge(f: PhaseFunction, place: Index, size: Index) -> Index:
    return f.maximum(f.minimum(place, _less_one(size)), 0)


def _wrap(f: PhaseFunction, place: Index, size: Index) -> Index:
    remainder = f.binary("srem", f.index(place), f.index(size))
    return f.select(f.compare("slt", remainder, 0), remainder + size, remainder)


def _reflect(f: PhaseFunction, place: Index, size: Index) -> Index:
    period = multiply(_less_one(size), 2)
    folded = f.index(_wrap(f, place, f.maximum(period, 1)))
    return f.select(f.compare("slt", folded, f.index(size)), folded, period - folded)


def _less_one(size: Index) -> Index:
    return size - 1


_COORDINATES: dict[str, Callable[[PhaseFunction, Index, Index], Index]] = {
    "edge": _edge, "wrap": _wrap, "reflect": _reflect,
}  # fmt: skip


@kernel("Pad", on="cpu", when=_repeating, cost=_cost, layouts=_layouts)
def pad_repeating(build: KernelBuilder, node: Node) -> None:
    """y[i…] = x[f(i - begin)…]: rows of the last padded axis are a copied middle between two mapped borders."""
    pads, shape = _pads(node), stored_shape(node.input(0), build.isa)
    last = max((axis for axis, pair in enumerate(pads) if pair != (0, 0)), default=0)
    source, target, coordinate = stored_input(build, 0), build.output(), _COORDINATES[node.attributes["mode"]]
    block = product((*shape[last + 1 :], element_size(node.output)))
    sizes, (begin, end) = shape[: last + 1], (pads[last] if pads else (0, 0))
    results = [add(size, b + e) for size, (b, e) in zip(sizes, pads, strict=False)]
    length = sizes[-1] if sizes else 1

    def body(f: PhaseFunction, first: Value, stop: Value) -> None:
        unit, count = f.extent(block), f.extent(length)

        def row(index: Value) -> None:
            place = _mapped(f, index, results[:-1], sizes[:-1], pads, coordinate)
            origin = f.at(f.pointer(source), multiply(multiply(place, count), unit))
            line = f.at(f.pointer(target), multiply(multiply(index, f.extent(add(length, begin + end))), unit))

            def border(position: Value) -> None:
                here = coordinate(f, position - begin, count)
                copy_bytes(f, build.isa, f.at(origin, multiply(here, unit)), f.at(line, multiply(position, unit)), unit)

            f.loop(0, begin, border)
            copy_bytes(f, build.isa, origin, f.at(line, multiply(begin, unit)), multiply(count, unit))
            f.loop(count + begin, count + (begin + end), border)

        f.loop(first, stop, row)

    row_bytes = max(guess(product((add(length, begin + end), block))), 1)
    build.phase(product(results[:-1]), body, grain=-(-CHUNK_BYTES // row_bytes))


def _mapped(f: PhaseFunction, row: Value, results: Sequence[Extent], sizes: Sequence[Extent], pads: Pads,
            coordinate: Callable[[PhaseFunction, Index, Index], Index]) -> Index:  # fmt: skip
    """Number of the source's row for the result's row."""
    place: Index = 0
    stride: Index = 1
    rest: Index = row
    for axis in reversed(range(len(sizes))):
        extent, size = f.extent(results[axis]), f.extent(sizes[axis])
        index = f.remainder(rest, extent) if axis else rest
        rest = f.divide(rest, extent) if axis else rest
        if pads[axis] != (0, 0):
            index = coordinate(f, index - pads[axis][0], size)
        place = place + multiply(index, stride)
        stride = multiply(stride, size)
    return place

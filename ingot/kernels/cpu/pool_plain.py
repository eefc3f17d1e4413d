"""Pool in plain layout, any dtype, with the index of every maximum where it is asked for.

A work item is one output row of one channel; a vector holds pixels of the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_plain import load_pixels, steps
from ingot.kernels.cpu.conv_window import Axis, conv_axes, tap_range, unravel
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value, is_float, vector
from ingot.kernels.cpu.pool import pool_cost
from ingot.kernels.cpu.pool_steps import can_pool, lowest, root, step_of
from ingot.kernels.cpu.render import register_element, store, widen
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

Sums = Sequence[Value]


@dataclass(frozen=True)
class Site:
    """A kernel function under construction."""

    f: PhaseFunction
    node: Node
    x: Handle
    axes: tuple[Axis, ...]
    lanes: int

    @property
    def kind(self) -> str:
        """max, average or lp."""
        return str(self.node.attributes["kind"])

    @property
    def indexed(self) -> bool:
        """Whether the index of the maximum is wanted."""
        return len(self.node.outputs) > 1

    @property
    def counted(self) -> bool:
        """Whether an average depends on how much of its window lies inside."""
        return self.kind == "average" and not self.node.attributes.get("count_include_pad", 0)


def _cost(node: Node, isa: Isa) -> float:
    strided = node.attributes["strides"][-1] > 1 or size_of(node.dtype) < 4
    return pool_cost(node, 60 if strided else 8)


@kernel("Pool", on="cpu", when=lambda node, isa: can_pool(node), cost=_cost)
def pool_plain(build: KernelBuilder, node: Node) -> None:
    """y (and the indices) row by row."""
    axes, x = conv_axes(node, node.attributes["kernel"]), build.input(0)
    lanes = build.isa.lanes // (2 if node.dtype == "float64" or len(node.outputs) > 1 else 1)
    outputs = [build.output(i) for i in range(len(node.outputs))]
    sizes: tuple[Extent, ...] = (product(node.output.shape[:2]), *(axis.output for axis in axes[:-1]))

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        site = Site(f, node, x, axes, lanes)

        def item(index: Value) -> None:
            channel, *position = unravel(f, index, sizes)
            _row(site, outputs, index * f.extent(axes[-1].output), channel, position)

        f.loop(begin, end, item)

    build.phase(product(sizes), body)


def _row(site: Site, outputs: Sequence[Handle], line: Index, channel: Index, position: Sequence[Index]) -> None:
    """All vectors of the output row that begins at element `line`."""
    f, row = site.f, site.axes[-1]
    ranges = [*(tap_range(f, axis, place) for axis, place in zip(site.axes, position, strict=False)), (0, row.kernel)]
    start: Index = channel
    for place, axis in zip(position, site.axes, strict=False):
        start = start * f.extent(axis.input) + (place * axis.stride - axis.begin)

    def vectors(column: Value) -> None:
        sums = f.loop(*ranges[0], _along(site, ranges, 0, start, column), _initial(site))
        mask = f.first_lanes(f.extent(row.output) - column, site.lanes)
        results = _completed(site, sums)
        for handle, port, result in zip(outputs, site.node.outputs, results, strict=True):
            store(f, port.dtype, result, f.pointer(handle), (line + column) * size_of(port.dtype), mask)

    f.loop(0, f.extent(row.output), vectors, step=site.lanes)


def _initial(site: Site) -> Sums:
    """The total; with it the indices, or the counts."""
    f, dtype = site.f, site.node.dtype
    type_ = vector(register_element(dtype), site.lanes)
    total = f.constant(type_, step_of(site.node).start(dtype))
    if site.indexed:
        return [total, f.constant(vector("i64", site.lanes), 0)]
    return [total, f.constant(type_, 0.0)] if site.counted else [total]


def _along(site: Site, ranges: Sequence[tuple[Index, Index]], depth: int, start: Index,
           column: Value) -> Callable[..., Sums]:  # fmt: skip
    """Loop body over the taps of axis `depth`; `start` counts the input lines of the axes up to it."""
    f, axis = site.f, site.axes[depth]

    def body(tap: Value, *sums: Value) -> Sums:
        if depth == len(site.axes) - 1:
            line = start * f.extent(axis.input)
            return _take(site, line, column * axis.stride + (tap * axis.dilation - axis.begin), sums)
        inner = site.axes[depth + 1 : -1]
        place = start + tap * (axis.dilation * f.extent(product(a.input for a in inner)))
        return f.loop(*ranges[depth + 1], _along(site, ranges, depth + 1, place, column), sums)

    return body


def _take(site: Site, line: Index, first: Index, sums: Sums) -> Sums:
    """One tap of a vector of windows: input elements line + first, … with the stride between them."""
    f, dtype, axis = site.f, site.node.dtype, site.axes[-1]
    row = f.at(f.pointer(site.x), line * size_of(dtype))
    raw, inside = load_pixels(f, dtype, row, first, axis, site.lanes)
    x = widen(f, raw, dtype)
    if site.kind == "max":
        x = f.select(inside, x, lowest(dtype))
    total = step_of(site.node).take(f, dtype, sums[0], x)
    if site.counted:
        return [total, sums[1] + f.select(inside, f.constant(sums[1].type, 1.0), 0.0)]
    if not site.indexed:
        return [total]
    index = f.splat(f.index(line + first), site.lanes) + f.cast("sext", steps(f, site.lanes, axis.stride), "i64")
    better = f.compare("ogt" if is_float(x.type) else "ugt" if dtype == "uint8" else "sgt", x, sums[0])
    # A window of nothing but the lowest value still has its first element as its maximum.
    unset = f.binary("and", f.compare("eq", sums[1], 0), inside)
    hopeless = f.compare("oeq" if is_float(x.type) else "eq", sums[0], lowest(dtype))
    better = f.binary("or", better, f.binary("and", unset, hopeless))
    return [total, f.select(better, index, sums[1])]


def _completed(site: Site, sums: Sums) -> Sums:
    f, node = site.f, site.node
    if site.kind == "lp":
        return [root(f, node, sums[0])]
    if site.kind == "average":
        count = sums[1] if site.counted else float(math.prod(node.attributes["kernel"]))
        return [f.binary("fdiv", sums[0], count)]
    return sums

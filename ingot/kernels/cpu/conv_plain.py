"""Conv of any dtype in plain layout, the weight constant or not: what the blocked kernels leave over.

A work item is one output row of four channels; a vector holds pixels of the row. Taps that leave the input are masked.
Integers are centred on their zero points and summed in int32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_epilogue import Epilogue, can_finish, epilogue_of, finish_pixels
from ingot.kernels.cpu.conv_window import Axis, conv_axes, tap_range, unravel
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value, vector
from ingot.kernels.cpu.render import MEMORY, widen
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, ceil_div, product

FLOATS = ("float32", "float64", "float16", "bfloat16")
BYTES = ("int8", "uint8")
CHANNELS = 4  # output channels that share the pixels they read
ASSUMED = 64  # positions along a symbolic axis, for estimates
CYCLES_PER_MICROSECOND = 2600


@dataclass(frozen=True)
class Operand:
    """x or the weight: where it is, its dtype, and what is subtracted from it."""

    handle: Handle
    dtype: str
    zero_point: int

    @property
    def sum(self) -> str:
        """LLVM element type of sums of products."""
        return {"float64": "double"}.get(self.dtype, "i32" if self.dtype in BYTES else "float")

    def centred(self, f: PhaseFunction, raw: Value) -> Value:
        """Memory form → operand of a product."""
        if self.dtype not in BYTES:
            return widen(f, raw, self.dtype)
        return f.cast("sext" if self.dtype == "int8" else "zext", raw, "i32") - self.zero_point


@dataclass(frozen=True)
class Site:
    """A kernel function under construction."""

    f: PhaseFunction
    x: Operand
    weight: Operand
    axes: tuple[Axis, ...]
    inputs: int
    lanes: int

    @property
    def type(self) -> str:
        """Vector type of the sums."""
        return vector(self.x.sum, self.lanes)

    @property
    def taps(self) -> int:
        """Taps of a window."""
        return math.prod(axis.kernel for axis in self.axes)


def load_pixels(f: PhaseFunction, dtype: str, row: Value, first: Index, axis: Axis, lanes: int) -> tuple[Value, Value]:
    """Elements first + lane · stride of a row in memory form, and the mask of those inside it; the others are zero."""
    size, limit = size_of(dtype), f.extent(axis.input)
    type_ = vector(MEMORY[dtype], lanes)
    position = f.cast("trunc", f.splat(f.index(first), lanes), "i32") + steps(f, lanes, axis.stride)
    bound = f.cast("trunc", f.splat(f.index(limit), lanes), "i32")
    inside = f.compare("ult", position, bound)
    if axis.stride == 1 and size >= 4:
        return f.load_masked(type_, row, inside, first * size), inside
    gathered = f.constant(type_, 0)
    for lane in range(lanes):
        place = f.maximum(f.minimum(first + lane * axis.stride, limit - 1), 0)
        gathered = f.insert(gathered, f.load(MEMORY[dtype], row, place * size), lane)
    return f.select(inside, gathered, 0), inside


def steps(f: PhaseFunction, lanes: int, stride: int) -> Value:
    """<0, stride, 2 · stride, …> as i32."""
    values = ", ".join(f"i32 {lane * stride}" for lane in range(lanes))
    return Value(f, vector("i32", lanes), f"<{values}>")


def _applies(node: Node, isa: Isa) -> bool:
    x, weight = node.input(0), node.input(1)
    fits = (x.dtype in FLOATS and weight.dtype == x.dtype) or (x.dtype in BYTES and weight.dtype in BYTES)
    static = weight.static and isinstance(node.output.shape[1], int)
    return fits and static and can_finish(node, 2, _nominal(x))


def _nominal(x: Port) -> str:
    return "int32" if x.dtype in BYTES else x.dtype


def _cost(node: Node, isa: Isa) -> float:
    sizes = [size if isinstance(size, int) else ASSUMED for size in node.output.shape]
    vectors = math.prod(sizes[:-1]) * -(-sizes[-1] // isa.lanes) / CHANNELS
    strided = node.attributes["strides"][-1] > 1 or size_of(node.dtype) < 4
    taps = math.prod(int(size) for size in node.input(1).shape[1:])
    return 1 + vectors * taps * (80 if strided else 22) * max(size_of(node.dtype) // 4, 1) / CYCLES_PER_MICROSECOND


@kernel("Conv", on="cpu", when=_applies, cost=_cost)
def conv_plain(build: KernelBuilder, node: Node) -> None:
    """y = epilogue(x ∗ weight), all plain."""
    outputs, inputs, *window = (int(size) for size in node.input(1).shape)
    groups, axes = node.attributes["group"], conv_axes(node, window)
    lanes = build.isa.lanes // (2 if node.dtype == "float64" else 1)
    x = Operand(build.input(0), node.dtype, node.attributes.get("x_zero_point", 0))
    weight = Operand(build.input(1), node.input(1).dtype, node.attributes.get("weight_zero_point", 0))
    epilogue = epilogue_of(build, node, 2, _nominal(node.input(0)), lanes)
    per_group = outputs // groups
    rows = tuple(axis.output for axis in axes[:-1])
    sizes: tuple[Extent, ...] = (node.output.shape[0], groups, ceil_div(per_group, CHANNELS), *rows)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        site = Site(f, x, weight, axes, inputs, lanes)

        def item(index: Value) -> None:
            image, group, quad, *position = unravel(f, index, sizes)
            # A quad that would pass the group's last channel repeats channels, with the same result.
            channels = [group * per_group + f.minimum(quad * CHANNELS + i, per_group - 1) for i in range(CHANNELS)]
            source = _source(site, image * groups + group, position)
            line = [_line(f, axes, image * outputs + channel, position) for channel in channels]
            _row(site, epilogue, source, position, channels, line)

        f.loop(begin, end, item)

    build.phase(product(sizes), body)


def _source(site: Site, group: Index, position: Sequence[Index]) -> Value:
    """Channel 0 of a group at the row that tap 0 of the outer axes reads."""
    f = site.f
    line: Index = group * site.inputs
    for place, axis in zip(position, site.axes, strict=False):
        line = line * f.extent(axis.input) + (place * axis.stride - axis.begin)
    return f.at(f.pointer(site.x.handle), line * f.extent(site.axes[-1].input) * size_of(site.x.dtype))


def _line(f: PhaseFunction, axes: Sequence[Axis], channel: Index, position: Sequence[Index]) -> Index:
    """Output element of a row's first pixel."""
    line = channel
    for place, axis in zip(position, axes, strict=False):
        line = line * f.extent(axis.output) + place
    return line * f.extent(axes[-1].output)


def _row(site: Site, epilogue: Epilogue, source: Value, position: Sequence[Index], channels: Sequence[Index],
         lines: Sequence[Index]) -> None:  # fmt: skip
    f, row = site.f, site.axes[-1]
    taps = [tap_range(f, axis, place) for axis, place in zip(site.axes, position, strict=False)]
    weights = [f.at(f.pointer(site.weight.handle), channel * (site.inputs * site.taps * size_of(site.weight.dtype)))
               for channel in channels]  # fmt: skip

    def vectors(column: Value) -> None:
        zero = f.constant(site.type, 0)

        def channel(index: Value, *sums: Value) -> Sequence[Value]:
            return _taps(site, taps, column, index, source, weights, sums)

        sums = f.loop(0, site.inputs, channel, [zero] * len(channels))
        mask = f.first_lanes(f.extent(row.output) - column, site.lanes)
        for total, number, line in zip(sums, channels, lines, strict=True):
            finish_pixels(f, epilogue, total, number, line + column, mask)

    f.loop(0, f.extent(row.output), vectors, step=site.lanes)


def _taps(site: Site, ranges: Sequence[tuple[Index, Index]], column: Value, channel: Value, source: Value,
          weights: Sequence[Value], sums: Sequence[Value]) -> Sequence[Value]:  # fmt: skip
    """One input channel's taps, axis by axis."""
    f, row = site.f, site.axes[-1]

    def descend(depth: int, line: Index, tap: Index) -> Callable[..., Sequence[Value]]:
        def along(index: Value, *sums: Value) -> Sequence[Value]:
            axis = site.axes[depth]
            place = tap * axis.kernel + index
            if depth == len(site.axes) - 1:
                first = column * row.stride + (index * row.dilation - row.begin)
                return _multiply(site, f.at(source, line * size_of(site.x.dtype)), first, place, weights, sums)
            inner = product(a.input for a in site.axes[depth + 1 :])
            further = line + index * axis.dilation * f.extent(inner)
            bounds = (*ranges, (0, row.kernel))[depth + 1]
            return f.loop(*bounds, descend(depth + 1, further, place), sums)

        return along

    area = product(axis.input for axis in site.axes)
    bounds = (*ranges, (0, row.kernel))[0]
    return f.loop(*bounds, descend(0, channel * f.extent(area), channel), sums)


def _multiply(site: Site, row: Value, first: Index, tap: Index, weights: Sequence[Value],
              sums: Sequence[Value]) -> Sequence[Value]:  # fmt: skip
    """sums[o] += x[first …] · weights[o][tap]"""
    f, dtype = site.f, site.weight.dtype
    raw, inside = load_pixels(f, site.x.dtype, row, first, site.axes[-1], site.lanes)
    pixels = site.x.centred(f, raw)
    if site.x.zero_point:
        pixels = f.select(inside, pixels, 0)
    scalars = [f.load(MEMORY[dtype], weight, tap * size_of(dtype)) for weight in weights]
    factors = [site.weight.centred(f, f.splat(scalar, site.lanes)) for scalar in scalars]
    if site.x.sum == "i32":
        return [total + pixels * factor for total, factor in zip(sums, factors, strict=True)]
    return [f.fma(pixels, factor, total) for total, factor in zip(sums, factors, strict=True)]

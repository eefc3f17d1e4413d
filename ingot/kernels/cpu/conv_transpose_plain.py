"""ConvTranspose of any float dtype in plain layout, the weight constant or not: what the blocked kernel leaves over.

A work item is one output row of one channel; a vector holds pixels of the row. Output o gathers from tap k the input at
(o + begin − k · dilation) / stride, where that is a whole number inside the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels import kernel
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.conv_epilogue import can_finish, epilogue_of, finish_pixels
from ingot.kernels.cpu.conv_plain import ASSUMED, CYCLES_PER_MICROSECOND, FLOATS, steps
from ingot.kernels.cpu.conv_window import Axis, unravel
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Index, Value, vector
from ingot.kernels.cpu.render import MEMORY, register_element, widen
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

Sums = Sequence[Value]


@dataclass(frozen=True)
class Site:
    """A kernel function under construction; `outputs` channels and `inputs` channels are per group."""

    f: PhaseFunction
    x: Handle
    weight: Handle
    dtype: str
    axes: tuple[Axis, ...]
    inputs: int
    outputs: int
    lanes: int


def _applies(node: Node, isa: Isa) -> bool:
    x, weight = node.input(0), node.input(1)
    static = weight.static and isinstance(node.output.shape[1], int)
    return x.dtype in FLOATS and weight.dtype == x.dtype and static and can_finish(node, 2, x.dtype)


def _cost(node: Node, isa: Isa) -> float:
    sizes = [size if isinstance(size, int) else ASSUMED for size in node.output.shape]
    vectors = math.prod(sizes[:-1]) * -(-sizes[-1] // isa.lanes)
    channels, _, *taps = (int(size) for size in node.input(1).shape)
    return 1 + vectors * channels / node.attributes["group"] * math.prod(taps) * 90 / CYCLES_PER_MICROSECOND


@kernel("ConvTranspose", on="cpu", when=_applies, cost=_cost)
def conv_transpose_plain(build: KernelBuilder, node: Node) -> None:
    """y = epilogue(x ∗ᵀ weight), all plain."""
    channels, outputs, *window = (int(size) for size in node.input(1).shape)
    attributes, groups = node.attributes, node.attributes["group"]
    settings = window, attributes["strides"], attributes["dilations"], attributes["pads"][: len(window)]
    axes = tuple(map(Axis, node.input(0).shape[2:], node.output.shape[2:], *settings))
    lanes = build.isa.lanes // (2 if node.dtype == "float64" else 1)
    x, weight = build.input(0), build.input(1)
    epilogue = epilogue_of(build, node, 2, node.dtype, lanes)
    sizes: tuple[Extent, ...] = (node.output.shape[0], groups, outputs, *(axis.output for axis in axes[:-1]))

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        site = Site(f, x, weight, node.dtype, axes, channels // groups, outputs, lanes)

        def item(index: Value) -> None:
            image, group, output, *position = unravel(f, index, sizes)

            def vectors(column: Value) -> None:
                total = _gather(site, image * groups + group, group, output, [*position, column])
                mask = f.first_lanes(f.extent(axes[-1].output) - column, lanes)
                element = index * f.extent(axes[-1].output) + column
                finish_pixels(f, epilogue, total, group * outputs + output, element, mask)

            f.loop(0, f.extent(axes[-1].output), vectors, step=lanes)

        f.loop(begin, end, item)

    build.phase(product(sizes), body)


def _gather(site: Site, place: Index, group: Index, output: Index, position: Sequence[Index]) -> Value:
    """Sum over a group's input channels and all taps; `place` counts groups over images."""
    f = site.f
    zero = f.constant(vector(register_element(site.dtype), site.lanes), 0.0)

    def channel(index: Value, *sums: Value) -> Sums:
        weight = (group * site.inputs + index) * site.outputs + output
        return _along(site, 0, position, place * site.inputs + index, weight)(sums)

    return f.loop(0, site.inputs, channel, [zero])[0]


def _along(site: Site, depth: int, position: Sequence[Index], line: Index, tap: Index) -> Callable[[Sums], Sums]:
    """The taps of axis `depth` and after it; `line` and `tap` count input lines and taps of the axes before it."""
    f, axis = site.f, site.axes[depth]

    def body(index: Value, *sums: Value) -> Sums:
        place, offset = tap * axis.kernel + index, position[depth] + axis.begin - index * axis.dilation
        if depth == len(site.axes) - 1:
            return [_multiply(site, line, f.index(offset), place, sums[0])]
        source = f.divide(f.index(offset), axis.stride)
        inside = f.compare("ult", f.index(source), f.index(f.extent(axis.input)))
        if axis.stride > 1:  # a negative offset has a quotient far outside, so the order of the two does not matter
            inside = f.binary("and", inside, f.compare("eq", f.remainder(f.index(offset), axis.stride), 0))
        further = _along(site, depth + 1, position, line * f.extent(axis.input) + source, place)
        return f.when(inside, lambda: further(sums), None, sums)

    return lambda sums: f.loop(0, axis.kernel, body, sums)


def _multiply(site: Site, line: Index, offset: Value, tap: Index, total: Value) -> Value:
    """total += x at (offset + lane) / stride of a row · weight[tap]"""
    f, axis, size, memory = site.f, site.axes[-1], size_of(site.dtype), MEMORY[site.dtype]
    limit = f.extent(axis.input)
    row = f.at(f.pointer(site.x), line * limit * size)
    places = f.cast("trunc", f.splat(offset, site.lanes), "i32") + steps(f, site.lanes, 1)
    source = f.binary("sdiv", places, axis.stride)
    bound = f.cast("trunc", f.splat(f.index(limit), site.lanes), "i32")
    whole = f.compare("eq", f.binary("mul", source, axis.stride), places)
    inside = f.binary("and", whole, f.compare("ult", source, bound))
    gathered = f.constant(vector(memory, site.lanes), 0)
    for lane in range(site.lanes):
        index = f.cast("sext", f.extract(source, lane), "i64")
        index = f.index(f.maximum(f.minimum(index, limit - 1), 0))
        gathered = f.insert(gathered, f.load(memory, row, index * size), lane)
    pixels = f.select(inside, widen(f, gathered, site.dtype), 0.0)
    scalar = f.load(memory, f.pointer(site.weight), tap * size)
    return f.fma(pixels, widen(f, f.splat(scalar, site.lanes), site.dtype), total)

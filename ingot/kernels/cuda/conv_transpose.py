"""ConvTranspose without scattering: output positions that share their remainder by the strides read the same taps, so
that each such phase is a convolution of its own, one launch a phase."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.ir.expression import operands_of
from ingot.ir.ops_table import shifted
from ingot.kernels import PLAIN, Ports, kernel
from ingot.kernels.cuda.axes import LAST, broadcast_strides, offset, strides_of, unravel
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.render import NARROW, can_render, converted, render
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, ceil_div, product

_ROWS, _MOST_COLUMNS, _MOST_FLOATS = 64, 64, 32  # of a tile; float32 takes three products each: registers


@dataclass(frozen=True)
class Axis:
    """Of one phase along one axis: positions first, first + stride, …, `count` of them; position number q reads x at
    q + shift through the tap, for each (tap, shift)."""

    first: int
    stride: int
    count: Extent
    taps: tuple[tuple[int, int], ...]


def axes_of(size: Extent, kernel: int, stride: int, begin: int, dilation: int) -> list[Axis]:
    """The phases of an axis with `size` output positions."""
    found = []
    for first in range(stride):
        turn, phase = divmod(first + begin, stride)
        taps = tuple((k, turn + (phase - k * dilation) // stride)
                     for k in range(kernel) if (phase - k * dilation) % stride == 0)  # fmt: skip
        if not isinstance(size, int) or first < size:
            found.append(Axis(first, stride, ceil_div(shifted(size, -first), stride), taps))
    return found


def _applies(node: Node, target: Any) -> bool:
    ports = [p for p in node.inputs if p is not None]
    types = (*NARROW, "float32")
    if len(ports) != len(node.inputs) or node.dtype not in types or ports[1].dtype != node.dtype:
        return False
    return can_render(node.epilogue, ["float32", *(p.dtype for p in ports[2:])])


def _layouts(node: Node, target: Any) -> list[Ports]:
    extras = tuple(LAST if p is not None and p.constant is None and p.shape == node.output.shape else ""
                   for p in node.inputs[2:])  # fmt: skip
    return [PLAIN, Ports((LAST, "", *extras), (LAST,))]


@kernel("ConvTranspose", on="cuda", when=_applies, layouts=_layouts)
def conv_transpose(build: CudaBuilder, node: Node) -> None:
    """epilogue(Σ over the taps that reach a position and channels of x · w)"""
    a, y, kernel = node.attributes, node.output, [int(k) for k in node.input(1).shape[2:]]
    weights = _packed(build, node)
    phases = [axes_of(*axis) for axis in zip(y.shape[2:], kernel, a["strides"], a["pads"], a["dilations"],
                                             strict=False)]  # fmt: skip
    for axes in itertools.product(*phases):
        _phase(build, node, weights, axes)


Weights = tuple[Handle, tuple[Extent, ...]]  # where they are; strides of input channel, output channel, taps


def _packed(build: CudaBuilder, node: Node) -> Weights:
    """Constant weights with the output channels side by side; others as they are."""
    port = node.input(1)
    if port.constant is None:
        return build.input(1), strides_of(port.shape)
    order = (*range(2, len(port.shape)), 0, 1)
    moved = np.ascontiguousarray(port.constant.transpose(order))
    strides = strides_of(moved.shape)
    return build.pack(moved), (strides[-2], strides[-1], *strides[:-2])


def _phase(build: CudaBuilder, node: Node, weights: Weights, axes: Sequence[Axis]) -> None:
    x, y, group = node.input(0), node.output, int(node.attributes["group"])
    channels, outputs = int(node.input(1).shape[0]) // group, int(node.input(1).shape[1])
    most = _MOST_FLOATS if node.dtype == "float32" else _MOST_COLUMNS
    across, deep = min(max(power_of_two(outputs), 16), most), min(max(power_of_two(channels), 16), 32)
    f = build.function(warps=4, stages=3)
    rows = product((y.shape[0], *(axis.count for axis in axes)))
    parts = ceil_div(outputs, across)
    f.emit(f"number = tl.program_id(0)\ngroup = tl.program_id(1)\nrows = (number // {parts}) * {_ROWS} + "
           f"tl.arange(0, {_ROWS})\nwithin = (number % {parts}) * {across} + tl.arange(0, {across})")  # fmt: skip
    f.emit(f"inside = (rows < {f.extent(rows)})[:, None] & (within < {outputs})[None, :]")
    image, *places = unravel(f, "rows", [y.shape[0], *(axis.count for axis in axes)])
    strides, (handle, down) = strides_of(x.shape, x.layout), weights
    f.emit(f"sums = tl.zeros(({_ROWS}, {across}), tl.float32)")
    for chosen in itertools.product(*(axis.taps for axis in axes)):
        spots = [f.let(f"{place} + {shift}") for place, (_, shift) in zip(places, chosen, strict=True)]
        held = [f"({spot} >= 0) & ({spot} < {f.extent(size)})" for spot, size in zip(spots, x.shape[2:], strict=True)]
        f.emit(f"reached = {' & '.join([f'(rows < {f.extent(rows)})', *held])}")
        f.emit(f"source = {offset(f, [image, *spots], [strides[0], *strides[2:]])}")
        taps = " + ".join(f.extent(product((k, s))) for (k, _), s in zip(chosen, down[2:], strict=True)) or "0"
        with f.block(f"for start in range(0, {channels}, {deep}):"):
            f.emit(f"depth = start + tl.arange(0, {deep})\nchannel = group * {channels} + depth")
            f.emit(f"a = tl.load({f.pointer(build.input(0))} + source[:, None] + (channel * {f.extent(strides[1])})"
                   f"[None, :], reached[:, None] & (depth < {channels})[None, :], other=0)")  # fmt: skip
            f.emit(f"b = tl.load({f.pointer(handle)} + {taps} + (channel * {f.extent(down[0])})[:, None] + "
                   f"(within * {f.extent(down[1])})[None, :], (depth < {channels})[:, None] & "
                   f"(within < {outputs})[None, :], other=0)")  # fmt: skip
            f.emit(f"sums = tl.dot(a, b, sums{_precision(build, node.dtype)})")
    columns = f.let(f"group * {outputs} + within")
    spots = [f.let(f"{place} * {axis.stride} + {axis.first}") for place, axis in zip(places, axes, strict=True)]
    _store(build, f, [f"{image}[:, None]", f"{columns}[None, :]", *(f"{spot}[:, None]" for spot in spots)])
    f.launch(product((ceil_div(rows, _ROWS), parts)), group)


def _precision(build: CudaBuilder, dtype: str) -> str:
    return f', input_precision="{"tf32" if build.target.precision == "tf32" else "tf32x3"}"' * (dtype == "float32")


def _store(build: CudaBuilder, f: FunctionBuilder, places: Sequence[str]) -> None:
    """The epilogue on the tile; `places` along the axes of the result."""
    node, y = build.node, build.node.output
    used, texts = operands_of(node.epilogue), []
    for k in range(2, len(node.inputs)):
        strides = broadcast_strides(node.input(k), y.shape)
        masked = ", inside" if any(stride != 0 for stride in strides) else ""
        where = f" + ({offset(f, places, strides)} + tl.zeros_like(inside).to(tl.int32))" if masked else ""
        texts.append(f.let(f"tl.load({f.pointer(build.input(k))}{where}{masked})") if k - 1 in used else "")
    dtypes = ["float32", *(node.input(k).dtype for k in range(2, len(node.inputs)))]
    value = render(f, node.epilogue, ["sums", *texts], dtypes)
    result = converted(value, node.epilogue.dtype or "float32", y.dtype)
    f.emit(f"tl.store({f.pointer(build.output())} + {offset(f, places, strides_of(y.shape, y.layout))}, {result}, "
           "inside)")  # fmt: skip

"""Conv where every output channel reads one input channel: no product of matrices, a sum over taps per element."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.ir.expression import operands_of
from ingot.kernels import kernel
from ingot.kernels.cuda.axes import offset, strides_of, unravel
from ingot.kernels.cuda.build import CudaBuilder
from ingot.kernels.cuda.conv import conv_applies, conv_layouts, is_depthwise, window_of
from ingot.kernels.cuda.render import NARROW, converted, render
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.plan.extent import ceil_div, product

_ELEMENTS = 1024


def _applies(node: Node, target: Any) -> bool:
    return is_depthwise(node) and conv_applies(node, (*NARROW, "float32"))


@kernel("Conv", on="cuda", when=_applies, layouts=lambda node, target: conv_layouts(node, few=False))
def depthwise(build: CudaBuilder, node: Node) -> None:
    """A block is some positions by some channels; weights are stored [taps, O]"""
    x, y, window = node.input(0), node.output, window_of(node)
    weight, channels = node.input(1).constant, int(node.input(1).shape[0])
    assert weight is not None
    packed = build.pack(np.ascontiguousarray(weight.reshape(channels, -1).T))
    across = min(power_of_two(channels), 64)
    down, rows = _ELEMENTS // across, product((y.shape[0], *y.shape[2:]))
    f = build.function(warps=4)
    parts = ceil_div(channels, across)
    f.emit(f"number = tl.program_id(0)\nrows = (number // {parts}) * {down} + tl.arange(0, {down})")
    f.emit(f"columns = (number % {parts}) * {across} + tl.arange(0, {across})")
    f.emit(f"inside = (rows < {f.extent(rows)})[:, None] & (columns < {channels})[None, :]")
    image, *places = unravel(f, "rows", [y.shape[0], *y.shape[2:]])
    strides = strides_of(x.shape, x.layout)
    corners = [f.let(f"{p} * {s} - {b}") for p, s, b in zip(places, window.strides, window.pads, strict=False)]
    source = f"columns // {channels // window.group}" if channels != window.group else "columns"
    base = f.let(f"{f.pointer(build.input(0))} + ({image} * {f.extent(strides[0])})[:, None] + "
                 f"({source})[None, :] * {f.extent(strides[1])}")  # fmt: skip
    f.emit(f"sums = tl.zeros(({down}, {across}), tl.float32)")
    for number, tap in enumerate(np.ndindex(*window.kernel)):
        spots = [f.let(f"{c} + {t * d}") for c, t, d in zip(corners, tap, window.dilations, strict=True)]
        held = " & ".join(f"({spot} >= 0) & ({spot} < {f.extent(size)})"
                          for spot, size in zip(spots, x.shape[2:], strict=True))  # fmt: skip
        f.emit(f"value = tl.load({base} + ({offset(f, spots, strides[2:])})[:, None], inside & ({held})[:, None], "
               "other=0)")  # fmt: skip
        f.emit(f"weight = tl.load({f.pointer(packed)} + {number * channels} + columns, columns < {channels}, other=0)")
        f.emit("sums += value.to(tl.float32) * weight.to(tl.float32)[None, :]")
    f.emit(f"place = rows[:, None] * {channels} + columns[None, :]")
    _finish(build, node, f, channels)
    f.launch(product((ceil_div(rows, down), parts)))


def _finish(build: CudaBuilder, node: Node, f: Any, channels: int) -> None:
    used = operands_of(node.epilogue)
    texts = [_extra(build, node, f, k, channels) if k - 1 in used else "" for k in range(2, len(node.inputs))]
    value = render(f, node.epilogue, ["sums", *texts], ["float32", *(p.dtype for p in node.inputs[2:] if p)])
    held = node.epilogue.dtype or "float32"
    f.emit(f"tl.store({f.pointer(build.output())} + place, {converted(value, held, node.output.dtype)}, inside)")


def _extra(build: CudaBuilder, node: Node, f: Any, index: int, channels: int) -> str:
    port, pointer = node.input(index), f.pointer(build.input(index))
    if port.elements == 1:
        return f.let(f"tl.load({pointer})")
    if port.shape == node.output.shape:
        return f.let(f"tl.load({pointer} + place, inside)")
    return f.let(f"tl.load({pointer} + columns[None, :], (columns < {channels})[None, :])")

"""Pool: windows of x, in either layout, one output element after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ingot.ir.elementwise import INTEGERS
from ingot.kernels import kernel
from ingot.kernels.cuda.axes import memory_order, offset, strides_of, unravel
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder, FunctionBuilder
from ingot.kernels.cuda.copying import same_layouts
from ingot.kernels.cuda.pointwise import block_for, element_index
from ingot.kernels.cuda.reduce import KINDS, accumulator, start_of
from ingot.kernels.cuda.render import NARROW, REAL, converted
from ingot.kernels.node import Node
from ingot.plan.extent import ceil_div

_MOST_TAPS = 256  # a larger window is a reduction
_STEPS = {"max": "tl.where(better, value, total)", "average": "total + value", "lp": "total + power"}
# The first of a window is better than nothing, NaN than any number.
_BETTER = "inside & ((value > total) | (count == 0) | ((value != value) & (total == total)))"


def _applies(node: Node, target: Any) -> bool:
    taps, largest = int(np.prod(node.attributes["kernel"])), node.attributes["kind"] == "max"
    types = (*NARROW, *REAL, *(INTEGERS if largest else ()))
    return node.dtype in types and (len(node.outputs) == 1 or largest) and taps <= _MOST_TAPS


@kernel("Pool", on="cuda", when=_applies, layouts=same_layouts)
def pool(build: CudaBuilder, node: Node) -> None:
    """max (and where it is), mean or p-norm over each window; what lies outside does not count"""
    y = node.output
    block = block_for(y.elements, build.target.processors)
    f = build.function(warps=max(min(block // 128, 4), 1))  # of many elements 16 bytes a thread
    taps = Taps(build, f, node, block)
    (_largest if node.attributes["kind"] == "max" and len(node.outputs) == 1 else _counted)(taps)
    f.launch(ceil_div(y.elements, block))


class Taps:
    """A block of results, and the elements of their windows one after the other."""

    def __init__(self, build: CudaBuilder, f: FunctionBuilder, node: Node, block: int) -> None:
        self.build, self.f, self.node, self.block = build, f, node, block
        x, y, a = node.input(0), node.output, node.attributes
        self.index, self.mask = element_index(f, y.elements, block)
        order = memory_order(len(y.shape), y.layout)
        places = dict(zip(order, unravel(f, self.index, [y.shape[i] for i in order]), strict=True))
        self.strides = strides_of(x.shape, x.layout)
        self.outer = [places[0], places[1]]
        self.base = f.let(f"{f.pointer(build.input(0))} + {offset(f, self.outer, self.strides[:2])}")
        self.corners = [f.let(f"{places[axis + 2]} * {s} - {b}")
                        for axis, (s, b) in enumerate(zip(a["strides"], a["pads"], strict=False))]  # fmt: skip

    def load(self, outside: str) -> Iterator[tuple[str, list[str]]]:
        """(the text of each tap's values, where they are along the axes); `inside` says which are in x."""
        f, a, x = self.f, self.node.attributes, self.node.input(0)
        for tap in np.ndindex(*a["kernel"]):
            spots = [f.let(f"{c} + {t * d}") for c, t, d in zip(self.corners, tap, a["dilations"], strict=True)]
            held = [f"({spot} >= 0) & ({spot} < {f.extent(n)})" for spot, n in zip(spots, x.shape[2:], strict=True)]
            f.emit(f"inside = {' & '.join([self.mask, *held])}")
            yield f"tl.load({self.base} + {offset(f, spots, self.strides[2:])}, inside, other={outside})", spots

    def store(self, output: int, value: str) -> None:
        """Values into an output."""
        self.f.emit(f"tl.store({self.f.pointer(self.build.output(output))} + {self.index}, {value}, {self.mask})")


def _largest(taps: Taps) -> None:
    """Of float16 as it is: a comparison in float32 that counts as well takes ten times as many instructions, which
    were what a pool waited for (ResNet-50's, 128 images: 103 us on an H200, 65 so)."""
    f, node = taps.f, taps.node
    type = node.dtype if node.dtype == "float16" else accumulator(node.dtype)
    low = start_of(KINDS["max"], node.dtype)
    f.emit(f"total = tl.full(({taps.block},), {low}, {LANGUAGE[type]})")
    for value, _ in taps.load(low):
        more = ", propagate_nan=tl.PropagateNan.ALL" * (node.dtype not in INTEGERS)
        f.emit(f"total = tl.maximum(total, {value}.to({LANGUAGE[type]}){more})")
    taps.store(0, converted("total", type, node.output.dtype))


def _counted(taps: Taps) -> None:
    """All others: how many elements a window has is counted beside its total."""
    f, node, a = taps.f, taps.node, taps.node.attributes
    type, places = accumulator(node.dtype), len(node.outputs) > 1
    low = start_of(KINDS["max"], node.dtype) if a["kind"] == "max" else "0"
    f.emit(f"total = tl.full(({taps.block},), {low}, {LANGUAGE[type]})\ncount = tl.zeros_like(total)")
    if places:
        f.emit(f"found = tl.zeros(({taps.block},), tl.int64)")
    for value, spots in taps.load("0"):
        f.emit(f"value = {value}.to({LANGUAGE[type]})")
        if a["kind"] == "lp":
            f.emit(f"power = libdevice.pow(tl.abs(value), tl.full((), {float(a['p'])}, {LANGUAGE[type]}))")
        if a["kind"] == "max":
            f.emit(f"better = {_BETTER}")
        if places:
            flat = offset(f, [*taps.outer, *spots], strides_of(node.input(0).shape))
            f.emit(f"found = tl.where(better, {flat}, found)")
        f.emit(f"total = {_STEPS[a['kind']]}\ncount += inside.to({LANGUAGE[type]})")
    taps.store(0, converted(_result(node, LANGUAGE[type]), type, node.output.dtype))
    if places:
        taps.store(1, "found")


def _result(node: Node, type: str) -> str:
    """What is made of the total of a window."""
    a = node.attributes
    if a["kind"] == "lp":
        return f"libdevice.pow(total, tl.full((), {1 / a['p']!r}, {type}))"
    counted = int(np.prod(a["kernel"])) if a["count_include_pad"] else "count"
    return "total" if a["kind"] == "max" else f"(total / {counted})"

"""Pool: windows of x, in either layout, one output element after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.ir.elementwise import INTEGERS
from ingot.kernels import kernel
from ingot.kernels.cuda.axes import memory_order, offset, strides_of, unravel
from ingot.kernels.cuda.build import LANGUAGE, CudaBuilder
from ingot.kernels.cuda.copying import same_layouts
from ingot.kernels.cuda.pointwise import block_for, element_index
from ingot.kernels.cuda.reduce import accumulator
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
    x, y, a = node.input(0), node.output, node.attributes
    block = block_for(y.elements, build.target.processors)
    f = build.function(warps=max(min(block // 128, 4), 1))  # of many elements 16 bytes a thread
    index, mask = element_index(f, y.elements, block)
    order = memory_order(len(y.shape), y.layout)
    places = dict(zip(order, unravel(f, index, [y.shape[i] for i in order]), strict=True))
    strides, type = strides_of(x.shape, x.layout), accumulator(node.dtype)
    base = f.let(f"{f.pointer(build.input(0))} + {offset(f, [places[0], places[1]], strides[:2])}")
    corners = [f.let(f"{places[axis + 2]} * {s} - {b}")
               for axis, (s, b) in enumerate(zip(a["strides"], a["pads"], strict=False))]  # fmt: skip
    f.emit(f"total = tl.zeros(({block},), {LANGUAGE[type]})\ncount = tl.zeros(({block},), {LANGUAGE[type]})")
    if len(node.outputs) > 1:
        f.emit(f"found = tl.zeros(({block},), tl.int64)")
    for tap in np.ndindex(*a["kernel"]):
        spots = [f.let(f"{c} + {t * d}") for c, t, d in zip(corners, tap, a["dilations"], strict=True)]
        held = [f"({spot} >= 0) & ({spot} < {f.extent(n)})" for spot, n in zip(spots, x.shape[2:], strict=True)]
        f.emit(f"inside = {' & '.join([mask, *held])}")
        f.emit(f"value = tl.load({base} + {offset(f, spots, strides[2:])}, inside, other=0).to({LANGUAGE[type]})")
        if a["kind"] == "lp":
            f.emit(f"power = libdevice.pow(tl.abs(value), tl.full((), {float(a['p'])}, {LANGUAGE[type]}))")
        if a["kind"] == "max":
            f.emit(f"better = {_BETTER}")
        if len(node.outputs) > 1:
            flat = offset(f, [places[0], places[1], *spots], strides_of(x.shape))
            f.emit(f"found = tl.where(better, {flat}, found)")
        f.emit(f"total = {_STEPS[a['kind']]}\ncount += inside.to({LANGUAGE[type]})")
    result = converted(_result(node, LANGUAGE[type]), type, y.dtype)
    f.emit(f"tl.store({f.pointer(build.output())} + {index}, {result}, {mask})")
    if len(node.outputs) > 1:
        f.emit(f"tl.store({f.pointer(build.output(1))} + {index}, found, {mask})")
    f.launch(ceil_div(y.elements, block))


def _result(node: Node, type: str) -> str:
    """What is made of the total of a window."""
    a = node.attributes
    if a["kind"] == "lp":
        return f"libdevice.pow(total, tl.full((), {1 / a['p']!r}, {type}))"
    counted = int(np.prod(a["kernel"])) if a["count_include_pad"] else "count"
    return "total" if a["kind"] == "max" else f"(total / {counted})"

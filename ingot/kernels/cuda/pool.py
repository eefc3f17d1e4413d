"""Pool: windows of x, in either layout, one output element after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

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
_STARTS = {"max": 'float("-inf")', "average": "0.0", "lp": "0.0"}
_STEPS = {"max": "tl.where(inside, tl.maximum(total, value, propagate_nan=tl.PropagateNan.ALL), total)",
          "average": "total + value", "lp": "total + power"}  # fmt: skip


def _applies(node: Node, target: Any) -> bool:
    taps = int(np.prod(node.attributes["kernel"]))
    return node.dtype in (*NARROW, *REAL) and len(node.outputs) == 1 and taps <= _MOST_TAPS


@kernel("Pool", on="cuda", when=_applies, layouts=same_layouts)
def pool(build: CudaBuilder, node: Node) -> None:
    """max, mean or p-norm over each window; what lies outside does not count"""
    x, y, a = node.input(0), node.output, node.attributes
    block = min(block_for(y.elements, build.target.processors), 512)
    f = build.function(warps=max(block // 128, 1))
    index, mask = element_index(f, y.elements, block)
    order = memory_order(len(y.shape), y.layout)
    places = dict(zip(order, unravel(f, index, [y.shape[i] for i in order]), strict=True))
    strides, type = strides_of(x.shape, x.layout), accumulator(node.dtype)
    base = f.let(f"{f.pointer(build.input(0))} + {offset(f, [places[0], places[1]], strides[:2])}")
    corners = [f.let(f"{places[axis + 2]} * {s} - {b}")
               for axis, (s, b) in enumerate(zip(a["strides"], a["pads"], strict=False))]  # fmt: skip
    f.emit(f"total = tl.full(({block},), {_STARTS[a['kind']]}, {LANGUAGE[type]})")
    f.emit(f"count = tl.zeros(({block},), {LANGUAGE[type]})")
    for tap in np.ndindex(*a["kernel"]):
        spots = [f.let(f"{c} + {t * d}") for c, t, d in zip(corners, tap, a["dilations"], strict=True)]
        held = [f"({spot} >= 0) & ({spot} < {f.extent(n)})" for spot, n in zip(spots, x.shape[2:], strict=True)]
        f.emit(f"inside = {' & '.join([mask, *held])}")
        f.emit(f"value = tl.load({base} + {offset(f, spots, strides[2:])}, inside, other=0).to({LANGUAGE[type]})")
        if a["kind"] == "lp":
            f.emit(f"power = libdevice.pow(tl.abs(value), tl.full((), {float(a['p'])}, {LANGUAGE[type]}))")
        f.emit(f"total = {_STEPS[a['kind']]}\ncount += inside.to({LANGUAGE[type]})")
    value = {"max": "total", "lp": f"libdevice.pow(total, tl.full((), {1 / a['p']!r}, {LANGUAGE[type]}))",
             "average": f"total / {int(np.prod(a['kernel'])) if a['count_include_pad'] else 'count'}"}[a["kind"]]  # fmt: skip
    f.emit(f"tl.store({f.pointer(build.output())} + {index}, {converted(value, type, y.dtype)}, {mask})")
    f.launch(ceil_div(y.elements, block))

"""Resize: every element is a weighted sum of a few of x, found through a table for each axis that changes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product as combinations
from typing import Any

import numpy as np

from ingot.ir.ops import complete
from ingot.ir.ops_resize import Sampling, Taps, taps
from ingot.kernels import kernel
from ingot.kernels.cuda.axes import memory_order, offset, strides_of, unravel
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder
from ingot.kernels.cuda.copying import movable, same_layouts
from ingot.kernels.cuda.pointwise import block_for, element_index
from ingot.kernels.cuda.render import NARROW, literal
from ingot.kernels.node import Node
from ingot.plan.extent import ceil_div

_MOST_TAPS = 64  # of all axes together
_WHOLE = (0.0, 1.0)


def _tables(node: Node) -> dict[int, Taps] | None:
    """The table of each axis that changes; None where one is not known before the run."""
    given, x = complete("Resize", node.attributes), node.input(0)
    rank = len(x.shape)
    regions = list(zip(given["roi"][:rank], given["roi"][rank:], strict=True)) or [_WHOLE] * rank
    found: dict[int, Taps] = {}
    for axis, (old, new, region) in enumerate(zip(x.shape, given["sizes"], regions, strict=True)):
        scale = given["scales"][axis] if given["scales"] else None
        if old == new and scale in (None, 1) and region == _WHOLE:
            continue
        if not isinstance(old, int) or not isinstance(new, int) or old == 0:
            return None
        sampling = Sampling(given["mode"], given["coordinate"], given["nearest"], given["cubic_a"],
                            bool(given["exclude_outside"]), bool(given["antialias"]), region)  # fmt: skip
        found[axis] = taps(old, new, scale or new / old, sampling)
    return found


def _applies(node: Node, target: Any) -> bool:
    tables, nearest = _tables(node), node.attributes["mode"] == "nearest"
    if tables is None:
        return False
    count = int(np.prod([table.indices.shape[1] for table in tables.values()]))
    return movable(node, target) and count <= _MOST_TAPS and (nearest or node.dtype in ("float32", *NARROW))


@kernel("Resize", on="cuda", when=_applies, layouts=same_layouts)
def resize(build: CudaBuilder, node: Node) -> None:
    """y[i, j, …] = Σ over taps of weight_i · weight_j · … · x[place_i, place_j, …]"""
    tables, y = _tables(node), node.output
    assert tables is not None
    block = block_for(y.elements, build.target.processors)
    f = build.function(warps=max(block // 256, 1))
    index, mask = element_index(f, y.elements, block)
    order = memory_order(len(y.shape), y.layout)
    places = dict(zip(order, unravel(f, index, [y.shape[a] for a in order]), strict=True))
    copies = all(table.indices.shape[1] == 1 for table in tables.values())
    rows = {axis: _looked_up(build, f, table, places[axis], mask, copies) for axis, table in tables.items()}
    terms = [_term(build, node, f, places, dict(zip(rows, chosen, strict=True)), mask)
             for chosen in combinations(*rows.values())]  # fmt: skip
    value = terms[0] if copies else f"({' + '.join(terms)})"
    outside = [_outside(build, f, table, places[axis], mask) for axis, table in tables.items() if table.outside.any()]
    if outside:
        number = literal(complete("Resize", node.attributes)["extrapolation"], y.dtype)
        value = f"tl.where({' | '.join(outside)}, {number}, {value})"
    f.emit(f"tl.store({f.pointer(build.output())} + {index}, {value}, {mask})")
    f.launch(ceil_div(y.elements, block))


Tap = tuple[str, str]  # variables with a place along the axis in x and its weight; no weight where elements are copied


def _looked_up(build: CudaBuilder, f: FunctionBuilder, table: Taps, place: str, mask: str, copies: bool) -> list[Tap]:
    """The taps of one axis."""
    count = table.indices.shape[1]
    indices = f.pointer(build.pack(np.ascontiguousarray(table.indices, np.int32)))
    if copies:
        return [(f.let(f"tl.load({indices} + {place}, {mask}, other=0)"), "")]
    weights = f.pointer(build.pack(np.ascontiguousarray(table.weights, np.float32)))
    return [(f.let(f"tl.load({indices} + {place} * {count} + {t}, {mask}, other=0)"),
             f.let(f"tl.load({weights} + {place} * {count} + {t}, {mask}, other=0)"))
            for t in range(count)]  # fmt: skip


def _outside(build: CudaBuilder, f: FunctionBuilder, table: Taps, place: str, mask: str) -> str:
    """A variable that says whether the place is outside the part of x that is cut out."""
    flags = f.pointer(build.pack(np.ascontiguousarray(table.outside, np.int8)))
    return f.let(f"tl.load({flags} + {place}, {mask}, other=0) != 0")


def _term(build: CudaBuilder, node: Node, f: FunctionBuilder, places: Mapping[int, str], chosen: Mapping[int, Tap],
          mask: str) -> str:  # fmt: skip
    """One element of x times its weights."""
    x = node.input(0)
    source = [chosen[a][0] if a in chosen else places[a] for a in range(len(x.shape))]
    value = f.let(f"tl.load({f.pointer(build.input(0))} + {offset(f, source, strides_of(x.shape, x.layout))}, {mask})")
    weights = [weight for _, weight in chosen.values() if weight]
    return f.let(" * ".join([f"{value}.to(tl.float32)", *weights])) if weights else value

"""Pad and Gather: elements from computed places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ingot.kernels import kernel
from ingot.kernels.cuda.axes import memory_order, offset, strides_of, unravel
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder
from ingot.kernels.cuda.copying import movable, same_layouts
from ingot.kernels.cuda.pointwise import block_for, element_index
from ingot.kernels.cuda.render import literal
from ingot.kernels.node import Node
from ingot.plan.extent import ceil_div, product


def _reflected(f: FunctionBuilder, place: str, size: str) -> str:
    period = f.let(f"tl.maximum(2 * ({size} - 1), 1)")
    folded = f.let(f"tl.abs({place}) % {period}")
    return f.let(f"tl.minimum(tl.where({folded} > {size} - 1, {period} - {folded}, {folded}), {size} - 1)")


_BORDERS: dict[str, Callable[[FunctionBuilder, str, str], str]] = {
    "reflect": _reflected,
    "edge": lambda f, place, size: f.let(f"tl.minimum(tl.maximum({place}, 0), {size} - 1)"),
    "wrap": lambda f, place, size: f.let(f"(({place} % {size}) + {size}) % {size}"),
    "constant": lambda f, place, size: place,
}


@kernel("Pad", on="cuda", when=movable, layouts=same_layouts)
def pad(build: CudaBuilder, node: Node) -> None:
    """Borders around x: a value, or elements of x"""
    x, y, mode = node.input(0), node.output, node.attributes["mode"]
    block = block_for(y.elements, build.target.processors)
    f = build.function(warps=max(block // 256, 1))
    index, mask = element_index(f, y.elements, block)
    order = memory_order(len(y.shape), y.layout)
    places = dict(zip(order, unravel(f, index, [y.shape[a] for a in order]), strict=True))
    begins, inside, source = node.attributes["pads"], [mask], []
    for axis, size in enumerate(x.shape):
        place = f.let(f"{places[axis]} - {begins[axis]}") if begins[axis] else places[axis]
        if mode == "constant" and x.shape[axis] != y.shape[axis]:
            inside.append(f"({place} >= 0) & ({place} < {f.extent(size)})")
        source.append(_BORDERS[mode](f, place, f.extent(size)) if x.shape[axis] != y.shape[axis] else place)
    strides = strides_of(x.shape, x.layout)
    other = literal(node.attributes["value"], y.dtype) if mode == "constant" else literal(0, y.dtype)
    f.emit(f"value = tl.load({f.pointer(build.input(0))} + {offset(f, source, strides)}, {' & '.join(inside)}, "
           f"other={other})")  # fmt: skip
    f.emit(f"tl.store({f.pointer(build.output())} + {index}, value, {mask})")
    f.launch(ceil_div(y.elements, block))


def _gathers(node: Node, target: Any) -> bool:
    return movable(node, target) and node.input(1).dtype in ("int32", "int64")


@kernel("Gather", on="cuda", when=_gathers)
def gather(build: CudaBuilder, node: Node) -> None:
    """y[o, k, i] = x[o, indices[k], i]; negative indices count from the end, others are kept within x. early: the
    launch behind may begin at once, as products there ask for their weights meanwhile"""
    x, axis = node.input(0), node.attributes["axis"]
    outside, count, inner = product(x.shape[:axis]), product(node.input(1).shape), product(x.shape[axis + 1 :])
    total = node.output.elements
    block = block_for(total, build.target.processors)
    f = build.function(warps=max(block // 256, 1))
    if node.attributes.get("early"):
        f.release()
    f.wait()
    index, mask = element_index(f, total, block)
    *outer, k, i = unravel(f, index, [count, inner] if outside == 1 else [outside, count, inner])
    size = f.extent(x.shape[axis])
    f.emit(f"at = tl.load({f.pointer(build.input(1))} + {k}, {mask}, other=0).to(tl.int32)")
    if node.input(1).given:
        f.wait()
    f.emit(f"at = tl.where(at < 0, at + {size}, at)")
    f.emit(f"at = tl.minimum(tl.maximum(at, 0), {size} - 1)")
    place = f"({outer[0]} * {size} + at)" if outer else "at"
    source = f"{place} * {f.extent(inner)} + {i}"
    f.emit(f"value = tl.load({f.pointer(build.input(0))} + {source}, {mask})")
    f.emit(f"tl.store({f.pointer(build.output())} + {index}, value, {mask})")
    f.launch(ceil_div(total, block))

"""Pointwise: an expression over broadcast operands, one element of the result after the other."""

from __future__ import annotations

from typing import Any

from ingot.ir.expression import operands_of
from ingot.kernels import PLAIN, Ports, kernel
from ingot.kernels.cuda.axes import HEADS, LAST, broadcast_strides, collapse, offset, ordered, strides_of, unravel
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder
from ingot.kernels.cuda.render import FLOAT8, can_render, converted, render
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, ceil_div

_QUANTIZED = ("int8", FLOAT8)
_FEW_CHANNELS = 8  # up to here a conversion of the layout is no reason for a tile of its own


def _applies(node: Node, target: Any) -> bool:
    ports = [p for p in node.inputs if p is not None]
    return len(ports) == len(node.inputs) and can_render(node.epilogue, [p.dtype for p in ports])


def _is_map(port: Port | None, shape: tuple[Extent, ...]) -> bool:
    return port is not None and port.constant is None and port.shape == shape


def _layouts(node: Node, target: Any) -> list[Ports]:
    """All row-major; all channels last, but for operands that are broadcast; conversions of images."""
    shape = node.output.shape
    if len(shape) < 3:
        return [PLAIN]
    maps = [_is_map(p, shape) for p in node.inputs]
    choices = [PLAIN, Ports(tuple(LAST if m else "" for m in maps), (LAST,))] if any(maps) else [PLAIN]
    if maps == [True] and len(shape) == 4 and node.output.dtype in _QUANTIZED:  # what attention gives, to bytes
        choices.append(Ports((HEADS,), (HEADS,)))
    if len(maps) == 1 and maps[0] and isinstance(shape[1], int) and shape[1] <= _FEW_CHANNELS:
        choices += [Ports(("plain",), (LAST,)), Ports((LAST,), ("plain",))]
    return choices


def block_for(elements: Extent, processors: int) -> int:
    """Elements a block: enough blocks for every processor, as few as that takes."""
    if not isinstance(elements, int):
        return 1024
    return next((b for b in (1024, 512, 256) if elements >= 2 * b * processors), 128)


def element_index(f: FunctionBuilder, elements: Extent, block: int) -> tuple[str, str]:
    """(index, mask) variables of a block of consecutive elements."""
    f.emit(f"index = tl.program_id(0) * {block} + tl.arange(0, {block})")
    f.emit(f"mask = index < {f.extent(elements)}")
    return "index", "mask"


def _replaceable(node: Node) -> list[int]:
    """Operands that every thread has read when it writes the same places."""
    y = node.output
    return [k for k, p in enumerate(node.inputs)
            if p is not None and (p.shape, p.layout) == (y.shape, y.layout) and p.bytes == y.bytes]  # fmt: skip


@kernel("Pointwise", on="cuda", when=_applies, layouts=_layouts, in_place=_replaceable)
def pointwise(build: CudaBuilder, node: Node) -> None:
    """y[i] = expression(operands[i])"""
    result = node.output
    used = operands_of(node.epilogue)
    strides = [broadcast_strides(node.input(k), result.shape) for k in used]
    target = strides_of(result.shape, result.layout)
    axes = collapse(ordered(result.shape, result.layout, [target, *strides]))
    block = block_for(result.elements, build.target.processors)
    f = build.function(warps=max(block // 256, 1))
    index, mask = element_index(f, result.elements, block)
    places = unravel(f, index, [a.size for a in axes])
    texts = {
        k: f.let(f"tl.load({f.pointer(build.input(k))} + ({offset(f, places, [a.strides[n + 1] for a in axes])})"
                 f"{_masked(axes, n + 1, mask)})")
        for n, k in enumerate(used)
    }  # fmt: skip
    operands = [texts.get(k, "") for k in range(len(node.inputs))]
    dtypes = [node.input(k).dtype for k in range(len(node.inputs))]
    value = render(f, node.epilogue, operands, dtypes)
    held = node.epilogue.dtype or dtypes[0]
    f.emit(f"tl.store({f.pointer(build.output())} + {index}, {converted(value, held, result.dtype)}, {mask})")
    f.launch(ceil_div(result.elements, block))


def _masked(axes: Any, operand: int, mask: str) -> str:
    """A scalar is loaded once, without a mask."""
    return "" if all(a.strides[operand] == 0 for a in axes) else f", {mask}"

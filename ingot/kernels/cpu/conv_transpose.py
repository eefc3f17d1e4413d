"""ConvTranspose, fp32, blocked output: one stride-1 convolution for each phase of the output.

Output position o = q·s + φ receives x[i] · w[k] where i·s = o + p − k·d, that is from the taps with
(φ + p − k·d) % s == 0. Taken from the last to the first they read x at q + (φ + p − k·d)/s, evenly spaced: a direct
convolution (conv.py) over q whose outputs lie s apart. The phases of all axes are the phases of the kernel.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.kernels import Ports, kernel
from ingot.kernels.cpu.build import KernelBuilder
from ingot.kernels.cpu.conv import (
    BYTES_PER_MICROSECOND,
    CYCLES_PER_MICROSECOND,
    DIRECT,
    SMALL_CHANNELS,
    WIDEST,
    cycles,
    direct_order,
)
from ingot.kernels.cpu.conv_epilogue import can_finish, epilogue_of, extra_layouts
from ingot.kernels.cpu.conv_shape import Direct, pack_weights
from ingot.kernels.cpu.conv_tile import emit_phase
from ingot.kernels.cpu.conv_window import Axis, balanced
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.node import Node
from ingot.plan.extent import Extent

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Part:
    """A phase along one axis: the taps it uses, in the order it reads x, and the axis of its convolution."""

    taps: tuple[int, ...]
    axis: Axis


def parts_of(input_: Extent, output: Extent, kernel_: int, stride: int, dilation: int, begin: int) -> list[Part]:
    """The phases along an axis; those without any output position are left out."""
    parts = []
    for phase in range(stride):
        count = _positions(output, stride, phase)
        taps = tuple(k for k in reversed(range(kernel_)) if (phase + begin - k * dilation) % stride == 0)
        first = (phase + begin - taps[0] * dilation) // stride if taps else 0
        step = dilation // math.gcd(stride, dilation)
        axis = Axis(input_, count, len(taps), 1, step, -first, 1, stride, phase, output)
        if count != 0:
            parts.append(Part(taps, axis))
    return parts


def _positions(output: Extent, stride: int, phase: int) -> Extent:
    """How many positions of an axis belong to a phase."""
    if isinstance(output, int):
        return max(output - phase + stride - 1, 0) // stride
    return f"({output}+{stride - 1 - phase})//{stride}"


def phases_of(node: Node) -> list[tuple[Part, ...]]:
    """All combinations of the axes' phases."""
    attributes, kernel_ = node.attributes, node.input(1).shape[2:]
    rank = len(kernel_)
    settings = attributes["strides"], attributes["dilations"], attributes["pads"][:rank]
    axes = zip(node.input(0).shape[2:], node.output.shape[2:], map(int, kernel_), *settings, strict=True)
    return list(itertools.product(*(parts_of(*axis) for axis in axes)))


def shape_of(node: Node, isa: Isa, parts: tuple[Part, ...], columns: int, vectors: int) -> Direct:
    """The convolution of one phase."""
    groups = node.attributes["group"]
    channels, outputs = (int(size) for size in node.input(1).shape[:2])
    block = isa.lanes if node.input(0).layout == "blocked" else 1
    counts = groups, channels // groups, outputs, block, isa.lanes
    axes = tuple(part.axis for part in parts)
    return Direct(axes, node.output.shape[0], *counts, columns, vectors, block * vectors * isa.lanes * 4)


def gathered(weight: Array, groups: int, parts: tuple[Part, ...]) -> Array:
    """w[C, O/g, *K] → [O, C/g, *K'] with the taps of a phase."""
    channels, outputs = weight.shape[:2]
    grouped = weight.reshape(groups, channels // groups, outputs, *weight.shape[2:])
    swapped = grouped.swapaxes(1, 2).reshape(groups * outputs, channels // groups, *weight.shape[2:])
    return swapped[np.ix_(*map(range, swapped.shape[:2]), *(part.taps for part in parts))]


def _applies(node: Node, isa: Isa) -> bool:
    x, weight = node.input(0), node.input(1)
    floats = x.dtype == weight.dtype == "float32" and isinstance(node.output.shape[1], int)
    return floats and weight.constant is not None and bool(_layouts(node, isa)) and can_finish(node, 2)


def _layouts(node: Node, isa: Isa) -> list[Ports]:
    channels, outputs = (int(size) for size in node.input(1).shape[:2])
    groups, extras = node.attributes["group"], extra_layouts(node, 2)
    if groups > 1 and outputs % isa.lanes:
        return []
    plain = [Ports(("plain", "", *extras), ("blocked",))] if channels // groups <= SMALL_CHANNELS else []
    blocked = groups == 1 or (channels // groups) % isa.lanes == 0
    return [*plain, *([Ports(("blocked", "", *extras), ("blocked",))] if blocked else [])]


def _vector_choices(node: Node, isa: Isa) -> tuple[int, ...]:
    return (1, 2, 3)


def _prune(node: Node, isa: Isa, vectors: int) -> bool:
    return vectors > -(-int(node.input(1).shape[1]) // isa.lanes)


def _shapes(node: Node, isa: Isa, vectors: int) -> list[tuple[tuple[Part, ...], Direct]]:
    widest = WIDEST[isa.registers][vectors]
    shapes = []
    for parts in phases_of(node):
        count = parts[-1].axis.output
        columns = balanced(count, widest) if isinstance(count, int) else widest
        shapes.append((parts, shape_of(node, isa, parts, columns, vectors)))
    return shapes


def _cost(node: Node, isa: Isa, vectors: int) -> float:
    shapes = [shape for _, shape in _shapes(node, isa, vectors)]
    batch = node.output.shape[0] if isinstance(node.output.shape[0], int) else 1
    weights = sum(shape.panels * shape.panel_bytes for shape in shapes)
    work = sum(cycles(shape, isa) for shape in shapes)
    return 1 + batch * work / CYCLES_PER_MICROSECOND + weights / BYTES_PER_MICROSECOND


@kernel("ConvTranspose", on="cpu", when=_applies, layouts=_layouts, prune=_prune, cost=_cost,
        space={"vectors": _vector_choices})  # fmt: skip
def conv_transpose_direct(build: KernelBuilder, node: Node, vectors: int) -> None:
    """A kernel phase for each phase of the output; work items as those of the direct convolution."""
    weight, groups = node.input(1).constant, node.attributes["group"]
    assert weight is not None
    x, epilogue = build.input(0), epilogue_of(build, node, 2)
    for parts, shape in _shapes(node, build.isa, vectors):
        packed = build.pack(pack_weights(gathered(weight, groups, parts), shape))
        emit_phase(build, shape, x, packed, epilogue, DIRECT, direct_order(shape))



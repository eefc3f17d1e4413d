"""Which input elements make up each output element of a resized axis, with what weights: baked in, or computed first.

A table is tap-major: indices (int32) and weights [taps, output]. Where extents are symbols a phase of its own computes
it, in double like `ir/ops_resize.taps`, so that both choose the same elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.ir.ops_resize import Sampling, Taps, taps
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.copying import multiply
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

INDEX_BYTES = 4
MOST_COMPUTED_TAPS = 16
TAPS = {"nearest": 1, "linear": 2, "cubic": 4}


@dataclass(frozen=True)
class Resized:
    """One axis that changes: extents before and after, the scale (0: their ratio), how it is sampled."""

    axis: int
    size: Extent
    output: Extent
    scale: float
    sampling: Sampling

    @property
    def static(self) -> bool:
        """Whether the table is known at build time."""
        return isinstance(self.size, int) and isinstance(self.output, int)

    @property
    def taps(self) -> Taps:
        """The table of a static axis."""
        assert isinstance(self.size, int) and isinstance(self.output, int)
        return taps(self.size, self.output, self.scale or self.output / self.size, self.sampling)

    @property
    def first(self) -> int:
        """Offset of the first tap from the element on the left."""
        if not self.sampling.antialias:
            return {"nearest": 0, "linear": 0, "cubic": -1}[self.sampling.mode]
        return int(np.floor(-{"linear": 1, "cubic": 2}[self.sampling.mode] / self.shrink)) + 1

    @property
    def shrink(self) -> float:
        """How much wider an antialiasing kernel is, inverted."""
        return min(self.scale, 1.0) if self.sampling.antialias else 1.0

    @property
    def computable(self) -> bool:
        """Whether a phase can compute the table of symbolic extents."""
        if self.sampling.coordinate == "tf_crop_and_resize" or (self.sampling.antialias and not self.scale):
            return False
        return self.sampling.mode == "nearest" or 2 - 2 * self.first <= MOST_COMPUTED_TAPS


@dataclass(frozen=True)
class Table:
    """Handles of the indices and the weights (none for nearest), and how many taps an output element has."""

    indices: Handle
    weights: Handle | None
    taps: int
    output: Extent

    def index(self, f: PhaseFunction, tap: Index, position: Index) -> Value:
        """The input element that a tap of an output position reads."""
        place = multiply(tap, f.extent(self.output)) + position
        return f.cast("sext", f.load("i32", f.pointer(self.indices), multiply(place, INDEX_BYTES)), "i64")

    def weight_at(self, f: PhaseFunction, tap: Index, position: Index, size: int) -> tuple[Value, Index]:
        """Pointer and byte offset of a weight of `size` bytes."""
        assert self.weights is not None
        return f.pointer(self.weights), multiply(multiply(tap, f.extent(self.output)) + position, size)


def resized_axes(node: Node, settings: dict[str, Any]) -> list[Resized]:
    """The axes that change, in order."""
    shape, result, rank = node.input(0).shape, node.output.shape, len(node.output.shape)
    roi = settings["roi"] or (0.0,) * rank + (1.0,) * rank
    scales = settings["scales"] or (0.0,) * rank
    axes = []
    for axis, (size, output, scale) in enumerate(zip(shape, result, scales, strict=True)):
        region = (roi[axis], roi[axis + rank])
        if size == output and scale in (0.0, 1.0) and region == (0.0, 1.0):
            continue
        sampling = Sampling(settings["mode"], settings["coordinate"], settings["nearest"], settings["cubic_a"],
                            bool(settings["exclude_outside"]), bool(settings["antialias"]), region)  # fmt: skip
        axes.append(Resized(axis, size, output, scale, sampling))
    return axes


def table_of(build: KernelBuilder, axis: Resized, weight: str) -> Table:
    """The table as constants, or as temporaries that a new phase fills; `weight` is the LLVM type of the weights."""
    weighted, bytes_of_weight = axis.sampling.mode != "nearest", 8 if weight == "double" else 4
    if axis.static:
        known = axis.taps
        indices = build.pack(np.ascontiguousarray(known.indices.T.astype(np.int32)))
        numbers = np.ascontiguousarray(known.weights.T.astype(np.float64 if weight == "double" else np.float32))
        return Table(indices, build.pack(numbers) if weighted else None, known.indices.shape[1], axis.output)
    count = 1 if not weighted else 2 - 2 * axis.first
    table = Table(
        build.temporary(product((axis.output, count, INDEX_BYTES))),
        build.temporary(product((axis.output, count, bytes_of_weight))) if weighted else None, count, axis.output,
    )  # fmt: skip

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        f.loop(begin, end, lambda position: _compute(f, axis, table, position, weight))

    build.phase(axis.output, body, grain=256)
    return table


# the computed table


def _compute(f: PhaseFunction, axis: Resized, table: Table, position: Value, weight: str) -> None:
    """All taps of one output position."""
    size = f.index(f.extent(axis.size))
    place = _place(f, axis, position, size)
    if axis.sampling.mode == "nearest":
        chosen = f.cast("fptosi", _ROUNDINGS[axis.sampling.nearest](f, place), "i64")
        _store_index(f, table, 0, position, chosen, size)
        return
    left = f.call("llvm.floor", "double", place)
    fraction, base = place - left, f.cast("fptosi", left, "i64")
    indices = [base + (axis.first + tap) for tap in range(table.taps)]
    weights = [_weight(f, axis, fraction, axis.first + tap) for tap in range(table.taps)]
    if axis.sampling.antialias:
        weights = _normalised(f, weights)
    if axis.sampling.exclude_outside:
        inside = [f.compare("ult", index, size) for index in indices]
        weights = _normalised(f, [f.select(ok, w, 0.0) for ok, w in zip(inside, weights, strict=True)])
    for tap, (index, value) in enumerate(zip(indices, weights, strict=True)):
        _store_index(f, table, tap, position, index, size)
        rounded = f.cast("fptrunc", value, weight) if weight == "float" else value
        f.store(rounded, *table.weight_at(f, tap, position, 4 if weight == "float" else 8))


def _store_index(f: PhaseFunction, table: Table, tap: int, position: Value, index: Value, size: Value) -> None:
    clamped = f.index(f.maximum(f.minimum(index, size - 1), 0))
    place = multiply(multiply(tap, f.extent(table.output)) + position, INDEX_BYTES)
    f.store(f.cast("trunc", clamped, "i32"), f.pointer(table.indices), place)


def _normalised(f: PhaseFunction, weights: list[Value]) -> list[Value]:
    """Weights divided by their sum, unless that is 0."""
    total = weights[0]
    for value in weights[1:]:
        total = total + value
    divisor = f.select(f.compare("oeq", total, 0.0), 1.0, total)
    return [f.binary("fdiv", value, divisor) for value in weights]


def _weight(f: PhaseFunction, axis: Resized, fraction: Value, offset: int) -> Value:
    distance = f.call("llvm.fabs", "double", float(offset) - fraction) * axis.shrink
    if axis.sampling.mode == "linear":
        return f.call("llvm.maxnum", "double", 1.0 - distance, 0.0)
    a = axis.sampling.cubic_a
    near = ((distance * (a + 2) - (a + 3)) * distance) * distance + 1.0
    far = ((distance * a - 5 * a) * distance + 8 * a) * distance - 4 * a
    beyond = f.select(f.compare("olt", distance, 2.0), far, 0.0)
    return f.select(f.compare("ole", distance, 1.0), near, beyond)


def _floor(f: PhaseFunction, place: Value) -> Value:
    return f.call("llvm.floor", "double", place)


def _ceil(f: PhaseFunction, place: Value) -> Value:
    return f.call("llvm.ceil", "double", place)


_ROUNDINGS: dict[str, Callable[[PhaseFunction, Value], Value]] = {
    "round_prefer_floor": lambda f, place: _ceil(f, place - 0.5),
    "round_prefer_ceil": lambda f, place: _floor(f, place + 0.5),
    "floor": _floor,
    "ceil": _ceil,
}


def _place(f: PhaseFunction, axis: Resized, position: Value, size: Value) -> Value:
    """Where on the input's axis the output position lies, in double."""
    target, length = f.cast("sitofp", position, "double"), f.cast("sitofp", size, "double")
    output = f.cast("sitofp", f.index(f.extent(axis.output)), "double")
    scale = f.constant("double", axis.scale) if axis.scale else f.binary("fdiv", output, length)
    exact = scale * length
    half = f.binary("fdiv", target + 0.5, scale)
    match axis.sampling.coordinate:
        case "align_corners":
            whole = f.binary("fdiv", target * (length - 1.0), exact - 1.0)
            return f.select(f.compare("oeq", exact, 1.0), 0.0, whole)
        case "asymmetric":
            return f.binary("fdiv", target, scale)
        case "pytorch_half_pixel":
            return f.select(f.compare("oeq", exact, 1.0), -0.5, half - 0.5)
        case "half_pixel_symmetric":
            centre = f.binary("fdiv", length, 2.0) * (1.0 - f.binary("fdiv", output, exact))
            return half - 0.5 + centre
        case "tf_half_pixel_for_nn":
            return half
        case _:
            return half - 0.5

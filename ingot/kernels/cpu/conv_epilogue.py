"""Epilogues of kernels over feature maps: extras are scalars, vectors along the channels, or full maps.

Blocked kernels finish vectors of channels (`block_values`, `finish`), plain ones vectors of pixels (`finish_pixels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ingot.dtypes import size_of
from ingot.ir.expression import Expression
from ingot.kernels.cpu.bounds import Known, of_constant, of_dtype
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.render import broadcast, can_render, load, render_expression, store
from ingot.kernels.layout import to_blocked
from ingot.kernels.node import Node, Port

Kind = Literal["scalar", "channel", "full"]
INLINE_LIMIT = 400  # IR lines of rendered epilogue per tile above which it becomes a loop


@dataclass(frozen=True)
class Extra:
    """An epilogue operand; `padded` to whole vectors where it is a constant."""

    kind: Kind
    handle: Handle
    dtype: str
    padded: bool
    bounds: Known = None


@dataclass(frozen=True)
class Epilogue:
    """The expression, its extras and where the result goes."""

    expression: Expression
    extras: tuple[Extra, ...]
    accumulator: str
    output: Handle
    dtype: str
    channels: int
    lanes: int
    sums: Known = None

    @property
    def bounds(self) -> list[Known]:
        """What is known of the operands' values."""
        return [self.sums, *(extra.bounds for extra in self.extras)]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """dtypes of the expression's operands."""
        return (self.accumulator, *(extra.dtype for extra in self.extras))

    @property
    def size(self) -> int:
        """Bytes of an output element."""
        return size_of(self.dtype)


def kind_of(port: Port, output: Port) -> Kind | None:
    """How an operand broadcasts over the output [N, C, *S]; None for a way that epilogues do not have."""
    rank = len(output.shape)
    aligned = (1,) * (rank - len(port.shape)) + port.shape
    if all(size == 1 for size in port.shape):
        return "scalar"
    if aligned == (1, output.shape[1], *(1,) * (rank - 2)) and (port.constant is not None or aligned != output.shape):
        return "channel"
    return "full" if port.shape == output.shape else None


def extras_of(node: Node, first: int) -> list[Port]:
    """The epilogue's operands, which start at input `first`."""
    return [port for port in node.inputs[first:] if port is not None]


def residuals(node: Node) -> list[int]:
    """Extras of the output's shape and element size (for `in_place`): each element is read right before the output's is
    written, by kernels that make every element once."""
    same = size_of(node.output.dtype)
    return [
        index
        for index, port in enumerate(node.inputs)
        if index > 1 and port is not None and kind_of(port, node.output) == "full" and size_of(port.dtype) == same
    ]


def can_finish(node: Node, first: int, accumulator: str = "float32") -> bool:
    """Whether the node's epilogue has vector code."""
    extras = extras_of(node, first)
    dtypes = [accumulator, *(port.dtype for port in extras)]
    kinds = (kind_of(port, node.output) for port in extras)
    return all(kinds) and can_render(node.epilogue, [*dtypes, node.output.dtype])


def extra_layouts(node: Node, first: int) -> tuple[str, ...]:
    """Port layouts of the epilogue's operands for a blocked output."""
    full = (kind_of(port, node.output) == "full" and port.constant is None for port in extras_of(node, first))
    return tuple("blocked" if blocked else "" for blocked in full)


def epilogue_of(build: KernelBuilder, node: Node, first: int, accumulator: str = "float32",
                lanes: int | None = None, sums: Known = None) -> Epilogue:  # fmt: skip
    """Claim the operands of the node's epilogue and its output; `sums`: what is known of the accumulators."""
    channels = node.output.shape[1]
    assert isinstance(channels, int)
    extras = tuple(_extra(build, node, first + i) for i in range(len(extras_of(node, first))))
    lanes = lanes or build.isa.lanes
    return Epilogue(node.epilogue, extras, accumulator, build.output(), node.output.dtype, channels, lanes, sums)


def _extra(build: KernelBuilder, node: Node, index: int) -> Extra:
    port = node.input(index)
    kind, lanes = kind_of(port, node.output), build.isa.lanes
    assert kind is not None
    known = of_dtype(port.dtype) if kind == "full" or port.constant is None else of_constant(port.constant)
    if node.output.layout == "plain":
        return Extra(kind, build.input(index), port.dtype, False, known)
    if kind == "channel" and port.constant is not None:
        return Extra(kind, build.pack(_padded(port.constant.ravel(), lanes)), port.dtype, True, known)
    if kind == "full" and port.constant is not None:
        return Extra(kind, build.pack(to_blocked(port.constant, lanes)), port.dtype, True, known)
    return Extra(kind, build.input(index), port.dtype, False, known)


def _padded(vector: np.ndarray[Any, Any], lanes: int) -> np.ndarray[Any, Any]:
    """Ones behind the last element, up to whole groups of vectors."""
    whole = np.ones(-(-len(vector) // lanes) * lanes, vector.dtype)
    whole[: len(vector)] = vector
    return whole


def block_values(f: PhaseFunction, epilogue: Epilogue, block: Index) -> list[Value | None]:
    """Scalars and channel vectors of a channel block in register form, None for full operands."""
    return [_block_value(f, epilogue, extra, block) for extra in epilogue.extras]


def _block_value(f: PhaseFunction, epilogue: Epilogue, extra: Extra, block: Index) -> Value | None:
    lanes, pointer = epilogue.lanes, f.pointer(extra.handle)
    if extra.kind == "scalar":
        return broadcast(f, extra.dtype, pointer, 0, lanes)
    if extra.kind == "full":
        return None
    first = block * lanes
    whole = extra.padded or epilogue.channels % lanes == 0
    mask = None if whole else f.first_lanes(epilogue.channels - first, lanes)
    return load(f, extra.dtype, pointer, first * size_of(extra.dtype), lanes, mask)


def finish(f: PhaseFunction, epilogue: Epilogue, accumulator: Value, values: Sequence[Value | None], element: Index,
           displacement: int = 0) -> None:  # fmt: skip
    """Apply the epilogue to one channel vector and store it at output element `element + displacement`."""
    result = finished(f, epilogue, accumulator, values, element, displacement)
    target = f.at(f.pointer(epilogue.output), element * epilogue.size)
    store(f, epilogue.dtype, result, target, displacement * epilogue.size)


def finished(f: PhaseFunction, epilogue: Epilogue, accumulator: Value, values: Sequence[Value | None], element: Index,
             displacement: int = 0) -> Value:  # fmt: skip
    """The epilogue's result for a channel vector of output element `element + displacement`, in register form."""
    operands = [accumulator]
    for extra, value in zip(epilogue.extras, values, strict=True):
        if value is None:
            pointer = f.at(f.pointer(extra.handle), element * size_of(extra.dtype))
            value = load(f, extra.dtype, pointer, displacement * size_of(extra.dtype), epilogue.lanes)
        operands.append(value)
    return render_expression(f, epilogue.expression, operands, epilogue.dtypes, epilogue.lanes, epilogue.bounds)


def finish_pixels(f: PhaseFunction, epilogue: Epilogue, accumulator: Value, channel: Index, element: Index,
                  mask: Value) -> None:  # fmt: skip
    """Apply the epilogue to pixels of one channel and store those of the mask at plain output element `element`."""
    operands = [accumulator]
    for extra in epilogue.extras:
        pointer, size = f.pointer(extra.handle), size_of(extra.dtype)
        if extra.kind == "full":
            operands.append(load(f, extra.dtype, pointer, element * size, epilogue.lanes, mask))
        else:
            place = channel * size if extra.kind == "channel" else 0
            operands.append(broadcast(f, extra.dtype, pointer, place, epilogue.lanes))
    result = render_expression(f, epilogue.expression, operands, epilogue.dtypes, epilogue.lanes, epilogue.bounds)
    store(f, epilogue.dtype, result, f.pointer(epilogue.output), element * epilogue.size, mask)


def rendered_lines(epilogue: Epilogue) -> int:
    """IR lines that one vector's epilogue takes: what unrolling it costs."""
    trial = PhaseFunction("trial", ())
    lanes = epilogue.lanes
    operands = [broadcast(trial, dtype, Value(trial, "ptr", "%p"), 0, lanes) for dtype in epilogue.dtypes]
    before = len(trial.lines)
    render_expression(trial, epilogue.expression, operands, epilogue.dtypes, lanes, epilogue.bounds)
    return len(trial.lines) - before

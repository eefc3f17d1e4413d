"""The sizes of a Mixture, and what its launches have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.dtypes import size_of
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.render import converted, render
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

Array = np.ndarray[Any, Any]
X, SCORES, GATE, UP, DOWN, *SCALES, NORM, MAIN = range(10)
_COMPARED = 1 << 14  # scores with each other at once
_MOST_FEW = 8


@dataclass(frozen=True)
class Mix:
    """`rows` of `width`, of which each passes `chosen` of `count` experts with `inner` columns between their products;
    `kept`: the type of rows, `weights`: that of weights."""

    rows: Extent
    width: int
    inner: int
    count: int
    chosen: int
    normalised: int
    kept: str
    weights: str

    @classmethod
    def of(cls, node: Node) -> Mix:
        """Of a node."""
        count, width, inner = map(int, node.input(GATE).shape)
        stated = node.attributes
        return cls(node.input(X).shape[0], width, inner, count, int(stated["chosen"]), int(stated["normalised"]),
                   node.dtype, node.input(GATE).dtype)  # fmt: skip

    @property
    def few(self) -> int:
        """Rows whose chosen experts are mostly different ones: each reads its own."""
        return max(min(_MOST_FEW, self.count // (2 * self.chosen)), 1)

    @property
    def size(self) -> int:
        """Elements of a block that holds a score of each expert."""
        return power_of_two(self.count)

    @property
    def pairs(self) -> Extent:
        """Of a row and an expert."""
        return product((self.rows, self.chosen))

    @property
    def bytes_of_inner(self) -> Extent:
        """What lies between the products."""
        return product((self.pairs, self.inner, size_of(self.kept)))

    def ranks(self, f: FunctionBuilder, scores: str) -> None:
        """`found`: how many scores of a row come before each."""
        step = max(min(_COMPARED // self.size, self.size), 1)
        f.emit(f"found = {f.core('mixture', 'ranks')}({scores}, {self.count}, {self.size}, {step})")

    def shares(self, f: FunctionBuilder, scores: str) -> None:
        """`share`: of each expert."""
        f.emit(f"share = {f.core('mixture', 'shares')}({scores}, found, {self.chosen}, {bool(self.normalised)}, "
               f"{self.count}, {self.size})")  # fmt: skip


@dataclass(frozen=True)
class Stacks:
    """Weights [experts, columns, depth] of gate, up and down, and the scales [experts, columns] of each, if any."""

    gate: Handle
    up: Handle
    down: Handle
    scales: tuple[Handle | None, ...]

    @classmethod
    def of(cls, build: CudaBuilder, arrays: Sequence[Array]) -> Stacks:
        """Of a step's arrays, gate, up and down."""
        gate, up, down = map(build.pack, arrays)
        return cls(gate, up, down, tuple(build.input(k) if build.node.has_input(k) else None for k in SCALES))

    def scale(self, f: FunctionBuilder, number: int, place: str, mask: str = "") -> str:
        """Text of scales of the stack: those at a place, times what stands before; "" where it has none."""
        handle = self.scales[number]
        return "" if handle is None else f" * tl.load({f.pointer(handle)} + {place}{mask}).to(tl.float32)"


def operands_in(node: Node) -> range:
    """Inputs that the expression reads."""
    return range(MAIN, len(node.inputs))


def finish(f: FunctionBuilder, build: CudaBuilder, sums: str, place: str, inside: str) -> None:
    """The expression of the sums and its operands to their places in the result."""
    node, mask = build.node, f", {inside}" if inside else ""
    operands = [f.let(f"tl.load({f.pointer(build.input(k))} + {place}{mask})") for k in operands_in(node)]
    dtypes = ["float32", *(node.input(k).dtype for k in operands_in(node))]
    made = converted(render(f, node.epilogue, [sums, *operands], dtypes), node.epilogue.dtype or "float32",
                     node.output.dtype)  # fmt: skip
    f.emit(f"tl.store({f.pointer(build.output())} + {place}, {made}{mask})")

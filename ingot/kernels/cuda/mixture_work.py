"""The sizes of a Mixture, and what its launches have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.rows import power_of_two
from ingot.kernels.cuda.words import Array
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

X, SCORES, GATE, UP, DOWN, *SCALES, NORM = range(9)
MOST_EXPERTS = 4096  # whose places fit into the bits that 16-bit scores leave
_MOST_FEW = 8


@dataclass(frozen=True)
class Mix:
    """`rows` of `width`, of which each passes `chosen` of `count` experts with `inner` columns between their products;
    `kept`: the type of rows, `weights`: that of weights; wide: scores have 32 bits."""

    rows: Extent
    width: int
    inner: int
    count: int
    chosen: int
    normalised: int
    kept: str
    weights: str
    wide: bool

    @classmethod
    def of(cls, node: Node) -> Mix:
        """Of a node."""
        count, width, inner = map(int, node.input(GATE).shape)
        stated = node.attributes
        return cls(node.input(X).shape[0], width, inner, count, int(stated["chosen"]), int(stated["normalised"]),
                   node.dtype, node.input(GATE).dtype, node.input(SCORES).dtype == "float32")  # fmt: skip

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

    def order(self, f: FunctionBuilder, scores: str) -> None:
        """`found`: keys of a row's scores."""
        f.emit(f"found = {f.core('mixture', 'keys')}({scores}, {self.count}, {self.size}, {self.wide})")

    def pass_over(self, f: FunctionBuilder) -> None:
        """The largest of the keys is none of them any more."""
        f.emit(f"found = {f.core('mixture', 'without')}(found, tl.max(found, 0), {self.wide})")

    def expert(self, f: FunctionBuilder, key: str) -> str:
        """Text of the expert whose key it is."""
        return f"{f.core('mixture', 'place_of')}({key}, {self.size})"

    def choose(self, f: FunctionBuilder, scores: str) -> None:
        """`expert0`, `share0`, … of a row, the best first."""
        self.order(f, scores)
        for slot in range(self.chosen):
            f.emit(f"best{slot} = tl.max(found, 0)\nexpert{slot} = {self.expert(f, f'best{slot}')}")
            f.emit(f"score{slot} = {f.core('mixture', 'score_of')}(best{slot}, {self.size}, {self.wide})")
            f.emit(f"power{slot} = tl.exp(score{slot} - score0)")
            if slot + 1 < self.chosen:
                self.pass_over(f)
        every = f"{f.core('mixture', 'powers')}({scores}, score0, {self.count}, {self.size})"
        chosen = " + ".join(f"power{slot}" for slot in range(self.chosen))
        f.emit(f"whole = {chosen if self.normalised else every}")
        for slot in range(self.chosen):
            f.emit(f"share{slot} = power{slot} / whole")


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

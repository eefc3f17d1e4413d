"""Weights of one row's columns, streamed: a block has some columns, and goes through their depth step by step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from ingot.dtypes import size_of
from ingot.kernels.cuda.architecture import EIGHTHS_FROM
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder
from ingot.kernels.cuda.paged_update import LARGEST
from ingot.kernels.cuda.render import NARROW
from ingot.kernels.cuda.words import WORD, Array, numbers, order_of, parted, places

_WEIGHTS = (*NARROW, "float32", "float8_e4m3fn")
_MULTIPLES = {1: 16, 2: 2, 4: 1}  # of a depth, for weights of so many bytes: they are loaded as words
Rows = list[list[str]]  # for every step the variables with its numbers


def can_stream(weights: str, rows: str, depths: Iterable[int], target: Any) -> bool:
    """Whether weights of a type can be multiplied by rows of another, along depths of these sizes."""
    if weights not in _WEIGHTS or rows not in (*NARROW, "float32") or (weights == "float32" and rows != "float32"):
        return False
    if weights in LARGEST and target.capability < EIGHTHS_FROM:
        return False
    return not any(depth % _MULTIPLES[size_of(weights)] for depth in depths)


def stored(weights: Array) -> Array:
    """Weights [..., K, N] as they lie in the engine: [..., N, K], in the order that a row's words are multiplied in."""
    turned, order = weights.swapaxes(-1, -2), order_of(weights.shape[-2], weights.dtype.name)
    return np.ascontiguousarray(turned if order is None else turned[..., order])


@dataclass(frozen=True)
class Block:
    """A block's columns, the depth of a step, its warps."""

    columns: int
    depth: int
    warps: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "4x1024w4"."""
        found = re.fullmatch(r"(\d+)x(\d+)w(\d+)", text)
        assert found is not None, text
        return cls(*map(int, found.groups()))


@dataclass(frozen=True)
class Streaming:
    """A launch that is being written: `depth` numbers of a row with columns of a matrix of `dtype`, block by block."""

    f: FunctionBuilder
    block: Block
    depth: int
    dtype: str

    @classmethod
    def opened(cls, build: CudaBuilder, block: Block, depth: int, dtype: str) -> Self:
        """Of a new function, with a step's `words` and the block's `lanes`."""
        made = cls(build.function(warps=block.warps, stages=1, early=True), block, depth, dtype)
        made.f.emit(f"words = tl.arange(0, {block.depth // made.each})\nlanes = tl.arange(0, {block.columns})")
        return made

    @property
    def each(self) -> int:
        """Weights in a word."""
        return WORD // size_of(self.dtype)

    @property
    def starts(self) -> range:
        """Where steps begin."""
        return range(0, self.depth, self.block.depth)

    def groups(self, parts: int, most: int) -> list[range]:
        """The same, those together whose weights a thread asks for together: `most` bytes of `parts` matrices, but one
        step at least."""
        block, starts = self.block, self.starts
        step = block.columns * parts * block.depth * size_of(self.dtype) // (32 * block.warps)
        count = max(most // max(step, 1), 1)
        return [starts[k : k + count] for k in range(0, len(starts), count)]

    def _mask(self, start: int, across: str = "") -> str:
        """Of the words of a step, where it is not full."""
        if start + self.block.depth <= self.depth:
            return ""
        return f", (words < {(self.depth - start) // self.each}){across}, other=0"

    def row(self, pointer: str, dtype: str, starts: Sequence[int]) -> Rows:
        """For every step the row's numbers in float32, as the words of the weights have them."""
        f, pair, steps = self.f, WORD // size_of(dtype), Rows()
        pointer = pointer if dtype == "float32" else f"({pointer}).to(tl.pointer_type(tl.int32))"
        for start in starts:
            found = list[str]()
            for place in places(self.each, pair):
                word = f.let(f"tl.load({pointer} + {start // pair} + {place}{self._mask(start)})")
                found += [word] if dtype == "float32" else numbers(f, word, dtype, "x")
            steps.append(found)
        return steps

    def norms(self, build: CudaBuilder, index: int) -> Rows:
        """The same of the scales of a norm, the node's input `index`; none where there is no norm."""
        if not build.node.has_input(index):
            return []
        scale, f, line = build.node.input(index).constant, self.f, self.depth // self.each
        assert scale is not None
        pointer = f.pointer(build.pack(parted(scale.astype(np.float32), self.each)))
        return [[f.let(f"tl.load({pointer} + {k * line + start // self.each} + words{self._mask(start)})", "s")
                 for k in range(self.each)] for start in self.starts]  # fmt: skip

    def normalised(self, row: Rows, norms: Rows, epsilon: float) -> tuple[Rows, str]:
        """The row times the norm's scales, and text of what its sums are to be multiplied by."""
        if not norms:
            return row, ""
        self.f.emit(f"squares = {' + '.join(f'{x} * {x}' for xs in row for x in xs)}")
        made = [[self.f.let(f"{x} * {s}", "x") for x, s in zip(xs, ss, strict=True)]
                for xs, ss in zip(row, norms, strict=True)]  # fmt: skip
        self.f.emit(f"square = tl.sum(squares, 0) / {self.depth} + {epsilon!r}")
        return made, " * (1.0 / libdevice.sqrt(square))"

    def word(self, place: str, start: int) -> str:
        """A variable with the words of the columns of a step."""
        return self.f.let(f"tl.load({place}{self._mask(start, '[None, :]')}, eviction_policy='evict_first')", "w")

    def multiply(self, sums: str, words: str, row: Sequence[str], fresh: bool) -> None:
        """sums [columns, words] += the numbers of the words times those of the row; `fresh`: the sums begin."""
        for place, (value, x) in enumerate(zip(numbers(self.f, words, self.dtype, "v"), row, strict=True)):
            self.f.emit(f"{sums} {'=' if fresh and place == 0 else '+='} {value} * {x}[None, :]")

"""Projection of one row: weights stream through registers once, the norm and the expression are in the same launch.

A block asks for the weights of its columns before it waits for the row; those that find a processor before the launch
before them has ended keep the memory busy meanwhile. Weights travel as words of 32 bits, and become numbers there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.dtypes import size_of
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.render import converted, render
from ingot.kernels.cuda.words import WORD, numbers, parted, places
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

Array = np.ndarray[Any, Any]
MAIN = {"Projection": 3, "QuantizedProjection": 5}  # inputs before the expression's operands
_BYTES_AHEAD = 256  # of weights that a thread asks for before it needs them


@dataclass(frozen=True)
class Work:
    """The sizes of a Projection: `columns` of the result, `parts` of them in the weights."""

    rows: Extent
    columns: int
    depth: int
    parts: int

    @classmethod
    def of(cls, node: Node) -> Work:
        """Of a node."""
        depth, width = map(int, node.input(1).shape)
        parts = int(node.attributes["parts"])
        return cls(product(node.input(0).shape[:-1]), width // parts, depth, parts)


@dataclass(frozen=True)
class Stream:
    """A block's columns, the depth of a step, its warps."""

    columns: int
    depth: int
    warps: int
    dtype: str = "bfloat16"

    @classmethod
    def parse(cls, text: str, dtype: str = "bfloat16") -> Stream:
        """Of "4x1024w4"."""
        numbers = re.fullmatch(r"(\d+)x(\d+)w(\d+)", text)
        assert numbers is not None, text
        columns, depth, warps = map(int, numbers.groups())
        return cls(columns, depth, warps, dtype)

    @property
    def each(self) -> int:
        """Weights in a word."""
        return WORD // size_of(self.dtype)

    def held(self, work: Work) -> int:
        """Steps whose weights a thread asks for together."""
        step = self.columns * work.parts * self.depth * size_of(self.dtype) // (32 * self.warps)
        return max(_BYTES_AHEAD // max(step, 1), 1)


def stream(build: CudaBuilder, work: Work, packed: Handle, shape: Stream) -> None:
    """The launch for one row: a block is a group of columns."""
    f, node = build.function(warps=shape.warps, stages=1, early=True), build.node
    f.emit(f"words = tl.arange(0, {shape.depth // shape.each})\nlanes = tl.arange(0, {shape.columns})")
    f.emit(f"columns = tl.program_id(0) * {shape.columns} + lanes")
    held = _weights(f, work, packed, shape, 0, min(-(-work.depth // shape.depth), shape.held(work)))
    norms = _scales(f, build, work, shape) if node.has_input(2) else []
    f.wait()
    row, scaled = _row(f, build, work, shape), ""
    if norms:
        f.emit(f"squares = {' + '.join(f'{x} * {x}' for xs in row for x in xs)}")
        row = [[f.let(f"{x} * {s}", "x") for x, s in zip(xs, ss, strict=True)]
               for xs, ss in zip(row, norms, strict=True)]  # fmt: skip
        f.emit(f"square = tl.sum(squares, 0) / {work.depth} + {node.attributes['epsilon']!r}")
        scaled = " * (1.0 / libdevice.sqrt(square))"
    count = len(held) // work.parts
    for start in range(0, len(row), count):
        stop = min(start + count, len(row))
        words = held if start == 0 else _weights(f, work, packed, shape, start, stop)
        _multiply(f, work, shape, words, row[start:stop], start == 0)
    sums = [f.let(f"tl.sum(sums{part}, 1){scaled}") for part in range(work.parts)]
    inside = "" if work.columns % shape.columns == 0 else f"columns < {work.columns}"
    store(f, build, sums, of_columns(f, build, inside), "columns", inside)
    f.launch(-(-work.columns // shape.columns))


def _row(f: FunctionBuilder, build: CudaBuilder, work: Work, shape: Stream) -> list[list[str]]:
    """For every step of the row its numbers in float32, as the words of the weights have them."""
    pointer, dtype, steps = f.pointer(build.input(0)), build.node.input(0).dtype, []
    pair = WORD // size_of(dtype)  # numbers of a word of the row
    if dtype != "float32":
        pointer = f"{pointer}.to(tl.pointer_type(tl.int32))"
    for start in range(0, work.depth, shape.depth):
        rest = (work.depth - start) // shape.each
        mask = f", words < {rest}, other=0" if start + shape.depth > work.depth else ""
        found = list[str]()
        for place in places(shape.each, pair):
            word = f.let(f"tl.load({pointer} + {start // pair} + {place}{mask})")
            found += [word] if dtype == "float32" else numbers(f, word, dtype, "x")
        steps.append(found)
    return steps


def _scales(f: FunctionBuilder, build: CudaBuilder, work: Work, shape: Stream) -> list[list[str]]:
    """The same of the norm's scales."""
    scale = build.node.input(2).constant
    assert scale is not None
    pointer, steps = f.pointer(build.pack(parted(scale.astype(np.float32), shape.each))), []
    for start in range(0, work.depth, shape.depth):
        rest = (work.depth - start) // shape.each
        mask = f", words < {rest}, other=0.0" if start + shape.depth > work.depth else ""
        steps.append([f.let(f"tl.load({pointer} + {k * work.depth // shape.each + start // shape.each} + words{mask})",
                            "s") for k in range(shape.each)])  # fmt: skip
    return steps


def _weights(f: FunctionBuilder, work: Work, packed: Handle, shape: Stream, start: int, stop: int) -> list[str]:
    """Variables with the words of steps `start` to `stop` of the block's columns, for every part."""
    line = work.depth // shape.each
    column = f.let(f"tl.minimum(columns, {work.columns - 1}) * {line}", "c")
    whole = f"{f.pointer(packed)}.to(tl.pointer_type(tl.int32))"
    base, names = f.let(f"{whole} + {column}[:, None] + words[None, :]", "p"), []
    for step in range(start, stop):
        rest = line - step * shape.depth // shape.each
        mask = f", (words < {rest})[None, :], other=0" if rest < shape.depth // shape.each else ""
        for part in range(work.parts):
            place = step * shape.depth // shape.each + part * work.columns * line
            names.append(f.let(f"tl.load({base} + {place}{mask}, eviction_policy='evict_first')", "w"))
    return names


def _multiply(f: FunctionBuilder, work: Work, shape: Stream, held: Sequence[str], row: Sequence[Sequence[str]],
              first: bool) -> None:  # fmt: skip
    """The sums of the columns, spread along the depth."""
    for number, xs in enumerate(row):
        for part in range(work.parts):
            values = numbers(f, held[number * work.parts + part], shape.dtype, "v")
            for place, (value, x) in enumerate(zip(values, xs, strict=True)):
                how = "=" if first and number == 0 and place == 0 else "+="
                f.emit(f"sums{part} {how} {value} * {x}[None, :]")


def of_columns(f: FunctionBuilder, build: CudaBuilder, inside: str) -> dict[int, str]:
    """Operands of one row's columns."""
    mask, loaded = f", {inside}" if inside else "", {}
    for k in operands_in(build.node):
        place = "" if build.node.input(k).elements == 1 else f" + columns{mask}"
        loaded[k] = f.let(f"tl.load({f.pointer(build.input(k))}{place})")
    return loaded


# the end, of one row and of more


def store(f: FunctionBuilder, build: CudaBuilder, sums: Sequence[str], operands: dict[int, str], place: str,
          inside: str) -> None:  # fmt: skip
    """The expression of the sums and its operands to their places in the result."""
    node = build.node
    dtypes = ["float32"] * len(sums) + [node.input(k).dtype for k in operands_in(node)]
    made = render(f, node.epilogue, [*sums, *(operands[k] for k in operands_in(node))], dtypes)
    held = node.epilogue.dtype or "float32"
    mask = f", {inside}" if inside else ""
    f.emit(f"tl.store({f.pointer(build.output())} + {place}, {converted(made, held, node.output.dtype)}{mask})")


def operands_in(node: Node) -> range:
    """Inputs that the expression reads."""
    return range(MAIN[node.op], len(node.inputs))

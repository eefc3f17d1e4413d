"""Mixture of a few rows: blocks stream columns of a row's chosen experts, each row its own.

The launch of down finds out itself which experts those are, from the scores, and asks for their weights while the
launch of gate and up is under way: that one begins after the scores are there, and lets the next one begin after it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ingot.dtypes import size_of
from ingot.ir.expression import parse
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.mixture_work import NORM, SCORES, Mix, Stacks, X, finish
from ingot.kernels.cuda.render import converted, render
from ingot.kernels.cuda.words import WORD, numbers, parted, places

_BYTES_AHEAD = 384  # of weights that a thread asks for before it needs them
_MOST_HELD = 128  # words of a step that a thread may have
Rows = list[list[str]]


@dataclass(frozen=True)
class Block:
    """A block's columns, the depth of a step, its warps."""

    columns: int
    depth: int
    warps: int

    @classmethod
    def parse(cls, text: str) -> Block:
        """Of "4x1024w4"."""
        found = re.fullmatch(r"(\d+)x(\d+)w(\d+)", text)
        assert found is not None, text
        return cls(*map(int, found.groups()))

    def fits(self, depth: int) -> bool:
        """Whether a step is not mostly empty, and a thread can hold its part."""
        return self.depth <= max(depth, 2048) and self.columns * self.depth // (32 * self.warps) <= _MOST_HELD

    def groups(self, depth: int, parts: int, dtype: str) -> list[range]:
        """Beginnings of steps, those together whose weights are asked for together."""
        each = self.columns * parts * self.depth * size_of(dtype) // (32 * self.warps)
        starts, held = range(0, depth, self.depth), max(_BYTES_AHEAD // max(each, 1), 1)
        return [starts[k : k + held] for k in range(0, len(starts), held)]


@dataclass(frozen=True)
class _Stream:
    """A launch that is being written: `depth` numbers of a row with columns of a matrix of `dtype`, block by block."""

    f: FunctionBuilder
    block: Block
    depth: int
    dtype: str

    @property
    def each(self) -> int:
        """Weights in a word."""
        return WORD // size_of(self.dtype)

    def mask(self, start: int, across: bool = False) -> str:
        """Of the words of a step, where it is not full."""
        if start + self.block.depth <= self.depth:
            return ""
        inside = f"(words < {(self.depth - start) // self.each})"
        return f", {inside}{'[None, :]' if across else ''}, other=0"

    def row(self, pointer: str, dtype: str, starts: Sequence[int]) -> Rows:
        """For every step the row's numbers in float32, as the words of the weights have them."""
        f, pair, steps = self.f, WORD // size_of(dtype), Rows()
        pointer = pointer if dtype == "float32" else f"({pointer}).to(tl.pointer_type(tl.int32))"
        for start in starts:
            found = list[str]()
            for place in places(self.each, pair):
                word = f.let(f"tl.load({pointer} + {start // pair} + {place}{self.mask(start)})")
                found += [word] if dtype == "float32" else numbers(f, word, dtype, "x")
            steps.append(found)
        return steps

    def weights(self, base: str, starts: Sequence[int], offset: str = "{0}") -> list[str]:
        """Variables with the words of steps; offset: text of where step {0} begins."""
        f = self.f
        return [
            f.let(f"tl.load({base} + {offset.format(start // self.each)}{self.mask(start, True)}, "
                  "eviction_policy='evict_first')", "w")
            for start in starts
        ]  # fmt: skip

    def multiply(self, sums: str, words: str, row: Sequence[str], fresh: bool) -> None:
        """sums [columns, words] += the numbers of the words times those of the row."""
        for place, (value, x) in enumerate(zip(numbers(self.f, words, self.dtype, "v"), row, strict=True)):
            self.f.emit(f"{sums} {'=' if fresh and place == 0 else '+='} {value} * {x}[None, :]")


def few_rows(build: CudaBuilder, mix: Mix, stacks: Stacks, inner: Handle, gate: Block, down: Block) -> None:
    """Two launches: a block for columns of an expert of a row, then a block for columns of a row."""
    _gates(build, mix, stacks, inner, gate)
    _downs(build, mix, stacks, inner, down)


def _words(handle: Handle, f: FunctionBuilder) -> str:
    return f"{f.pointer(handle)}.to(tl.pointer_type(tl.int32))"


def _opened(build: CudaBuilder, block: Block, depth: int, dtype: str) -> _Stream:
    f = build.function(warps=block.warps, stages=1, early=True)
    stream = _Stream(f, block, depth, dtype)
    f.emit(f"words = tl.arange(0, {block.depth // stream.each})\nlanes = tl.arange(0, {block.columns})")
    f.emit("token = tl.program_id(1)")
    return stream


# gate and up


def _gates(build: CudaBuilder, mix: Mix, stacks: Stacks, inner: Handle, block: Block) -> None:
    stream = _opened(build, block, mix.width, mix.weights)
    f, across, line = stream.f, -(-mix.inner // block.columns), mix.width // stream.each
    f.emit(f"slot = tl.program_id(0) // {across}\ncolumns = tl.program_id(0) % {across} * {block.columns} + lanes")
    starts = range(0, mix.width, block.depth)
    norms = _norms(build, stream, starts) if build.node.has_input(NORM) else []
    f.wait()
    row = stream.row(f"{f.pointer(build.input(X))} + token * {mix.width}", mix.kept, starts)
    mix.order(f, f"{f.pointer(build.input(SCORES))} + token * {mix.count}")
    with f.block("for _ in range(slot):"):
        mix.pass_over(f)
    f.emit(f"expert = {mix.expert(f, 'tl.max(found, 0)')}")
    f.emit(f"place = (expert * {mix.inner} + tl.minimum(columns, {mix.inner - 1})) * {line}")
    f.emit("place = place[:, None] + words[None, :]")
    row, scaled = _normalised(f, mix, row, norms, build.node.attributes["epsilon"])
    for group in block.groups(mix.width, 2, mix.weights):
        both = [stream.weights(f"{_words(stack, f)} + place", group) for stack in (stacks.gate, stacks.up)]
        for start, *words in zip(group, *both, strict=True):
            for part, word in enumerate(words):
                stream.multiply(f"sums{part}", word, row[start // block.depth], start == 0)
    f.emit(f"exists = columns < {mix.inner}")
    for part in range(2):
        scale = stacks.scale(f, part, f"expert * {mix.inner} + columns", ", exists, other=0.0")
        f.emit(f"sum{part} = tl.sum(sums{part}, 1){scaled}{scale}")
    act = parse(build.node.attributes["activation"])
    f.emit(f"made = {render(f, act, ['sum0'], ['float32'])} * sum1")
    f.emit(f"tl.store({f.pointer(inner)} + (token * {mix.chosen} + slot) * {mix.inner} + columns, "
           f"{converted('made', 'float32', mix.kept)}, exists)")  # fmt: skip
    f.launch(mix.chosen * across, mix.rows)


def _norms(build: CudaBuilder, stream: _Stream, starts: Sequence[int]) -> Rows:
    """For every step the norm's scales, as the words of the weights have them."""
    scale, f, line = build.node.input(NORM).constant, stream.f, stream.depth // stream.each
    assert scale is not None
    pointer = f.pointer(build.pack(parted(scale.astype(np.float32), stream.each)))
    return [[f.let(f"tl.load({pointer} + {k * line + start // stream.each} + words{stream.mask(start)})", "s")
             for k in range(stream.each)] for start in starts]  # fmt: skip


def _normalised(f: FunctionBuilder, mix: Mix, row: Rows, norms: Rows, epsilon: float) -> tuple[Rows, str]:
    """The row times the norm's scales, and text of what its sums are to be multiplied by."""
    if not norms:
        return row, ""
    f.emit(f"squares = {' + '.join(f'{x} * {x}' for xs in row for x in xs)}")
    made = [[f.let(f"{x} * {s}", "x") for x, s in zip(xs, ss, strict=True)]
            for xs, ss in zip(row, norms, strict=True)]  # fmt: skip
    f.emit(f"square = tl.sum(squares, 0) / {mix.width} + {epsilon!r}")
    return made, " * (1.0 / libdevice.sqrt(square))"


# down


def _downs(build: CudaBuilder, mix: Mix, stacks: Stacks, inner: Handle, block: Block) -> None:
    depth = mix.chosen * mix.inner
    stream = _opened(build, block, depth, mix.weights)
    f, groups = stream.f, block.groups(depth, 1, mix.weights)
    line = mix.inner // stream.each
    f.emit(f"columns = tl.program_id(0) * {block.columns} + lanes\ncolumns_in = tl.minimum(columns, {mix.width - 1})")
    mix.choose(f, f"{f.pointer(build.input(SCORES))} + token * {mix.count}")
    held = {}
    for number, group in enumerate(groups):
        for start in group:
            _places(f, mix, stream, start)
            base = f"{_words(stacks.down, f)} + (columns_in * {line})[:, None] + place{start}[None, :]"
            held[start] = stream.weights(base, (start,), "0")[0]
        if number == 0:
            f.wait()
        pointer = f"{f.pointer(inner)} + token * {depth}"
        for start, row in zip(group, stream.row(pointer, mix.kept, group), strict=True):
            _add(f, mix, stream, stacks, start, held[start], row)
    f.emit("sums = tl.sum(sums, 1)")
    inside = "" if mix.width % block.columns == 0 else f"columns < {mix.width}"
    finish(f, build, "sums", f"token * {mix.width} + columns", inside)
    f.launch(-(-mix.width // block.columns), mix.rows)


def _slots(mix: Mix, stream: _Stream, start: int) -> range:
    """Which of a row's experts a step has numbers of."""
    return range(start // mix.inner, (min(start + stream.block.depth, stream.depth) - 1) // mix.inner + 1)


def _by_slot(mix: Mix, stream: _Stream, start: int, texts: Sequence[str], words: str = "words") -> str:
    """One text for each of the step's slots, chosen by a word's place."""
    slots = _slots(mix, stream, start)
    whole = texts[0]
    for slot, text in zip(slots[1:], texts[1:], strict=True):
        whole = f"tl.where({words} >= {(slot * mix.inner - start) // stream.each}, {text}, {whole})"
    return whole


def _places(f: FunctionBuilder, mix: Mix, stream: _Stream, start: int) -> None:
    """Where the words of a step lie in the stack of down."""
    line = mix.inner // stream.each
    texts = [f"(expert{slot} * {mix.width} - {slot}) * {line}" for slot in _slots(mix, stream, start)]
    f.emit(f"place{start} = {_by_slot(mix, stream, start, texts)} + {start // stream.each} + words")


def _add(f: FunctionBuilder, mix: Mix, stream: _Stream, stacks: Stacks, start: int, words: str,
         row: Sequence[str]) -> None:  # fmt: skip
    """A step's products to the sums, times the experts' shares and their columns' scales."""
    slots = _slots(mix, stream, start)
    share = f.let(_by_slot(mix, stream, start, [f"share{slot}" for slot in slots]), "share")
    shared = [f.let(f"{x} * {share}", "x") for x in row]
    if stacks.scales[2] is None:
        stream.multiply("sums", words, shared, start == 0)
        return
    stream.multiply("part", words, shared, True)
    texts = [f.let(f"1.0{stacks.scale(f, 2, f'expert{slot} * {mix.width} + columns_in')}", "scale") for slot in slots]
    scale = _by_slot(mix, stream, start, [f"{text}[:, None]" for text in texts], "words[None, :]")
    f.emit(f"sums {'=' if start == 0 else '+='} part * {scale}")

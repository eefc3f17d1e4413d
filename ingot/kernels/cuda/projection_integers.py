"""Projection of one row, or a few, with weights of four or eight bits: integers times the row in sixteen bits.

Each thread has 16 bytes of a column's weights, the numbers of the row that they belong to as integers of 16 bits with
a scale of their own, and multiplies four bytes at a time. What that leaves out of the row is 2 ** -16 of the largest
of these numbers. Blocks ask for weights and scales before they wait for the row.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from ingot.dtypes import size_of
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.projection_row import Work, finish
from ingot.kernels.cuda.streaming import Block
from ingot.kernels.cuda.words import WORD, Array, numbers

_THREAD = 4  # words of a column that a thread has
_NAN = "propagate_nan=tl.PropagateNan.ALL"


@dataclass(frozen=True)
class Integers:
    """Weights in memory: `words` of int32 [columns, depth / numbers of a word], those of four bits without a sign,
    those of eight with one; a weight is (number - zero) * scale. depth: filled up to whole threads; scales, zeros
    [groups, columns]: one for each `group` numbers along the depth; scales None: all are 1; zeros: or one for all;
    norm: scales of the rows, as `stream` loads them."""

    words: Handle
    bits: int
    depth: int
    group: int
    scales: Handle | None = None
    zeros: Handle | int = 0
    norm: Handle | None = None

    @property
    def each(self) -> int:
        """Numbers of a word."""
        return 8 * WORD // self.bits

    @property
    def run(self) -> int:
        """Numbers of a thread, of which none has another scale than the others."""
        return _THREAD * self.each

    @property
    def line(self) -> int:
        """Words of a column."""
        return self.depth // self.each

    @property
    def groups(self) -> int:
        """Scales of a column."""
        return -(-self.depth // self.group)


def run_of(bits: int) -> int:
    """Numbers along the depth that lie together, and share a scale."""
    return _THREAD * 8 * WORD // bits


def place_of(bits: int, columns: str) -> str:
    """Which number of the depth lies at the places `columns` (text, for numpy as for kernels): the first words of a
    thread's loads of the row belong to its first word of weights. Low and high halves of bytes take turns."""
    if bits == 4:
        within = f"({columns} % 2 * 2 + {columns} // 2 % 2) * 8 + {columns} % 32 // 8 * 2 + {columns} % 8 // 4"
        return f"({columns} // 32 * 32 + {within})"
    return f"({columns} // 16 * 16 + {columns} % 2 * 8 + {columns} % 16 // 4 * 2 + {columns} % 4 // 2)"


def packed_words(weight_KN: Array, bits: int) -> Array:
    """int32 [N, words] of integers [K, N] kept as int8 or uint8; zeros up to whole threads."""
    depth, columns = weight_KN.shape
    filled = -(-depth // run_of(bits)) * run_of(bits)
    order = eval(place_of(bits, "k"), {"k": np.arange(filled)})
    made = np.empty((columns, filled * bits // 8), np.uint8)
    rows = max((1 << 24) // filled, 1)
    for start in range(0, columns, rows):
        part = np.zeros((min(rows, columns - start), filled), np.uint8)
        part[:, :depth] = unsigned(weight_KN[:, start : start + rows].T, bits)
        part = part[:, order]
        made[start : start + rows] = part if bits == 8 else part[:, ::2] | part[:, 1::2] << 4
    return made.view(np.int32)


def unsigned(whole: Array, bits: int) -> Array:
    """Bytes as they are stored: int8 of four bits become 0 to 15, uint8 of eight -128 to 127."""
    shift = (8 if bits == 4 else 0) if whole.dtype == np.int8 else (0 if bits == 4 else -128)
    return (whole.astype(np.int16) + shift).astype(np.uint8)


def packed_norm(scale: Array, weights: Integers) -> Array:
    """float32 [numbers of a word, words]: a row's scales, in the order of its numbers."""
    filled = np.zeros(weights.depth, np.float32)
    filled[: len(scale)] = scale.astype(np.float32)
    return np.ascontiguousarray(filled.reshape(-1, weights.each // 2, _THREAD, 2).transpose(1, 3, 0, 2))


def stream(build: CudaBuilder, work: Work, weights: Integers, block: Block, several: bool = False) -> None:
    """The launch for one row, or for several one after the other: weights of the step to come are on their way while
    those before them are multiplied; those of the first step stay for all rows."""
    f, node = build.function(warps=block.warps, stages=1, early=True), build.node
    parts, steps = block.depth // weights.run, -(-weights.depth // block.depth)  # runs of numbers of a step
    f.emit(f"runs = tl.arange(0, {parts})\nfour = tl.arange(0, {_THREAD})[None, :]")
    f.emit(f"words = runs[:, None] * {_THREAD} + four")
    f.emit(f"columns = tl.program_id(0) * {block.columns} + tl.arange(0, {block.columns})")
    row, column = _Row(f, build, work, weights, parts), _Columns(f, work, weights, parts, block.columns)
    ahead = [column(0, part) for part in range(work.parts)]
    norms = [row.scales(step, weights.norm) for step in range(steps)] if weights.norm else []
    f.wait()
    with f.block(f"for number in range(0, {f.extent(work.rows)}):") if several else nullcontext():
        f.emit(f"row = {f.pointer(build.input(0))}" + f" + number * {work.depth}" * several)
        whole = [row(step, norms[step] if norms else None) for step in range(steps)]
        for step in range(steps):
            held, ahead = ahead, [column(step + 1, part) for part in range(work.parts)] if step + 1 < steps else []
            for part, found in enumerate(held):
                _multiply(f, weights, whole[step], found, f"sums{part}", first=step == 0)
        scaled = ""
        if norms:
            f.emit(f"square = tl.sum(tl.sum(squares, 1), 0) / {work.depth} + {node.attributes['epsilon']!r}")
            scaled = " * (1.0 / libdevice.sqrt(square))"
        sums = [f.let(f"tl.sum(sums{part}, 0){scaled}") for part in range(work.parts)]
        inside = "" if work.columns % block.columns == 0 else f"columns < {work.columns}"
        place = f"number * {work.columns} + columns" if several else "columns"
        finish(f, build, sums, place, inside)
    f.launch(-(-work.columns // block.columns))


@dataclass(frozen=True)
class _Whole:
    """The numbers of a step of the row: pairs of words (high, low bytes), sums of a word's, sizes of a thread's."""

    pairs: list[tuple[str, str]]
    total: str
    size: str


@dataclass(frozen=True)
class _Found:
    """Words of a step of the columns, with their scales and zeros."""

    words: str
    scale: str | None
    zero: str | None


@dataclass(frozen=True, eq=False)
class _Row:
    """Loads the row, step by step, and makes integers of it."""

    f: FunctionBuilder
    build: CudaBuilder
    work: Work
    weights: Integers
    parts: int

    def __call__(self, step: int, norms: list[str] | None) -> _Whole:
        f, each = self.f, self.weights.each
        xs = self._loaded(step)
        if norms is not None:
            how = "=" if step == 0 else "+="
            f.emit(f"squares {how} {' + '.join(f'{x} * {x}' for x in xs)}")
            xs = [f.let(f"{x} * {s}", "x") for x, s in zip(xs, norms, strict=True)]
        largest = f.let(f"tl.abs({xs[0]})", "m")
        for x in xs[1:]:
            f.emit(f"{largest} = tl.maximum({largest}, tl.abs({x}), {_NAN})")
        size = f.let(f"tl.max({largest}, 1)", "size")
        times = f.let(f"(32767.0 / tl.maximum({size}, 1e-30))[:, None]", "times")
        f.emit(f"{size} = ({size} + 0.0 * tl.sum({largest}, 1)) * {1 / 32767!r}")  # NaN stays what it is
        whole = [f.let(f"{f.core('integers', 'rounded')}({x}, {times})", "q") for x in xs]
        pairs = list[tuple[str, str]]()
        for k in range(0, each, 4):
            high, low = f.name("high"), f.name("low")
            f.emit(f"{high}, {low} = {f.core('integers', 'parted')}({', '.join(whole[k : k + 4])})")
            pairs.append((high, low))
        total = f.let(" + ".join(whole), "total") if self.weights.zeros != 0 else "0"
        return _Whole(pairs, total, size)

    def _loaded(self, step: int) -> list[str]:
        """For every number of a word a block [runs, words of a run] of float32."""
        f, dtype = self.f, self.build.node.input(0).dtype
        pair = WORD // size_of(dtype)
        first, found = step * self.parts * self.weights.run, list[str]()
        for k in range(0, self.weights.each, pair):
            place = f"runs[:, None] * {self.weights.run} + {k // 2 * 8 + k % 2 + first} + four * 2"
            mask = self._rest(first, place)
            if pair == 1:
                found.append(f.let(f"tl.load(row + {place}{mask})", "x"))
                continue
            pairs = f"runs[:, None] * {self.weights.run // 2} + {k // 2 * 4 + first // 2} + four"
            word = f.let(f"tl.load(row.to(tl.pointer_type(tl.int32)) + {pairs}{mask})")
            found += numbers(f, word, dtype, "x")
        return found

    def _rest(self, first: int, place: str) -> str:
        """The mask of loads of a step that begins at a number, where it is not whole."""
        run, depth = self.weights.run, self.work.depth
        if first + self.parts * run <= depth:
            return ""
        return f", (runs < {(depth - first) // run})[:, None], other=0" if depth % run == 0 else (
            f", {place} < {depth}, other=0")  # fmt: skip

    def scales(self, step: int, norm: Handle) -> list[str]:
        """The norm's scales of a step's numbers."""
        first, line = step * self.parts, self.weights.line
        rest = line // _THREAD - first
        mask = f", (runs < {rest})[:, None], other=0.0" if rest < self.parts else ""
        return [self.f.let(f"tl.load({self.f.pointer(norm)} + {k * line + first * _THREAD} + words{mask})", "s")
                for k in range(self.weights.each)]  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Columns:
    """Loads of the columns' weights."""

    f: FunctionBuilder
    work: Work
    weights: Integers
    parts: int
    count: int

    def __call__(self, step: int, part: int) -> _Found:
        f, weights, work = self.f, self.weights, self.work
        within = "columns" if work.columns % self.count == 0 else f"tl.minimum(columns, {work.columns - 1})"
        column = f.let(f"{within} + {part * work.columns}", "c")
        rest = weights.line // _THREAD - step * self.parts
        masks = [f", (runs < {rest}){axes}, other=0" if rest < self.parts else ""
                 for axes in ("[:, None, None]", "[:, None]")]  # fmt: skip
        place = f"({column} * {weights.line})[None, :, None] + (words + {step * self.parts * _THREAD})[:, None, :]"
        word = f.let(f"tl.load({f.pointer(weights.words)} + {place}{masks[0]}, eviction_policy='evict_first')", "w")
        group = f"(runs + {step * self.parts}) * {weights.run} // {weights.group}"
        places = f"(({group}) * {work.columns * work.parts})[:, None] + {column}[None, :]"
        found = [f.let(f"tl.load({f.pointer(handle)} + {places}{masks[1]})") if isinstance(handle, Handle) else None
                 for handle in (weights.scales, weights.zeros)]  # fmt: skip
        return _Found(word, found[0], found[1])


def _multiply(f: FunctionBuilder, weights: Integers, row: _Whole, found: _Found, sums: str, first: bool) -> None:
    """The products of a step, added to the sums [runs, columns]."""
    nibbles, total = weights.bits == 4, row.total
    own = found.zero is None
    begin = "0" if total == "0" or not own else f"({total} * {-weights.zeros})[:, None, :]"  # type: ignore[operator]
    given = ", ".join(f"{word}[:, None, :]" for pair in row.pairs for word in pair)
    names = ("nibbles", "fast_nibbles") if nibbles else ("octets", "fast_octets")
    whole = f.name("y")
    f.emit(f"{whole} = {f.core('integers', names[0])}({found.words}, {given}, {begin})")
    f.faster(f"{whole} = {{}}({found.words}, {given}, {begin})", "integers", names[1])
    f.emit(f"{whole} = tl.sum({whole}, 2)")
    if found.zero is not None:
        f.emit(f"{whole} = {whole} - tl.sum({total}, 1)[:, None] * {found.zero}.to(tl.int32)")
    size = f"{row.size}[:, None]" + (f" * {found.scale}.to(tl.float32)" if found.scale else "")
    f.emit(f"{sums} {'=' if first else '+='} {whole}.to(tl.float32) * ({size})")

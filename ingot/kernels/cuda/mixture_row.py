"""Mixture of a few rows: blocks stream columns of a row's chosen experts, each row its own.

The launch of down finds out itself which experts those are, from the scores, and asks for their weights while the
launch of gate and up is under way: that one begins after the scores are there, and lets the next one begin after it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ingot.ir.expression import parse
from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.mixture_work import NORM, SCORES, Mix, Stacks, X
from ingot.kernels.cuda.projection_row import finish
from ingot.kernels.cuda.render import converted, render
from ingot.kernels.cuda.streaming import Block, Streaming

_BYTES_AHEAD = 384  # of weights that a thread asks for before it needs them


def few_rows(build: CudaBuilder, mix: Mix, stacks: Stacks, inner: Handle, gate: Block, down: Block) -> None:
    """Two launches: a block for columns of an expert of a row, then a block for columns of a row."""
    _gates(build, mix, stacks, inner, gate)
    _downs(build, mix, stacks, inner, down)


def _words(handle: Handle, f: FunctionBuilder) -> str:
    return f"{f.pointer(handle)}.to(tl.pointer_type(tl.int32))"


# gate and up


def _gates(build: CudaBuilder, mix: Mix, stacks: Stacks, inner: Handle, block: Block) -> None:
    stream = Streaming.opened(build, block, mix.width, mix.weights)
    f, across, line = stream.f, -(-mix.inner // block.columns), mix.width // stream.each
    f.emit("token = tl.program_id(1)")
    f.emit(f"slot = tl.program_id(0) // {across}\ncolumns = tl.program_id(0) % {across} * {block.columns} + lanes")
    norms = stream.norms(build, NORM)
    f.wait()
    row = stream.row(f"{f.pointer(build.input(X))} + token * {mix.width}", mix.kept, stream.starts)
    mix.order(f, f"{f.pointer(build.input(SCORES))} + token * {mix.count}")
    with f.block("for _ in range(slot):"):
        mix.pass_over(f)
    f.emit(f"expert = {mix.expert(f, 'tl.max(found, 0)')}")
    f.emit(f"place = (expert * {mix.inner} + tl.minimum(columns, {mix.inner - 1})) * {line}")
    f.emit("place = place[:, None] + words[None, :]")
    row, scaled = stream.normalised(row, norms, build.node.attributes["epsilon"])
    for group in stream.groups(2, _BYTES_AHEAD):
        both = [[stream.word(f"{_words(stack, f)} + place + {start // stream.each}", start) for start in group]
                for stack in (stacks.gate, stacks.up)]  # fmt: skip
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


# down


def _downs(build: CudaBuilder, mix: Mix, stacks: Stacks, inner: Handle, block: Block) -> None:
    depth = mix.chosen * mix.inner
    stream = Streaming.opened(build, block, depth, mix.weights)
    f, line = stream.f, mix.inner // stream.each
    f.emit("token = tl.program_id(1)")
    f.emit(f"columns = tl.program_id(0) * {block.columns} + lanes\ncolumns_in = tl.minimum(columns, {mix.width - 1})")
    mix.choose(f, f"{f.pointer(build.input(SCORES))} + token * {mix.count}")
    held = {}
    for number, group in enumerate(stream.groups(1, _BYTES_AHEAD)):
        for start in group:
            _places(f, mix, stream, start)
            base = f"{_words(stacks.down, f)} + (columns_in * {line})[:, None] + place{start}[None, :]"
            held[start] = stream.word(base, start)
        if number == 0:
            f.wait()
        pointer = f"{f.pointer(inner)} + token * {depth}"
        for start, row in zip(group, stream.row(pointer, mix.kept, group), strict=True):
            _add(f, mix, stream, stacks, start, held[start], row)
    f.emit("sums = tl.sum(sums, 1)")
    inside = "" if mix.width % block.columns == 0 else f"columns < {mix.width}"
    finish(f, build, ["sums"], f"token * {mix.width} + columns", inside)
    f.launch(-(-mix.width // block.columns), mix.rows)


def _slots(mix: Mix, stream: Streaming, start: int) -> range:
    """Which of a row's experts a step has numbers of."""
    return range(start // mix.inner, (min(start + stream.block.depth, stream.depth) - 1) // mix.inner + 1)


def _by_slot(mix: Mix, stream: Streaming, start: int, texts: Sequence[str], words: str = "words") -> str:
    """One text for each of the step's slots, chosen by a word's place."""
    slots = _slots(mix, stream, start)
    whole = texts[0]
    for slot, text in zip(slots[1:], texts[1:], strict=True):
        whole = f"tl.where({words} >= {(slot * mix.inner - start) // stream.each}, {text}, {whole})"
    return whole


def _places(f: FunctionBuilder, mix: Mix, stream: Streaming, start: int) -> None:
    """Where the words of a step lie in the stack of down."""
    line = mix.inner // stream.each
    texts = [f"(expert{slot} * {mix.width} - {slot}) * {line}" for slot in _slots(mix, stream, start)]
    f.emit(f"place{start} = {_by_slot(mix, stream, start, texts)} + {start // stream.each} + words")


def _add(f: FunctionBuilder, mix: Mix, stream: Streaming, stacks: Stacks, start: int, words: str,
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

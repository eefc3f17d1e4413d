"""Projection of one row: weights stream through registers once, the norm and the expression are in the same launch.

A block asks for the weights of its columns before it waits for the row; those that find a processor before the launch
before them has ended keep the memory busy meanwhile. Weights travel as words of 32 bits, and become numbers there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingot.kernels.cuda.build import CudaBuilder, FunctionBuilder, Handle
from ingot.kernels.cuda.render import converted, render
from ingot.kernels.cuda.streaming import Block, Rows, Streaming
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

_MAIN = {"Projection": 3, "QuantizedProjection": 5, "Mixture": 9}  # inputs before the expression's operands
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


def stream(build: CudaBuilder, work: Work, packed: Handle, block: Block) -> None:
    """The launch for one row: a block is a group of columns."""
    streaming = Streaming.opened(build, block, work.depth, packed.dtype)
    f, node, groups = streaming.f, build.node, streaming.groups(work.parts, _BYTES_AHEAD)
    f.emit(f"columns = tl.program_id(0) * {block.columns} + lanes")
    held = _weights(streaming, work, packed, groups[0])
    norms = streaming.norms(build, 2)
    f.wait()
    row = streaming.row(f.pointer(build.input(0)), node.input(0).dtype, streaming.starts)
    row, scaled = streaming.normalised(row, norms, node.attributes["epsilon"])
    for group in groups:
        words = held if group is groups[0] else _weights(streaming, work, packed, group)
        for start, own in zip(group, words, strict=True):
            for part, word in enumerate(own):
                streaming.multiply(f"sums{part}", word, row[start // block.depth], fresh=start == 0)
    sums = [f.let(f"tl.sum(sums{part}, 1){scaled}") for part in range(work.parts)]
    finish(f, build, sums, "columns", "" if work.columns % block.columns == 0 else f"columns < {work.columns}")
    f.launch(-(-work.columns // block.columns))


def _weights(streaming: Streaming, work: Work, packed: Handle, starts: Sequence[int]) -> Rows:
    """For every step variables with the words of the block's columns, one for each part."""
    f, each = streaming.f, streaming.each
    line = work.depth // each
    column = f.let(f"tl.minimum(columns, {work.columns - 1}) * {line}", "c")
    whole = f"{f.pointer(packed)}.to(tl.pointer_type(tl.int32))"
    base = f.let(f"{whole} + {column}[:, None] + words[None, :]", "p")
    return [[streaming.word(f"{base} + {start // each + part * work.columns * line}", start)
             for part in range(work.parts)] for start in starts]  # fmt: skip


# the end, of one row and of more, of projections and mixtures


def finish(f: FunctionBuilder, build: CudaBuilder, sums: Sequence[str], place: str, inside: str) -> None:
    """The expression of a row's sums and its operands to their places in the result."""
    store(f, build, sums, loaded(f, build, place, inside), place, inside)


def loaded(f: FunctionBuilder, build: CudaBuilder, place: str, inside: str) -> dict[int, str]:
    """Variables of what the expression reads: numbers, rows of `columns`, or as much as the result."""
    node, mask, operands = build.node, f", {inside}" if inside else "", {}
    for k in operands_in(node):
        port = node.input(k)
        at = place if port.shape == node.output.shape else "columns"
        operands[k] = f.let(f"tl.load({f.pointer(build.input(k))}{'' if port.elements == 1 else f' + {at}{mask}'})")
    return operands


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
    return range(_MAIN[node.op], len(node.inputs))

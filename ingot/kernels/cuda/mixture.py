"""Mixture: of one row or a few the chosen experts' weights stream through registers; of more, rows are put in order of
their experts on the device, and each expert's rows are tiles of their own.

    few rows     norm, choice, gate and up in one launch; down, shares, expression in another
    more rows    choice and rows in a launch, then gate and up, down, the sum: tiles of an expert

Which expert has how many rows only the device knows: grids are as large as any choice may need, and what is beyond
ends at once, so that one graph serves them all.
"""

from __future__ import annotations

from typing import Any

from ingot.dtypes import size_of
from ingot.ir.expression import parse
from ingot.kernels import kernel
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import CudaBuilder
from ingot.kernels.cuda.ladder import Rung, only
from ingot.kernels.cuda.mixture_row import few_rows
from ingot.kernels.cuda.mixture_tiles import many_rows
from ingot.kernels.cuda.mixture_work import DOWN, GATE, MOST_EXPERTS, NORM, SCALES, SCORES, UP, Mix, Stacks
from ingot.kernels.cuda.projection_row import operands_in
from ingot.kernels.cuda.render import NARROW, can_render
from ingot.kernels.cuda.streaming import Block, can_stream, stored
from ingot.kernels.node import Node

_MOST_BYTES = 2**33  # of a stack: kernels count its words in 32 bits

# Few rows: columns of a block, depth of a step, warps; of gate and up, and of down.
GATES = ("8x1024w4", "8x1024w8", "4x2048w4")
DOWNS = ("4x2048w4", "4x1024w2", "8x1024w4")
_MOST_HELD = 128  # words of a step that a thread may have


def _applies(node: Node, target: Any) -> bool:
    stacks = [node.input(k) for k in (GATE, UP, DOWN)]
    weights, constants = stacks[0].dtype, [*stacks, *(p for p in node.inputs[SCALES[0] : NORM + 1] if p is not None)]
    if any(port.constant is None for port in constants) or any(port.dtype != weights for port in stacks):
        return False
    mix, operands = Mix.of(node), [node.input(k) for k in operands_in(node)]
    if not can_stream(weights, node.dtype, (mix.width, mix.inner), target):
        return False
    if node.input(SCORES).dtype not in (*NARROW, "float32") or mix.count > MOST_EXPERTS or _size(mix) >= _MOST_BYTES:
        return False
    activation, types = parse(node.attributes["activation"]), ["float32", *(port.dtype for port in operands)]
    fits = all(port.shape == node.output.shape for port in operands)
    return fits and can_render(activation, types[:1]) and can_render(node.epilogue, types)


def _size(mix: Mix) -> int:
    """Bytes of one of the three stacks."""
    return mix.count * mix.width * mix.inner * size_of(mix.weights)


def _fits(block: Block, depth: int) -> bool:
    """Whether a step is not mostly empty, and a thread can hold its part."""
    return block.depth <= max(depth, 2048) and block.columns * block.depth // (32 * block.warps) <= _MOST_HELD


def _gates(node: Node, target: Architecture) -> tuple[str, ...]:
    return tuple(text for text in GATES if _fits(Block.parse(text), Mix.of(node).width))


def _downs(node: Node, target: Architecture) -> tuple[str, ...]:
    mix = Mix.of(node)
    return tuple(text for text in DOWNS if _fits(Block.parse(text), mix.chosen * mix.inner))


def _cost(node: Node, target: Architecture, gate: str, down: str) -> float:
    """Of one row: the weights of the chosen experts. The first forms are taken, unless they are timed."""
    mix = Mix.of(node)
    read = 3 * _size(mix) * mix.chosen // mix.count
    return 2 * target.pace.step + read / (target.bandwidth * 900) + 0.01 * ((gate != GATES[0]) + (down != DOWNS[0]))


@kernel("Mixture", on="cuda", when=_applies, space={"gate": _gates, "down": _downs}, cost=_cost)
def mixture(build: CudaBuilder, node: Node, gate: str, down: str) -> None:
    """expression(Σ over chosen e of share[e] (activation(x' gate[e]) * (x' up[e])) down[e], operands)"""
    mix = Mix.of(node)
    arrays = [node.input(k).constant for k in (GATE, UP, DOWN)]
    stacks = Stacks.of(build, [stored(array) for array in arrays if array is not None])
    inner = build.temporary(mix.bytes_of_inner, node.dtype)
    few = Rung(1, mix.few)
    if few.takes(mix.rows):
        with only(build, few, mix.rows):
            few_rows(build, mix, stacks, inner, Block.parse(gate), Block.parse(down))
    if Rung(mix.few + 1).takes(mix.rows):
        many_rows(build, mix, stacks, inner)

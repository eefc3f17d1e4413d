"""Mixture: of one row or a few the chosen experts' weights stream through registers; of more, rows are put in order of
their experts on the device, and each expert's rows are tiles of their own.

    few rows     norm, choice, gate and up in one launch; down, shares, expression in another
    more rows    choice and rows in a launch, then gate and up, down, the sum: tiles of an expert

Which expert has how many rows only the device knows: grids are as large as any choice may need, and what is beyond
ends at once, so that one graph serves them all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.dtypes import size_of
from ingot.ir.expression import parse
from ingot.kernels import kernel
from ingot.kernels.cuda.architecture import EIGHTHS_FROM, Architecture
from ingot.kernels.cuda.build import CudaBuilder
from ingot.kernels.cuda.ladder import Rung, only
from ingot.kernels.cuda.mixture_row import Block, few_rows
from ingot.kernels.cuda.mixture_tiles import many_rows
from ingot.kernels.cuda.mixture_work import DOWN, GATE, MAIN, MOST_EXPERTS, SCALES, SCORES, UP, Mix, Stacks, operands_in
from ingot.kernels.cuda.paged_update import LARGEST
from ingot.kernels.cuda.render import NARROW, can_render
from ingot.kernels.cuda.words import order_of
from ingot.kernels.node import Node

_WEIGHTS = (*NARROW, "float32", "float8_e4m3fn")
_MULTIPLES = {1: 16, 2: 2, 4: 1}  # of both depths, for weights of so many bytes: they are loaded as words
_MOST_BYTES = 2**33  # of a stack: kernels count its words in 32 bits

# Few rows: columns of a block, depth of a step, warps; of gate and up, and of down.
GATES = ("8x1024w4", "8x1024w8", "4x2048w4")
DOWNS = ("4x2048w4", "4x1024w2", "8x1024w4")


def _applies(node: Node, target: Any) -> bool:
    stacks = [node.input(k) for k in (GATE, UP, DOWN)]
    weights, constants = stacks[0].dtype, [*stacks, *(p for p in node.inputs[SCALES[0] : MAIN] if p is not None)]
    if any(port.constant is None for port in constants) or any(port.dtype != weights for port in stacks):
        return False
    if weights not in _WEIGHTS or not {node.dtype, node.input(SCORES).dtype} <= {*NARROW, "float32"}:
        return False
    if (weights == "float32" and node.dtype != "float32") or (weights in LARGEST and target.capability < EIGHTHS_FROM):
        return False
    mix, operands = Mix.of(node), [node.input(k) for k in operands_in(node)]
    if mix.count > MOST_EXPERTS:
        return False
    if any(depth % _MULTIPLES[size_of(weights)] for depth in (mix.width, mix.inner)) or _size(mix) >= _MOST_BYTES:
        return False
    activation, types = parse(node.attributes["activation"]), ["float32", *(port.dtype for port in operands)]
    fits = all(port.shape == node.output.shape for port in operands)
    return fits and can_render(activation, types[:1]) and can_render(node.epilogue, types)


def _size(mix: Mix) -> int:
    """Bytes of one of the three stacks."""
    return mix.count * mix.width * mix.inner * size_of(mix.weights)


def _gates(node: Node, target: Architecture) -> tuple[str, ...]:
    return tuple(text for text in GATES if Block.parse(text).fits(Mix.of(node).width))


def _downs(node: Node, target: Architecture) -> tuple[str, ...]:
    mix = Mix.of(node)
    return tuple(text for text in DOWNS if Block.parse(text).fits(mix.chosen * mix.inner))


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


def stored(weights_EKN: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Weights [experts, K, N] as they lie in the engine: [experts, N, K], in the order that words are multiplied in."""
    order = order_of(weights_EKN.shape[1], weights_EKN.dtype.name)
    turned = weights_EKN.transpose(0, 2, 1)
    return np.ascontiguousarray(turned if order is None else turned[:, :, order])

"""Transpose and Copy."""

from __future__ import annotations

from ingot.kernels import kernel
from ingot.kernels.cpu.build import KernelBuilder
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.moving import move_phase
from ingot.kernels.cpu.strided import UNIT, Axis, Move, element_size, movable, move_cost, row_major
from ingot.kernels.node import Node
from ingot.plan.extent import Extent, product

SLOWER = 1.5  # a transpose against a copy, when the innermost axis changes


def _movable(node: Node, isa: Isa) -> bool:
    return movable(node)


def _cost(node: Node, isa: Isa) -> float:
    return move_cost(product((2, node.output.bytes)))


def _transpose_cost(node: Node, isa: Isa) -> float:
    perm = node.attributes["perm"]
    return _cost(node, isa) * (1.0 if not perm or perm[-1] == len(perm) - 1 else SLOWER)


@kernel("Transpose", on="cpu", when=_movable, cost=_transpose_cost)
def transpose_move(build: KernelBuilder, node: Node) -> None:
    """y[i…] = x[i permuted…]: axes collapsed, rows copied, the two contiguous axes exchanged by tiles in registers."""
    port, perm = node.input(0), node.attributes["perm"]
    source = row_major(port.shape)
    target = row_major([port.shape[p] for p in perm])
    axes = tuple(Axis(port.shape[p], source[p], stride) for p, stride in zip(perm, target, strict=True))
    move_phase(build, [Move(element_size(port), build.input(0), build.output(), axes)])


@kernel("Copy", on="cpu", when=_movable, cost=_cost)
def copy_move(build: KernelBuilder, node: Node) -> None:
    """The same bytes: what a View costs that cannot share its input's storage."""
    port = node.input(0)
    count: Extent = product(port.shape)
    move_phase(build, [Move(element_size(port), build.input(0), build.output(), (Axis(count, UNIT, UNIT),))])

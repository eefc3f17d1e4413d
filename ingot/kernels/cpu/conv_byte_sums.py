"""What sums of bytes over feature maps start from, the constants of each output channel, and how far they can go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ingot.ir.expression import Input, without_first
from ingot.kernels.cpu.bounds import of_products
from ingot.kernels.cpu.build import Handle, KernelBuilder
from ingot.kernels.cpu.conv_epilogue import Epilogue, epilogue_of, extras_of
from ingot.kernels.cpu.gemm_pack import Array
from ingot.kernels.cpu.gemm_tiles import COLUMNS
from ingot.kernels.cpu.linear import zero_points
from ingot.kernels.node import Node


def start_of_bytes(build: KernelBuilder, node: Node, weight: Array, wide: int) -> tuple[Handle | None, Epilogue]:
    """What sums start from in each output channel, and the epilogue that remains: -a Σ w, what bytes that count from
    `a` add too much, and the bias."""
    epilogue, bias = epilogue_of(build, node, 2, "int32"), np.zeros(len(weight), np.int32)
    if _starts_with_bias(node):
        bias, rest = _bias(node), without_first(epilogue.expression)
        epilogue = replace(epilogue, expression=rest)
    zero_point = zero_points(node)[0]
    sums = of_products(weight, node.dtype, zero_point, bias)
    excess = zero_point + (128 if node.dtype == "int8" else 0)
    start = bias - excess * weight.astype(np.int64).reshape(len(weight), -1).sum(axis=1)
    padded = np.zeros(-(-len(weight) // (wide * COLUMNS)) * wide * COLUMNS, np.int32)
    padded[: len(weight)] = start.astype(np.int32)
    return build.pack(padded) if padded.any() else None, replace(epilogue, sums=sums)


def _starts_with_bias(node: Node) -> bool:
    """Whether the epilogue adds a constant to the sums of each channel before anything else."""
    used = [operand for instruction in node.epilogue.instructions for operand in instruction.operands]
    first = node.epilogue.instructions[0] if node.epilogue else None
    if first is None or first.op != "Add" or first.dtype != "int32" or used.count(Input(0)) != 1:
        return False
    others = [operand for operand in first.operands if operand != Input(0)]
    if len(others) != 1 or not isinstance(others[0], Input) or used.count(others[0]) != 1:
        return False
    port = extras_of(node, 2)[others[0].index - 1]
    return port.constant is not None and port.constant.size == node.output.shape[1]


def _bias(node: Node) -> Array:
    first = node.epilogue.instructions[0]
    index = next(operand.index for operand in first.operands if isinstance(operand, Input) and operand.index)
    constant = extras_of(node, 2)[index - 1].constant
    assert constant is not None
    return constant.ravel()

"""Weights of QuantizedLinear in memory: words of 32 bits, each with neighbours along K of one column.

Panels of `vectors` × lanes columns, K-major within a panel. A word holds unsigned numbers: `offset` is added to signed
ones, and taken off again with the zero points. What is a number's neighbour depends on how the numbers come out: as
bytes for VNNI (groups of four), as 16-bit integers for pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ingot.dtypes import compact
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.node import Node

Array = np.ndarray[Any, Any]
WORD_BITS = 32
LARGEST_BLOCK = 128  # weights whose products are summed as integers
_BLOCK_STEP = 8


@dataclass(frozen=True)
class Digits:
    """How a word is taken apart: shifted by multiples of `bits` and masked, into units of `unit` bits."""

    bits: int
    unit: int

    @property
    def count(self) -> int:
        """Numbers in a word."""
        return WORD_BITS // self.bits

    @property
    def fields(self) -> int:
        """Numbers in a unit: how many vectors a vector of words makes."""
        return self.unit // self.bits

    @property
    def group(self) -> int:
        """Numbers of one field of a word, which are multiplied and added together."""
        return WORD_BITS // self.unit

    @property
    def mask(self) -> int:
        """The lowest number of every unit of a word."""
        return sum(((1 << self.bits) - 1) << (self.unit * u) for u in range(self.group))

    def place(self, k: int) -> int:
        """The bit at which number `k` of a word begins."""
        field, within = divmod(k, self.group)
        return within * self.unit + field * self.bits


def digits_for(bits: int, isa: Isa) -> Digits:
    """Bytes where four of them are multiplied at once, else 16-bit integers."""
    return Digits(bits, 8 if isa.has("avx512_vnni") else 16)


@dataclass(frozen=True, eq=False)
class Weights:
    """A QuantizedLinear's constants, their numbers made unsigned."""

    unsigned_KN: Array
    scale_GN: Array
    zero_GN: Array | None  # of the unsigned numbers; None where it is `zero` everywhere
    zero: int
    bits: int
    group: int

    @property
    def depth(self) -> int:
        return int(self.unsigned_KN.shape[0])

    @property
    def columns(self) -> int:
        return int(self.unsigned_KN.shape[1])

    @cached_property
    def block(self) -> int:
        """Numbers along K of which x has one scale: a group, or an even part of it that integers can sum."""
        whole = min(self.group, self.depth)
        if self.group < self.depth:
            return max(b for b in range(_BLOCK_STEP, min(whole, LARGEST_BLOCK) + 1, _BLOCK_STEP) if whole % b == 0)
        parts = -(-whole // LARGEST_BLOCK)
        return -(-whole // (parts * _BLOCK_STEP)) * _BLOCK_STEP

    @property
    def blocks(self) -> int:
        """Blocks along K, the last one filled up."""
        return -(-self.depth // self.block)

    @property
    def blocks_of_group(self) -> int:
        """Blocks that follow each other under one scale."""
        return self.group // self.block if self.group < self.depth else self.blocks


def weights_of(node: Node) -> Weights:
    """The node's weights, scales and zero points."""
    weight, scale = node.input(1).constant, node.input(2).constant
    zero = node.input(3).constant if node.has_input(3) else None
    assert weight is not None and scale is not None
    bits, group = int(node.attributes["bits"]), int(node.attributes["group"])
    offset = 1 << (bits - 1) if weight.dtype == np.int8 else 0
    unsigned = ((weight.astype(np.int16) + offset) & ((1 << bits) - 1)).astype(np.uint8)
    zeros = np.zeros(scale.shape, np.int16) if zero is None else zero.astype(np.int16)
    first = int(zeros.flat[0]) + offset
    varied = None if (zeros + offset == first).all() else (zeros + offset).astype(np.int16)
    return Weights(unsigned, compact(scale), varied, first, bits, group)


def pack_words(weights: Weights, digits: Digits, width: int, step: int) -> Array:
    """unsigned[K, N] → uint32 [panel, word along K, column of the panel], zeros up to whole panels and `step`s of K."""
    depth, columns = weights.unsigned_KN.shape
    count, panels = digits.count, -(-columns // width)
    rows = -(-depth // step) * step // count
    padded = weights.unsigned_KN
    if padded.shape != (rows * count, panels * width):
        padded = np.zeros((rows * count, panels * width), np.uint8)
        padded[:depth, :columns] = weights.unsigned_KN
    cut = padded.reshape(rows, count, panels * width)
    words = np.zeros((rows, panels * width), np.uint32)
    for k in range(count):
        words |= cut[:, k].astype(np.uint32) << digits.place(k)
    return np.ascontiguousarray(words.reshape(rows, panels, width).transpose(1, 0, 2))


def pack_groups(values_GN: Array, width: int, fill: float) -> Array:
    """[groups, N] → [panel, group, column of the panel], `fill` beyond the last column."""
    groups, columns = values_GN.shape
    panels = -(-columns // width)
    padded = np.full((groups, panels * width), fill, values_GN.dtype)
    padded[:, :columns] = values_GN
    return np.ascontiguousarray(padded.reshape(groups, panels, width).transpose(1, 0, 2))

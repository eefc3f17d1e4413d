"""Where keys and values lie in a pool of blocks: cache[blocks, 2, G, block * depth], keys [depth, block] each; behind
those of int8 a scale for each token."""

from __future__ import annotations

from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.ops_paged import block_of, line_of
from ingot.kernels.cpu.build import Handle, KernelBuilder, PhaseFunction
from ingot.kernels.cpu.llvm import Index, Value
from ingot.kernels.cpu.render import load
from ingot.kernels.node import Port


@dataclass(frozen=True)
class Pool:
    """Extents of a pool; `block` tokens in a block."""

    handle: Handle
    dtype: str
    groups: int
    block: int
    depth: int

    @property
    def panel(self) -> int:
        """Bytes of a group's keys, or values, in a block."""
        return line_of(self.block, self.depth, self.dtype) * size_of(self.dtype)

    @property
    def scaled(self) -> bool:
        """Whether elements are integers with scales."""
        return self.dtype == "int8"

    @property
    def scales_at(self) -> int:
        """Where the scales of a block's keys, or values, of a group begin."""
        return self.block * self.depth

    def read(self, f: PhaseFunction, pointer: Value, offset: Index, lanes: int, mask: Value | None = None) -> Value:
        """Elements as floats, without their scales."""
        x = load(f, self.dtype, pointer, offset, lanes, mask)
        return f.cast("sitofp", x, "float") if self.scaled else x

    def keys(self, f: PhaseFunction, block: Index, group: Index) -> Value:
        """A block's keys of a group, [depth, block]."""
        return f.at(f.pointer(self.handle), f.index(block) * (2 * self.groups * self.panel) + group * self.panel)

    def values(self, f: PhaseFunction, block: Index, group: Index) -> Value:
        """A block's values of a group, [block, depth]."""
        return f.at(self.keys(f, block, group), self.groups * self.panel)

    def key(self, f: PhaseFunction, slot: Value, group: Index) -> Value:
        """The first element of a slot's key; the next ones are `block` elements apart."""
        block, offset = f.divide(slot, self.block), f.index(f.remainder(slot, self.block))
        return f.at(self.keys(f, block, group), offset * size_of(self.dtype))

    def value(self, f: PhaseFunction, slot: Value, group: Index) -> Value:
        """A slot's value."""
        block, offset = f.divide(slot, self.block), f.index(f.remainder(slot, self.block))
        return f.at(self.values(f, block, group), offset * (self.depth * size_of(self.dtype)))


def pool_of(build: KernelBuilder, port: Port, handle: Handle, depth: int) -> Pool:
    """The pool of an operand, whose heads have `depth` elements."""
    groups, line = port.shape[2], port.shape[3]
    assert isinstance(groups, int) and isinstance(line, int)
    return Pool(handle, port.dtype, groups, block_of(line, depth, port.dtype), depth)

"""How operands broadcast over an output: dimensions merged where all of them agree, strides, vector widths, costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingot.dtypes import size_of
from ingot.ir.expression import Expression
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import bits_of
from ingot.kernels.cpu.render import MEMORY, register_element
from ingot.kernels.node import Node, Port
from ingot.plan.extent import Extent, evaluate, product, symbols_of

TYPICAL = 64  # what a symbol is taken to be where a cost is estimated
BYTES_PER_MICROSECOND = 10_000
CYCLES_PER_MICROSECOND = 2600
_CYCLES = {
    "Exp": 8, "Log": 10, "Sigmoid": 12, "Tanh": 12, "Erf": 10, "Gelu": 12, "GeluTanh": 14, "Softplus": 16, "Elu": 10,
    "Div": 8, "Reciprocal": 8, "Sqrt": 8, "Quantize": 12, "Pow": 60, "Sin": 40, "Cos": 40, "Tan": 60, "Mod": 40,
}  # fmt: skip


@dataclass(frozen=True)
class Dims:
    """Extents of the output, outer to inner, and which of them each operand has (it repeats along the others)."""

    extents: tuple[Extent, ...]
    present: tuple[tuple[bool, ...], ...]

    @property
    def inner(self) -> Extent:
        """Extent of the innermost dimension, 1 for a scalar."""
        return self.extents[-1] if self.extents else 1

    @property
    def outer(self) -> tuple[Extent, ...]:
        """All extents but the innermost."""
        return self.extents[:-1]

    def inner_stride(self, operand: int) -> int:
        """1 for an operand that runs along the innermost dimension, 0 for one that repeats."""
        return int(bool(self.extents) and self.present[operand][-1])

    def stride(self, operand: int, dim: int) -> Extent:
        """Elements between neighbours of the operand along a dimension."""
        if not self.present[operand][dim]:
            return 0
        later = range(dim + 1, len(self.extents))
        return product(self.extents[d] for d in later if self.present[operand][d])


def merged(output: Sequence[Extent], shapes: Sequence[Sequence[Extent]]) -> Dims:
    """The fewest dimensions that say how `shapes` broadcast to `output`; a size other than 1 is the output's."""
    rank = len(output)
    aligned = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    extents: list[Extent] = []
    patterns: list[tuple[bool, ...]] = []
    for dim, extent in enumerate(output):
        if extent == 1:
            continue
        pattern = tuple(shape[dim] != 1 for shape in aligned)
        if patterns and patterns[-1] == pattern:
            extents[-1] = product((extents[-1], extent))
        else:
            extents.append(extent)
            patterns.append(pattern)
    return Dims(tuple(extents), tuple(tuple(p[i] for p in patterns) for i in range(len(shapes))))


def dims_of(node: Node) -> Dims:
    """The node's dimensions."""
    return merged(node.output.shape, [port.shape for port in ports_of(node)])


def ports_of(node: Node) -> list[Port]:
    """The operands."""
    return [port for port in node.inputs if port is not None]


def fits(node: Node) -> bool:
    """Whether the operands broadcast to the output."""
    rank = len(node.output.shape)
    for port in ports_of(node):
        aligned = node.output.shape[rank - len(port.shape) :]
        pairs = zip(port.shape, aligned, strict=len(port.shape) <= rank)
        if len(port.shape) > rank or any(contradict(size, wanted) for size, wanted in pairs):
            return False
    return True


def contradict(size: Extent, wanted: Extent) -> bool:
    """Whether an operand's size can never be that of the output's axis."""
    return size != 1 and isinstance(size, int) and isinstance(wanted, int) and size != wanted


def register_bytes(dtype: str) -> int:
    """Bytes of an element in a register; truth values take one."""
    return max(bits_of(register_element(dtype)) // 8, 1)


def vector_lanes(isa: Isa, expression: Expression, dtypes: Sequence[str]) -> int:
    """Lanes that fill a register with the widest type in use."""
    used = {*dtypes, *(instruction.dtype for instruction in expression.instructions)}
    return isa.lanes * 4 // max(map(register_bytes, used))


def can_mask(isa: Isa, dtypes: Sequence[str]) -> bool:
    """Whether the ISA has masked loads and stores of these types."""
    return isa.has("avx512bw") or all(bits_of(MEMORY[dtype]) >= 32 for dtype in dtypes)


def typical(extent: Extent) -> int:
    """The extent, or a guess for a symbolic one."""
    return max(evaluate(extent, dict.fromkeys(symbols_of(extent), TYPICAL)), 0)


def cycles(expression: Expression, lanes: int, isa: Isa) -> float:
    """Cycles of one core for a vector of the expression."""
    wide = max(lanes / isa.lanes, 1)
    return wide * (1 + sum(_CYCLES.get(instruction.op, 1) for instruction in expression.instructions))


def traffic(node: Node) -> int:
    """Bytes of all operands and results."""
    ports = [*ports_of(node), *node.outputs]
    return sum(typical(port.elements) * size_of(port.dtype) for port in ports)

"""What a product does before it quantizes, in units of the result: a scale, an offset and a rounding are left.

Sums and positive scales commute, so that Quantize's division disappears into the constants, and bounds at the ends of
the result's type into its saturation. Numbers differ from a division's where a result lies within a float's rounding of
the middle between two integers, as the order of the products before decides too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array
from ingot.ir.expression import Expression, Input, Instruction, Literal, Operand, Result
from ingot.ir.graph import constant_of, dtype_of
from ingot.passes.facts import ACCUMULATOR, accumulator_dtype, changed, epilogue_of, extras_of, main_inputs, operands_of
from ingot.passes.rewrite import Builder, Table, rewrite_node
from ingot.passes.rewrite import Result as Outcome

LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}
FLOAT = "float32"


@rewrite_node("Conv", "ConvTranspose", "Linear", "MatMul", "Pointwise")
def requantize(op: Builder, node: ir.Node) -> Outcome:
    """Quantize(f(x), s, z) => Quantize(f'(x), 1, z) with the constants of f divided by s"""
    expression = epilogue_of(node)
    if not any(map(_can_scale, expression.instructions)):
        return None
    extras = operands_of(node) if node.op_type == "Pointwise" else (None, *extras_of(node))
    whole_sums = node.op_type != "Pointwise" and accumulator_dtype(node) == "int32"
    scaling = _Scaling(op, expression, extras, [], {}, [], whole_sums)
    for index, instruction in enumerate(expression.instructions):
        scaling.copy(index, instruction)
    whole = expressions.tidy(Expression(tuple(scaling.instructions)))
    if node.op_type == "Pointwise":
        whole, kept = expressions.prune(whole, (*operands_of(node), *scaling.constants))
        return op.Pointwise(*kept, expression=expressions.format(whole))
    whole, names = expressions.prune(whole, (ACCUMULATOR, *extras_of(node), *scaling.constants), keep=1)
    left = [value for value in names if isinstance(value, ir.Value)]
    return op.make(node.op_type, *main_inputs(node), *left, **changed(node, epilogue=expressions.format(whole)))


def _can_scale(instruction: Instruction) -> bool:
    """Whether it is a Quantize to bytes, after other instructions, with a known scale that has a reciprocal."""
    if instruction.op != "Quantize" or instruction.dtype not in LIMITS:
        return False
    source, scale, zero = instruction.operands
    if not (isinstance(source, Result) and isinstance(scale, Literal) and isinstance(zero, Literal)):
        return False
    return scale.value != 1 and 1e-30 < scale.value < 1e30


@dataclass(eq=False)
class _Scaling:
    """An expression rewritten in order: `places` are the new operands of old results, `scale` that of the Quantize at
    hand."""

    op: Builder
    expression: Expression
    extras: Sequence[ir.Value | None]
    instructions: list[Instruction]
    places: dict[int, Operand]
    constants: list[ir.Value]
    whole_sums: bool
    scale: np.float32 = field(default_factory=lambda: np.float32(1))

    def copy(self, index: int, instruction: Instruction) -> None:
        """The next instruction, on its new operands."""
        if _can_scale(instruction):
            source, scale, zero = instruction.operands
            assert isinstance(scale, Literal) and isinstance(zero, Literal)
            self.scale = np.float32(scale.value)
            scaled = self.bounded(self.of(source), instruction.dtype, int(zero.value))
            self.places[index] = self.emit(replace(instruction, operands=(scaled, Literal(1.0), zero)))
            return
        self.places[index] = self.emit(replace(instruction, operands=tuple(map(self._moved, instruction.operands))))

    def _moved(self, operand: Operand) -> Operand:
        return self.places[operand.index] if isinstance(operand, Result) else operand

    def emit(self, instruction: Instruction) -> Operand:
        self.instructions.append(instruction)
        return Result(len(self.instructions) - 1)

    def of(self, operand: Operand) -> Operand:
        """An old operand divided by `scale`."""
        match operand:
            case Literal(value):
                return Literal(float(str(np.float32(value) / self.scale)))
            case Input(index):
                constant = self._constant(index)
                return self._times(operand) if constant is None else constant
            case Result(index):
                return self._result(self.expression.instructions[index], operand)

    def _result(self, instruction: Instruction, operand: Operand) -> Operand:
        whole = self._whole(instruction)
        if whole is not None:
            return whole
        places = _LINEAR.get(instruction.op)
        if instruction.dtype != FLOAT or places is None:
            return self._times(operand)
        if instruction.op == "Mul" and not self._is_known(instruction.operands[1]):
            places = (0,)
        if instruction.op in ("Mul", "Dequantize") and not self._is_known(instruction.operands[places[0]]):
            return self._times(operand)
        operands = [self.of(o) if i in places else self._moved(o) for i, o in enumerate(instruction.operands)]
        return self.emit(replace(instruction, operands=tuple(operands)))

    def _whole(self, instruction: Instruction) -> Operand | None:
        """(Cast(%0) f + b) / s => Cast(%0 + b / f) (f / s) where b / f are integers, as quantizers make biases"""
        product = self._made_by(instruction.operands[0], "Mul") if instruction.op == "Add" else None
        cast = None if product is None else self._made_by(product.operands[0], "Cast")
        if product is None or cast is None or cast.operands != (Input(0),) or not self.whole_sums:
            return None
        scale, bias = self._value(product.operands[1]), self._value(instruction.operands[1])
        if scale is None or bias is None or not np.all(scale):
            return None
        exact = bias.astype(np.float64) / scale
        whole = np.rint(exact)
        if np.any(np.abs(exact - whole) > 1e-3 + 1e-6 * np.abs(whole)) or np.any(np.abs(whole) >= 1 << 30):
            return None
        like = next(extra for extra in self.extras if extra is not None)
        self.constants.append(self.op.constant(whole.astype(np.int32), like))
        added = Input(len(self.extras) + len(self.constants) - 1)
        total = self.emit(Instruction("Add", (Input(0), added), "int32"))
        real = self.emit(Instruction("Cast", (total,), FLOAT))
        return self.emit(Instruction("Mul", (real, self.of(product.operands[1])), FLOAT))

    def _made_by(self, operand: Operand, op: str) -> Instruction | None:
        instruction = self.expression.instructions[operand.index] if isinstance(operand, Result) else None
        return instruction if instruction is not None and instruction.op == op else None

    def _value(self, operand: Operand) -> Array | None:
        """A known operand as an array."""
        if isinstance(operand, Literal):
            return np.asarray(operand.value, np.float32)
        return self._array(operand.index) if isinstance(operand, Input) else None

    def _is_known(self, operand: Operand) -> bool:
        return isinstance(operand, Literal) or (isinstance(operand, Input) and self._array(operand.index) is not None)

    def _array(self, index: int) -> Array | None:
        extra = self.extras[index]
        return None if extra is None or dtype_of(extra) != FLOAT else constant_of(extra)

    def _constant(self, index: int) -> Operand | None:
        array, extra = self._array(index), self.extras[index]
        if array is None or extra is None:
            return None
        self.constants.append(self.op.constant(array / self.scale, extra))
        return Input(len(self.extras) + len(self.constants) - 1)

    def _times(self, operand: Operand) -> Operand:
        inverse = Literal(float(str(np.float32(1) / self.scale)))
        return self.emit(Instruction("Mul", (self._moved(operand), inverse), FLOAT))

    def bounded(self, operand: Operand, dtype: str, zero: int) -> Operand:
        """The operand without bounds that the integers have themselves."""
        low, high = LIMITS[dtype]
        instruction = self.instructions[operand.index] if isinstance(operand, Result) else None
        if instruction is None or instruction.op not in ("Relu", "Clip"):
            return operand
        source, lower, upper = (*instruction.operands, Literal(0), Literal(np.inf))[:3]
        if not isinstance(lower, Literal) or not isinstance(upper, Literal):
            return operand
        if lower.value > low - zero:
            return operand
        if upper.value >= high - zero - 0.5:
            return self.bounded(source, dtype, zero)
        return self.emit(Instruction("Min", (source, upper), FLOAT))


# Operands that are scaled where the result is: all of a sum, one of a product.
_LINEAR = {
    "Add": (0, 1), "Sub": (0, 1), "Max": (0, 1), "Min": (0, 1), "Clip": (0, 1, 2), "Relu": (0,), "LeakyRelu": (0,),
    "Neg": (0,), "Abs": (0,), "Mul": (1,), "Dequantize": (1,),
}  # fmt: skip

REQUANTIZE = Table("requantization", (requantize,))

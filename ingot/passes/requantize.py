"""What a product does before it quantizes, in units of the result: a scale, an offset and a rounding are left.

Sums and positive scales commute, so that Quantize's division disappears into the constants, and bounds at the ends of
the result's type into its saturation. Numbers differ from a division's where a result lies within a float's rounding of
the middle between two integers, as the order of the products before decides too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ingot.ir import expression as expressions
from ingot.ir.elementwise import Array
from ingot.ir.expression import Expression, Input, Instruction, Literal, Operand, Result
from ingot.ir.graph import constant_of, dtype_of
from ingot.passes.facts import ACCUMULATOR, changed, epilogue_of, extras_of, main_inputs
from ingot.passes.rewrite import Builder, Table, reject, rewrite_node
from ingot.passes.rewrite import Result as Outcome

LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}
FLOAT = "float32"


@rewrite_node("Conv", "ConvTranspose", "Linear", "MatMul")
def requantize(op: Builder, node: ir.Node) -> Outcome:
    """Quantize(f(x), s, z) => Quantize(f'(x), 1, z) with the constants of f divided by s"""
    expression = epilogue_of(node)
    last = expression.instructions[-1] if expression else None
    if last is None or last.op != "Quantize" or last.dtype not in LIMITS:
        return None
    source, scale, zero = last.operands
    if not isinstance(scale, Literal) or not isinstance(zero, Literal) or scale.value == 1:
        return None
    factor = np.float32(1) / np.float32(scale.value)
    if not (isinstance(source, Result) and np.isfinite(factor) and factor > 0):
        return reject("its scale has no reciprocal", node)
    scaling = _Scaling(op, expression, extras_of(node), factor, list(expression.instructions), [])
    scaled = scaling.bounded(scaling.of(source), last.dtype, int(zero.value))
    scaling.emit(replace(last, operands=(scaled, Literal(1.0), zero)))
    names = (ACCUMULATOR, *extras_of(node), *scaling.constants)
    whole, kept = expressions.prune(expressions.tidy(Expression(tuple(scaling.instructions))), names, keep=1)
    extras = [value for value in kept if isinstance(value, ir.Value)]
    return op.make(node.op_type, *main_inputs(node), *extras, **changed(node, epilogue=expressions.format(whole)))


@dataclass(frozen=True, eq=False)
class _Scaling:
    """An expression under way to `factor` times its value: instructions and constants are appended."""

    op: Builder
    expression: Expression
    extras: tuple[ir.Value, ...]
    factor: np.float32
    instructions: list[Instruction]
    constants: list[ir.Value]

    def emit(self, instruction: Instruction) -> Operand:
        self.instructions.append(instruction)
        return Result(len(self.instructions) - 1)

    def of(self, operand: Operand) -> Operand:
        """`factor` times an operand."""
        match operand:
            case Literal(value):
                return Literal(float(str(np.float32(value) * self.factor)))
            case Input(index):
                constant = self._constant(index)
                return self._times(operand) if constant is None else constant
            case Result(index):
                return self._result(self.expression.instructions[index], operand)

    def _result(self, instruction: Instruction, operand: Operand) -> Operand:
        places = _LINEAR.get(instruction.op)
        if instruction.dtype != FLOAT or places is None:
            return self._times(operand)
        if instruction.op == "Mul" and not self._is_known(instruction.operands[1]):
            places = (0,)
        if instruction.op in ("Mul", "Dequantize") and not self._is_known(instruction.operands[places[0]]):
            return self._times(operand)
        operands = [self.of(o) if i in places else o for i, o in enumerate(instruction.operands)]
        return self.emit(replace(instruction, operands=tuple(operands)))

    def _is_known(self, operand: Operand) -> bool:
        return isinstance(operand, Literal) or (isinstance(operand, Input) and self._array(operand.index) is not None)

    def _array(self, index: int) -> Array | None:
        extra = self.extras[index - 1] if index else None
        return None if extra is None or dtype_of(extra) != FLOAT else constant_of(extra)

    def _constant(self, index: int) -> Operand | None:
        array = self._array(index)
        if array is None:
            return None
        self.constants.append(self.op.constant(array * self.factor, self.extras[index - 1]))
        return Input(len(self.extras) + len(self.constants))

    def _times(self, operand: Operand) -> Operand:
        return self.emit(Instruction("Mul", (operand, Literal(float(str(self.factor)))), FLOAT))

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

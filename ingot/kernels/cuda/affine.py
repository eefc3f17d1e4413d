"""Epilogues that libraries have a word for: activation(Σ coefficient · operand + constant)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ingot.ir.expression import Expression, Input, Instruction, Operand, Result

_ACTIVATIONS = ("Relu", "Gelu", "GeluTanh", "Sigmoid")


@dataclass(frozen=True)
class Affine:
    """`terms`: a number by operand (0 is the accumulator). `scales`: operands that the accumulator is multiplied by.
    `constant` is added; then comes `activation` ("" for none), and a quantized result is divided by `step`."""

    terms: Mapping[int, float] = field(default_factory=dict)
    scales: tuple[int, ...] = ()
    constant: float = 0.0
    activation: str = ""
    step: float = 1.0


def affine(epilogue: Expression) -> Affine | None:
    """What the epilogue computes, up to where it rounds in between; None where it is something else."""
    made: list[Affine | None] = []
    for instruction in epilogue.instructions:
        made.append(_step(instruction, [_operand(o, made) for o in instruction.operands]))
    return made[-1] if made else Affine({0: 1.0})


def _operand(operand: Operand, made: Sequence[Affine | None]) -> Affine | None:
    if isinstance(operand, Result):
        return made[operand.index]
    return Affine({operand.index: 1.0}) if isinstance(operand, Input) else Affine(constant=float(operand.value))


def _step(instruction: Instruction, operands: Sequence[Affine | None]) -> Affine | None:
    known = [o for o in operands if o is not None]
    if len(known) < len(operands):
        return None
    if instruction.op == "Cast":
        return known[0] if instruction.dtype.startswith(("float", "bfloat")) else None
    if instruction.op == "Quantize":  # but for the step it rounds, as a library does that stores such a type
        scale, zero = known[1:]
        return None if scale.terms or zero != Affine() else replace(known[0], step=scale.constant)
    if instruction.op == "Mul" and known[0] != known[1] and _without_sigmoid(known[0]) == _without_sigmoid(known[1]):
        return replace(_without_sigmoid(known[0]), activation="Silu")
    if any(o.activation for o in known):
        return None
    if instruction.op in _ACTIVATIONS:
        return replace(known[0], activation=instruction.op)
    if instruction.op == "Add":
        return _sum(*known)
    return _product(*known) if instruction.op == "Mul" else None


def _without_sigmoid(a: Affine) -> Affine:
    return replace(a, activation="") if a.activation == "Sigmoid" else a


def _sum(a: Affine, b: Affine) -> Affine | None:
    if set(a.terms) & set(b.terms):
        return None
    return Affine({**a.terms, **b.terms}, (*a.scales, *b.scales), a.constant + b.constant)


def _product(a: Affine, b: Affine) -> Affine | None:
    """A number times anything, or an operand times the accumulator alone."""
    for one, other in ((a, b), (b, a)):
        if not one.terms:
            terms = {k: v * one.constant for k, v in other.terms.items()}
            return Affine(terms, other.scales, other.constant * one.constant)
        if set(one.terms) == {0} and len(other.terms) == 1 and not (one.constant or other.constant or other.scales):
            ((operand, coefficient),) = other.terms.items()
            return None if operand == 0 else Affine({0: one.terms[0] * coefficient}, (*one.scales, operand))
    return None

"""Everything elementwise becomes a Pointwise; `{t}` in a text is the type of the result."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ingot.ir.elementwise import FLOATS, INTEGERS, NARROW_FLOATS
from ingot.ir.graph import data_type, dtype_name, dtype_of, scalar_value, shape
from ingot.passes.canonical_table import Builder, Reject, Result, canonical, reject

_SAME = (
    "Neg", "Abs", "Sign", "Floor", "Ceil", "Round", "Exp", "Log", "Sqrt", "Reciprocal", "Erf", "Sigmoid", "Sin", "Cos",
    "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Tanh", "Asinh", "Acosh", "Atanh", "Relu", "Softplus", "HardSwish",
    "BitwiseNot",
)  # fmt: skip
_TEXTS = {
    **{name: f"{name} %0 -> {{t}}" for name in _SAME},
    "Not": "Not %0 -> bool",
    "IsNaN": "IsNaN %0 -> bool",
    "Softsign": "Abs %0 -> {t}; Add $0 1 -> {t}; Div %0 $1 -> {t}",
    "Mish": "Softplus %0 -> {t}; Tanh $0 -> {t}; Mul %0 $1 -> {t}",
    "Where": "Where %0 %1 %2 -> {t}",
    "PRelu": "Less %0 0 -> bool; Mul %0 %1 -> {t}; Where $0 $1 %0 -> {t}",
}
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
_COMPARE = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor")


@canonical(*(name for name in _TEXTS if name != "PRelu"))
def simple(op: Builder) -> Result:
    """The operator as one expression"""
    return op.pointwise(_TEXTS[op.node.op_type].format(t=op.dtype), *op.inputs)


@canonical(*_ARITHMETIC, *_COMPARE)
def binary(op: Builder) -> Result:
    """Two operands; before opset 7 the second one is placed along an axis"""
    dtype = op.dtype if op.node.op_type in _ARITHMETIC else "bool"
    return op.pointwise(f"{op.node.op_type} %0 %1 -> {dtype}", op.x(0), placed(op, op.x(0), op.x(1)))


def placed(op: Builder, x: ir.Value, operand: ir.Value) -> ir.Value:
    """The second operand of the operators of opset 6, whose `axis` says which axis of x its first one is"""
    axis = op.attribute("axis")
    if op.version >= 7 or axis is None:
        return operand
    trailing = len(shape(x)) - int(axis) % len(shape(x)) - len(shape(operand))
    return op.view(operand, [*shape(operand), *([1] * trailing)])


@canonical("Pow")
def power(op: Builder) -> Result:
    """Pow(x, y) in x's type; an integer base with a float exponent is computed in floats"""
    base, exponent = op.x(0), placed(op, op.x(0), op.x(1))
    t, other, number = dtype_of(base), dtype_of(exponent), scalar_value(exponent)
    if t == other or (number is not None and (t in FLOATS or float(number).is_integer())):
        return op.pointwise(f"Pow %0 %1 -> {t}", base, exponent)
    if t in FLOATS or other in INTEGERS:
        return op.pointwise(f"Cast %1 -> {t}; Pow %0 $0 -> {t}", base, exponent)
    return op.pointwise(f"Cast %0 -> {other}; Pow $0 %1 -> {other}; Cast $1 -> {t}", base, exponent)


@canonical("PRelu")
def prelu(op: Builder) -> Result:
    """Where(x < 0, x * slope, x); in opset 6 the slope runs along the channels"""
    x, slope = op.x(0), op.x(1)
    if op.version < 7 and len(shape(slope)) == 1 and len(shape(x)) > 2:
        slope = op.view(slope, [shape(slope)[0], *([1] * (len(shape(x)) - 2))])
    return op.pointwise(_TEXTS["PRelu"].format(t=op.dtype), x, slope)


@canonical("Mod")
def mod(op: Builder) -> Result:
    """Mod with the sign of the divisor, or of the dividend with fmod"""
    return op.pointwise(f"Mod:fmod={op.attribute('fmod', 0)} %0 %1 -> {op.dtype}", op.x(0), op.x(1))


@canonical("BitShift")
def bit_shift(op: Builder) -> Result:
    """BitShift in the direction given"""
    return op.pointwise(f"BitShift:direction={op.attribute('direction')} %0 %1 -> {op.dtype}", op.x(0), op.x(1))


@canonical("LeakyRelu")
def leaky_relu(op: Builder) -> Result:
    """LeakyRelu with its slope"""
    return op.pointwise(f"LeakyRelu:alpha={_number(op, 'alpha', 0.01)} %0 -> {op.dtype}", op.x())


@canonical("Elu")
def elu(op: Builder) -> Result:
    """Elu with its scale"""
    return op.pointwise(f"Elu:alpha={_number(op, 'alpha', 1.0)} %0 -> {op.dtype}", op.x())


@canonical("Selu")
def selu(op: Builder) -> Result:
    """gamma * Elu(x; alpha)"""
    alpha, gamma = _number(op, "alpha", 1.67326319217681884765625), _number(op, "gamma", 1.05070102214813232421875)
    return op.pointwise(f"Elu:alpha={alpha} %0 -> {op.dtype}; Mul $0 {gamma} -> {op.dtype}", op.x())


@canonical("Celu")
def celu(op: Builder) -> Result:
    """alpha * Elu(x / alpha)"""
    alpha, t = _number(op, "alpha", 1.0), op.dtype
    if alpha <= 0:
        return reject(f"its alpha {alpha} is not positive", "use a positive alpha")
    return op.pointwise(f"Div %0 {alpha} -> {t}; Elu:alpha=1.0 $0 -> {t}; Mul $1 {alpha} -> {t}", op.x())


@canonical("ThresholdedRelu")
def thresholded_relu(op: Builder) -> Result:
    """Where(x > alpha, x, 0)"""
    alpha = _number(op, "alpha", 1.0)
    return op.pointwise(f"Greater %0 {alpha} -> bool; Where $0 %0 0 -> {op.dtype}", op.x())


@canonical("HardSigmoid")
def hard_sigmoid(op: Builder) -> Result:
    """clip(alpha * x + beta, 0, 1)"""
    alpha, beta = _number(op, "alpha", 0.2), _number(op, "beta", 0.5)
    return op.pointwise(f"HardSigmoid:alpha={alpha},beta={beta} %0 -> {op.dtype}", op.x())


@canonical("Shrink")
def shrink(op: Builder) -> Result:
    """x + bias below -lambd, x - bias above lambd, else 0"""
    bias, limit, t = _number(op, "bias", 0.0), _number(op, "lambd", 0.5), op.dtype
    if t in INTEGERS and not (bias.is_integer() and limit.is_integer()):
        return reject("its bias or threshold is a fraction while x is an integer", "cast x to float first")
    bias, limit = (int(bias), int(limit)) if t in INTEGERS else (bias, limit)
    return op.pointwise(
        f"Less %0 {-limit} -> bool; Add %0 {bias} -> {t}; Greater %0 {limit} -> bool; Sub %0 {bias} -> {t}; "
        f"Where $2 $3 0 -> {t}; Where $0 $1 $4 -> {t}",
        op.x(),
    )


@canonical("Gelu")
def gelu(op: Builder) -> Result:
    """Gelu by erf, or its approximation by tanh"""
    name = "GeluTanh" if op.attribute("approximate", "none") == "tanh" else "Gelu"
    return op.pointwise(f"{name} %0 -> {op.dtype}", op.x())


@canonical("Swish")
def swish(op: Builder) -> Result:
    """x * Sigmoid(alpha * x)"""
    alpha, t = _number(op, "alpha", 1.0), op.dtype
    scaled = f"Mul %0 {alpha} -> {t}; Sigmoid $0 -> {t}; Mul %0 $1 -> {t}"
    return op.pointwise(f"Sigmoid %0 -> {t}; Mul %0 $0 -> {t}" if alpha == 1 else scaled, op.x())


@canonical("IsInf")
def is_inf(op: Builder) -> Result:
    """x = inf or x = -inf, as far as the attributes ask for them"""
    negative, positive = op.attribute("detect_negative", 1), op.attribute("detect_positive", 1)
    if negative and positive:
        return op.pointwise(f"Abs %0 -> {dtype_of(op.x())}; Equal $0 inf -> bool", op.x())
    if not negative and not positive:
        return op.pointwise("IsNaN %0 -> bool; And $0 0 -> bool", op.x())
    return op.pointwise(f"Equal %0 {'inf' if positive else '-inf'} -> bool", op.x())


@canonical("Sum", "Mean", "Max", "Min")
def variadic(op: Builder) -> Result:
    """Operand after operand"""
    kind, t, values = op.node.op_type, op.dtype, op.inputs
    if len(values) == 1:
        return values[0]
    step = "Add" if kind in ("Sum", "Mean") else kind
    parts = [f"{step} %0 %1 -> {t}", *(f"{step} ${i - 2} %{i} -> {t}" for i in range(2, len(values)))]
    if kind == "Mean":
        parts.append(f"Div ${len(parts) - 1} {len(values)} -> {t}")
    return op.pointwise("; ".join(parts), *values)


@canonical("Clip")
def clip(op: Builder) -> Result:
    """Bounds from attributes (before opset 11), constants or values; one that is absent does not bound"""
    t = op.dtype
    if op.version < 11:
        given: list[ir.Value | float | None] = [op.attribute("min"), op.attribute("max")]
    else:
        given = [op.optional(1), op.optional(2)]
    low, high = (None if _unbounded(bound, t) else bound for bound in given)
    if low is not None and high is not None:
        return op.pointwise(f"Clip %0 %1 %2 -> {t}", op.x(), low, high)
    if low is None and high is None:
        return op.x()
    bound = high if low is None else low
    return op.pointwise(f"{'Max' if high is None else 'Min'} %0 %1 -> {t}", op.x(), bound)  # type: ignore[arg-type]


def _unbounded(bound: ir.Value | float | None, dtype: str) -> bool:
    """Whether the bound is absent or an infinity."""
    number = scalar_value(bound) if isinstance(bound, ir.Value) else bound
    return bound is None or (number is not None and dtype in FLOATS and bool(np.isinf(number)))


@canonical("Cast")
def cast(op: Builder) -> Result:
    """Cast to the type of the attribute"""
    return _casted(op, op.attribute("to"))


@canonical("CastLike")
def cast_like(op: Builder) -> Result:
    """Cast to the type of the second input"""
    return _casted(op, data_type(dtype_of(op.x(1))).value)


def _casted(op: Builder, kind: int) -> Result:
    source, target = dtype_of(op.x()), dtype_name(ir.DataType(kind))
    problem = _uncastable(source, target)
    if problem is not None or target is None:
        return problem or reject("its target type is unknown")
    if source == target:
        return op.x()
    saturate = "" if op.attribute("saturate", 1) or target not in NARROW_FLOATS else ":saturate=0"
    return op.pointwise(f"Cast{saturate} %0 -> {target}", op.x())


def _uncastable(source: str, target: str | None) -> Reject | None:
    for name in (source, target):
        if name not in FLOATS | INTEGERS | {"bool"}:
            return reject(f"{name} elements have no native form", "keep them out of the model's numeric part")
        if name == "float8_e8m0fnu":
            return reject("float8_e8m0fnu has rounding modes of its own", "store scales as float32")
    return None


def _number(op: Builder, name: str, default: float) -> float:
    """A float attribute as the shortest number that is the same in float32."""
    return float(str(np.float32(op.attribute(name, default))))

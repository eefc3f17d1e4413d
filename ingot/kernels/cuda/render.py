"""Expressions as Triton text: one table, for epilogues and Pointwise alike. 16-bit floats are computed in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ingot.ir.elementwise import INSTRUCTIONS, INTEGERS
from ingot.ir.expression import Expression, Input, Instruction, Literal, Operand, dtypes_of
from ingot.kernels.cuda.build import LANGUAGE, FunctionBuilder

NARROW = ("float16", "bfloat16")
FLOAT8, _LARGEST_FLOAT8 = "float8_e4m3fn", 448.0
REAL = ("float32", "float64")
_NAN = "propagate_nan=tl.PropagateNan.ALL"
Write = Callable[..., str]  # (*operands, type=dtype they are computed in, **attributes) -> text


def wide(dtype: str) -> str:
    """What a type is computed in."""
    return "float32" if dtype in (*NARROW, FLOAT8) else dtype


def _extreme(name: str) -> Write:
    def write(a: str, b: str, type: str) -> str:
        return f"tl.{name}({a}, {b}, {_NAN})" if type in REAL else f"tl.{name}({a}, {b})"

    return write


def _libdevice(name: str) -> Write:
    return lambda *operands, type: f"libdevice.{name}({', '.join(operands)})"


def _text(template: str) -> Write:
    """{0}, {1} … are operands, {T} the type, other names attributes."""
    return lambda *operands, type, **attributes: template.format(*operands, T=LANGUAGE[type], **attributes)


def _divide(a: str, b: str, type: str) -> str:
    return f"({a} / {b})" if type in REAL else f"({a} // {b})"


def _modulo(a: str, b: str, type: str, fmod: int) -> str:
    if type in REAL:
        rest = f"libdevice.fmod({a}, {b})"
        return rest if fmod else f"tl.where(({rest} != 0) & (({rest} < 0) != ({b} < 0)), {rest} + {b}, {rest})"
    return f"({a} % {b})" if fmod else f"((({a} % {b}) + {b}) % {b})"


def _power(a: str, b: str, type: str) -> str:
    """Of integers through float64, exact while the result has no more than 50 bits."""
    if type in REAL:
        return f"libdevice.pow({a}, {b})"
    return f"libdevice.rint(libdevice.pow({a}.to(tl.float64), {b}.to(tl.float64))).to({LANGUAGE[type]})"


def _shift(a: str, b: str, type: str, direction: str) -> str:
    return f"({a} {'<<' if direction == 'LEFT' else '>>'} {b})"


_MAXIMUM, _MINIMUM = _extreme("maximum"), _extreme("minimum")
_TANH_OF_GELU = "0.7978845608028654 * ({0} + 0.044715 * {0} * {0} * {0})"

TABLE: dict[str, Write] = {
    "Neg": _text("(-{0})"), "Abs": _text("tl.abs({0})"),
    "Sign": _text("tl.where({0} != {0}, {0}, ({0} > 0).to({T}) - ({0} < 0).to({T}))"),
    "Floor": _text("tl.floor({0})"), "Ceil": _text("tl.ceil({0})"), "Round": _libdevice("rint"),
    "Exp": _text("tl.exp({0})"), "Log": _text("tl.log({0})"), "Sqrt": _libdevice("sqrt"),
    "Reciprocal": _text("(1.0 / {0})"), "Erf": _text("tl.erf({0})"), "Sigmoid": _text("(1.0 / (1.0 + tl.exp(-{0})))"),
    "Sin": _text("tl.sin({0})"), "Cos": _text("tl.cos({0})"),
    **{name: _libdevice(name.lower()) for name in ("Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Tanh", "Asinh",
                                                   "Acosh", "Atanh")},
    "Relu": lambda x, type: _MAXIMUM(x, "0.0" if type in REAL else "0", type),
    "Softplus": _text("(tl.maximum({0}, 0.0) + libdevice.log1p(tl.exp(-tl.abs({0}))))"),
    "HardSwish": _text("({0} * tl.minimum(tl.maximum({0} / 6.0 + 0.5, 0.0), 1.0))"),
    "Gelu": _text("(0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476)))"),
    "GeluTanh": _text("(0.5 * {0} * (1.0 + libdevice.tanh(" + _TANH_OF_GELU + ")))"),
    "BitwiseNot": _text("(~{0})"),
    "LeakyRelu": _text("tl.where({0} >= 0, {0}, {alpha} * {0})"),
    "Elu": _text("tl.where({0} > 0, {0}, {alpha} * libdevice.expm1({0}))"),
    "HardSigmoid": _text("tl.minimum(tl.maximum({0} * {alpha} + {beta}, 0.0), 1.0)"),
    "Add": _text("({0} + {1})"), "Sub": _text("({0} - {1})"), "Mul": _text("({0} * {1})"), "Div": _divide,
    "Pow": _power, "Min": _MINIMUM, "Max": _MAXIMUM, "Mod": _modulo, "BitShift": _shift,
    "BitwiseAnd": _text("({0} & {1})"), "BitwiseOr": _text("({0} | {1})"), "BitwiseXor": _text("({0} ^ {1})"),
    "Equal": _text("({0} == {1})"), "Less": _text("({0} < {1})"), "LessOrEqual": _text("({0} <= {1})"),
    "Greater": _text("({0} > {1})"), "GreaterOrEqual": _text("({0} >= {1})"), "IsNaN": _text("({0} != {0})"),
    "And": _text("({0} & {1})"), "Or": _text("({0} | {1})"), "Xor": _text("({0} ^ {1})"), "Not": _text("({0} == 0)"),
    "Where": _text("tl.where({0}, {1}, {2})"),
    "Clip": lambda x, low, high, type: _MINIMUM(_MAXIMUM(x, low, type), high, type),
}  # fmt: skip
_OF_NARROW = {"Erf": "erf", "Gelu": "gelu"}  # functions of cores.elementary where operands or the result are narrow
_COARSE = (*NARROW, FLOAT8, "int8", "uint8")  # results that hide what those functions are off by
_FLOATS_ONLY = frozenset({
    "Round", "Floor", "Ceil", "Exp", "Log", "Sqrt", "Reciprocal", "Erf", "Sigmoid", "Sin", "Cos", "Tan", "Asin",
    "Acos", "Atan", "Sinh", "Cosh", "Tanh", "Asinh", "Acosh", "Atanh", "Softplus", "HardSwish", "Gelu", "GeluTanh",
    "LeakyRelu", "Elu", "HardSigmoid",
})  # fmt: skip
_CONVERSIONS = frozenset({"Cast", "Quantize", "Dequantize"})
_LIMITS = {f"{u}int{b}": ((0, 2**b - 1) if u else (-(2 ** (b - 1)), 2 ** (b - 1) - 1))
           for u in ("", "u") for b in (8, 16, 32)}  # fmt: skip


def can_render(expression: Expression, operand_dtypes: Sequence[str]) -> bool:
    """Whether every instruction has a text for its types."""
    if any(dtype not in LANGUAGE for dtype in operand_dtypes):
        return False
    return all(
        instruction.dtype in LANGUAGE and _writable(instruction, types)
        for instruction, types in zip(expression.instructions, dtypes_of(expression, operand_dtypes), strict=True)
    )


def _writable(instruction: Instruction, types: Sequence[str]) -> bool:
    if any(type not in LANGUAGE for type in types):
        return False
    if instruction.op == "Quantize":
        return instruction.dtype in (*_LIMITS, FLOAT8)
    if instruction.op in _FLOATS_ONLY:
        return all(wide(type) in REAL for type in types)
    return instruction.op in TABLE or instruction.op in _CONVERSIONS


def render(f: FunctionBuilder, expression: Expression, operands: Sequence[str], dtypes: Sequence[str]) -> str:
    """A variable with the result, in the expression's dtype; operands are texts of values that broadcast."""
    results: list[str] = []
    narrow = expression.dtype in _COARSE
    for instruction, types in zip(expression.instructions, dtypes_of(expression, dtypes), strict=True):
        values = [_value(operand, operands, dtypes, results, expression, type, f.gluon)
                  for operand, type in zip(instruction.operands, types, strict=True)]  # fmt: skip
        results.append(f.let(_instruction(f, instruction, values, types, narrow)))
    return results[-1] if results else operands[0]


def _value(operand: Operand, operands: Sequence[str], dtypes: Sequence[str], results: Sequence[str],
           expression: Expression, type: str, gluon: bool) -> str:  # fmt: skip
    """The operand in the type it is computed in."""
    if isinstance(operand, Literal):
        return literal(operand.value, wide(type), gluon)
    if isinstance(operand, Input):
        text, held = operands[operand.index], dtypes[operand.index]
    else:
        text, held = results[operand.index], expression.instructions[operand.index].dtype
    return converted(text, held, wide(type))


def nothing(dtype: str) -> str:
    """What a load gives outside: Triton makes no float8 of an integer."""
    return "0.0" if dtype == FLOAT8 else "0"


def converted(text: str, held: str, wanted: str) -> str:
    """A value of one dtype in another, as Cast has it."""
    if held == wanted:
        return text
    return f"({text} != 0)" if wanted == "bool" else f"{text}.to({LANGUAGE[wanted]})"


def literal(value: float, type: str, gluon: bool = False) -> str:
    """A number of a type; Gluon's `full` wants a layout, which one number has not."""
    number = int(bool(value)) if type == "bool" else int(value) if type in INTEGERS else float(value)
    written = repr(number) if math.isfinite(number) else f'float("{number}")'
    return f"gl.to_tensor({written}).to({LANGUAGE[type]})" if gluon else f"tl.full((), {written}, {LANGUAGE[type]})"


def _instruction(f: FunctionBuilder, instruction: Instruction, values: Sequence[str], types: Sequence[str],
                 narrow: bool) -> str:  # fmt: skip
    dtype = instruction.dtype
    if instruction.op in _OF_NARROW and wide(types[0]) == "float32" and (narrow or types[0] in NARROW):
        return converted(f"{f.core('elementary', _OF_NARROW[instruction.op])}({values[0]})", "float32", dtype)
    if instruction.op == "Cast":
        return converted(values[0], wide(types[0]), dtype)
    if instruction.op == "Quantize" and dtype == FLOAT8:
        above = _MAXIMUM(f"{values[0]} / {values[1]}", f"-{_LARGEST_FLOAT8}", "float32")
        return f"{_MINIMUM(above, str(_LARGEST_FLOAT8), 'float32')}.to({LANGUAGE[dtype]})"
    if instruction.op == "Quantize":
        low, high = _LIMITS[dtype]
        shifted = f"libdevice.rint({values[0]} / {values[1]}) + {values[2]}.to(tl.float32)"
        return f"tl.minimum(tl.maximum({shifted}, {float(low)}), {float(high)}).to({LANGUAGE[dtype]})"
    if instruction.op == "Dequantize":
        real = f"({values[0]}.to(tl.float32) - {values[2]}.to(tl.float32)) * {values[1]}"
        return f"({real}).to({LANGUAGE[dtype]})"
    entry = INSTRUCTIONS[instruction.op]
    attributes = {name: instruction.attribute(name) for name in entry.attributes}
    type = wide(types[1] if entry.typing == "select" else types[0])
    text = TABLE[instruction.op](*values, type=type, **attributes)
    made = "bool" if entry.typing in ("compare", "logic") else type
    return converted(text, made, dtype)

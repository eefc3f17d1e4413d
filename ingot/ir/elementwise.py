"""The numpy meaning of every expression instruction, with its arity, its attributes and what its operands' types are.

Floats narrower than 32 bits are computed in float32 and rounded once per instruction; integers wrap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ingot.dtypes import numpy_dtype

Array = np.ndarray[Any, Any]
Scalar = int | float | str
Typing = Literal["same", "compare", "select", "cast", "quantize", "dequantize", "logic"]

NARROW_FLOATS = frozenset({
    "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn",
})  # fmt: skip
FLOATS = NARROW_FLOATS | {"float32", "float64"}
SATURATING = frozenset(name for name in NARROW_FLOATS if name.startswith(("float8_e4", "float8_e5", "float4")))
INTEGERS = frozenset({
    "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "int4", "uint4", "int2", "uint2",
})  # fmt: skip


@dataclass(frozen=True)
class Elementwise:
    """One instruction. `typing`: "same": operands and result of one dtype; "compare": the same, but the result is bool;
    "logic": all bool; "select": Where; "cast": any to any; "quantize", "dequantize": (x, scale, zero point)."""

    arity: int
    function: Callable[..., Array]
    typing: Typing = "same"
    attributes: Mapping[str, Scalar] = field(default_factory=dict)


def wide(x: Array) -> Array:
    """x in the type it is computed in."""
    name = x.dtype.name
    if name in NARROW_FLOATS:
        return x.astype(np.float32)
    return x.astype(np.int32) if name in ("int4", "uint4", "int2", "uint2") else x


def cast(x: Array, dtype: str, saturate: Scalar = 1) -> Array:
    """Conversion as ONNX Cast: to integers by truncation, to 8-bit floats saturating unless told otherwise."""
    target = numpy_dtype(dtype)
    if x.dtype == target:
        return x
    if dtype in SATURATING and saturate:
        limits = _limits(dtype)
        return np.clip(wide(x), *limits).astype(target)
    if x.dtype.name in NARROW_FLOATS and dtype not in FLOATS:
        return x.astype(np.float32).astype(target)
    return x.astype(target)


def _limits(dtype: str) -> tuple[float, float]:
    if dtype in INTEGERS and not dtype.endswith(("t2", "t4")):
        limits: Any = np.iinfo(dtype)
        return int(limits.min), int(limits.max)
    import ml_dtypes

    limits = ml_dtypes.iinfo(dtype) if dtype in INTEGERS else ml_dtypes.finfo(dtype)
    return limits.min, limits.max


def _quantize(x: Array, scale: Array, zero: Array, *, dtype: str, saturate: Scalar) -> Array:
    ratio = wide(x) / wide(scale)
    if dtype not in INTEGERS:
        return cast(ratio, dtype, saturate)
    low, high = _limits(dtype)
    shifted = np.rint(ratio).astype(np.float64) + wide(zero).astype(np.float64)
    return np.clip(np.nan_to_num(shifted), int(low), int(high)).astype(np.int64).astype(numpy_dtype(dtype))


def _dequantize(x: Array, scale: Array, zero: Array, *, dtype: str) -> Array:
    real = wide(x).astype(np.float32)
    if zero.dtype.name in INTEGERS:
        real = real - wide(zero).astype(np.float32)
    return (real * wide(scale)).astype(numpy_dtype(dtype))


def _divide(a: Array, b: Array) -> Array:
    """Integers truncate towards zero."""
    if a.dtype.kind not in "iu":
        return np.asarray(np.divide(a, b))
    quotient = np.floor_divide(a, b)
    return np.asarray(quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype))


def _modulo(a: Array, b: Array, *, fmod: Scalar) -> Array:
    return np.asarray(np.fmod(a, b) if fmod else np.mod(a, b))


def _power(a: Array, b: Array) -> Array:
    if a.dtype.kind != "i":
        return np.asarray(np.power(a, b))
    return np.asarray(np.where(b < 0, 0, np.power(a, np.maximum(b, 0))))


def _shift(a: Array, b: Array, *, direction: Scalar) -> Array:
    return np.asarray(np.left_shift(a, b) if direction == "LEFT" else np.right_shift(a, b))


def erf(x: Array) -> Array:
    """Error function."""
    from ingot.ir.oracle_ops.elementwise import erf as exact  # lazily: that package needs onnx

    return np.asarray(exact(x)).astype(x.dtype)


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1 / (1 + small), small / (1 + small)))


def _softplus(x: Array) -> Array:
    return np.asarray(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


def _hard_sigmoid(x: Array, *, alpha: float, beta: float) -> Array:
    return np.clip(x * alpha + beta, 0, 1)


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x))))


_UNARY: dict[str, Callable[[Array], Any]] = {
    "Neg": np.negative, "Abs": np.abs, "Sign": np.sign, "Floor": np.floor, "Ceil": np.ceil, "Round": np.rint,
    "Exp": np.exp, "Log": np.log, "Sqrt": np.sqrt, "Reciprocal": lambda x: 1 / x, "Erf": erf, "Sigmoid": _sigmoid,
    "Sin": np.sin, "Cos": np.cos, "Tan": np.tan, "Asin": np.arcsin, "Acos": np.arccos, "Atan": np.arctan,
    "Sinh": np.sinh, "Cosh": np.cosh, "Tanh": np.tanh, "Asinh": np.arcsinh, "Acosh": np.arccosh, "Atanh": np.arctanh,
    "Relu": lambda x: np.maximum(x, 0), "Softplus": _softplus, "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Gelu": lambda x: 0.5 * x * (1 + erf(x * 0.5**0.5)), "GeluTanh": _gelu_tanh, "BitwiseNot": np.bitwise_not,
}  # fmt: skip
_BINARY: dict[str, Callable[[Array, Array], Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divide, "Pow": _power, "Min": np.minimum,
    "Max": np.maximum, "BitwiseAnd": np.bitwise_and, "BitwiseOr": np.bitwise_or, "BitwiseXor": np.bitwise_xor,
}  # fmt: skip
_COMPARE: dict[str, Callable[[Array, Array], Any]] = {
    "Equal": np.equal, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
}  # fmt: skip
_LOGIC: dict[str, Callable[[Array, Array], Any]] = {"And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor}

INSTRUCTIONS: dict[str, Elementwise] = {
    **{name: Elementwise(1, function) for name, function in _UNARY.items()},
    "LeakyRelu": Elementwise(1, lambda x, alpha: np.where(x >= 0, x, alpha * x), "same", {"alpha": 0.01}),
    "Elu": Elementwise(1, lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(x)), "same", {"alpha": 1.0}),
    "HardSigmoid": Elementwise(1, _hard_sigmoid, "same", {"alpha": 0.2, "beta": 0.5}),
    **{name: Elementwise(2, function) for name, function in _BINARY.items()},
    "Mod": Elementwise(2, _modulo, "same", {"fmod": 0}),
    "BitShift": Elementwise(2, _shift, "same", {"direction": "LEFT"}),
    **{name: Elementwise(2, function, "compare") for name, function in _COMPARE.items()},
    "IsNaN": Elementwise(1, np.isnan, "compare"),
    **{name: Elementwise(2, function, "logic") for name, function in _LOGIC.items()},
    "Not": Elementwise(1, np.logical_not, "logic"),
    "Where": Elementwise(3, lambda condition, yes, no: np.asarray(np.where(condition, yes, no)), "select"),
    "Clip": Elementwise(3, lambda x, low, high: np.minimum(np.maximum(x, low), high)),
    "Cast": Elementwise(1, cast, "cast", {"saturate": 1}),
    "Quantize": Elementwise(3, _quantize, "quantize", {"saturate": 1}),
    "Dequantize": Elementwise(3, _dequantize, "dequantize"),
}
_WANTS_DTYPE = frozenset({"cast", "quantize", "dequantize"})


def compute(op: str, operands: list[Array], dtype: str, attributes: Mapping[str, Scalar]) -> Array:
    """Result of one instruction, of the given dtype."""
    entry = INSTRUCTIONS[op]
    keywords = {**entry.attributes, **attributes}
    if entry.typing in _WANTS_DTYPE:
        return entry.function(*operands, dtype=dtype, **keywords)
    result = entry.function(*map(wide, operands), **keywords)
    return np.asarray(result).astype(numpy_dtype(dtype), copy=False)

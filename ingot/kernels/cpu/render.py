"""Expressions → vector code: one `@render` function per instruction, used by every kernel's epilogue and by Pointwise.

In registers: narrow floats (float16, bfloat16, float8) are float, rounded to their type after each instruction; bool is
i1; other types are themselves. In memory: as numpy has them, bool one byte. Renderers: render_*.py, by family.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.ir.elementwise import FLOATS, NARROW_FLOATS
from ingot.ir.expression import Expression, Input, Instruction, Literal, Operand, Result, dtypes_of
from ingot.kernels.cpu import render_narrow
from ingot.kernels.cpu.bounds import Known, of_dtype, ranges
from ingot.kernels.cpu.llvm import Function, Index, Value, vector

MEMORY = {
    "float32": "float", "float64": "double", "float16": "half", "bfloat16": "i16", "bool": "i8",
    "int8": "i8", "uint8": "i8", "int16": "i16", "uint16": "i16", "int32": "i32", "uint32": "i32",
    "int64": "i64", "uint64": "i64",
}  # fmt: skip
SUB_BYTE = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2}  # bits; one element to a byte, the upper bits of which are 0
MEMORY |= dict.fromkeys([*SUB_BYTE, *render_narrow.FORMATS, "float8_e8m0fnu"], "i8")
FAMILIES = ("render_basic", "render_math", "render_convert")


Codec = tuple[Callable[[Function, Value], Value], Callable[[Function, Value], Value]]
_CODECS: dict[str, Codec] = {
    "bfloat16": (render_narrow.decode_bfloat16, render_narrow.encode_bfloat16),
    "float8_e8m0fnu": (render_narrow.decode_scale, render_narrow.encode_scale),
    **{
        name: (partial(render_narrow.decode, dtype=name), partial(render_narrow.encode, dtype=name))
        for name in render_narrow.FORMATS
    },
}


@dataclass(frozen=True)
class Site:
    """What a renderer may ask about the instruction at hand."""

    instruction: Instruction
    dtypes: tuple[str, ...]
    bounds: tuple[Known, ...] = ()

    @property
    def dtype(self) -> str:
        """dtype of the result."""
        return self.instruction.dtype

    @property
    def is_float(self) -> bool:
        """Whether the first operand is a float."""
        return self.dtypes[0] in FLOATS

    @property
    def is_signed(self) -> bool:
        """Whether the first operand is a signed integer."""
        return self.dtypes[0].startswith("int")


@dataclass(frozen=True)
class Product:
    """Of what a float is the product."""

    a: Value
    b: Value


@dataclass(frozen=True)
class Dequantized:
    """A product with a scale. `apart` makes, if they are known, the same of the number before the zero point went off,
    and what that makes."""

    apart: Callable[[], tuple[Value, Value]] | None = None


Renderer = Callable[..., Value]
_TABLE: dict[str, Renderer] = {}


def render(*ops: str) -> Callable[[Renderer], Renderer]:
    """Register `(f, site, *operands) -> Value`; all operands are vectors with the same number of lanes."""

    def register(function: Renderer) -> Renderer:
        _TABLE.update(dict.fromkeys(ops, function))
        return function

    return register


@lru_cache(maxsize=1)
def renderers() -> dict[str, Renderer]:
    """The whole table."""
    for family in FAMILIES:
        importlib.import_module(f"ingot.kernels.cpu.{family}")
    return _TABLE


def register_element(dtype: str) -> str:
    """LLVM element type a dtype has in registers."""
    return "float" if dtype in NARROW_FLOATS else "i1" if dtype == "bool" else MEMORY[dtype]


def can_render(expression: Expression, operand_dtypes: Sequence[str]) -> bool:
    """Whether every instruction and dtype of the expression has vector code."""
    table = renderers()
    dtypes = {*operand_dtypes, *(i.dtype for i in expression.instructions)}
    return dtypes <= MEMORY.keys() and all(i.op in table for i in expression.instructions)


def render_expression(
    f: Function, expression: Expression, operands: Sequence[Value], operand_dtypes: Sequence[str], lanes: int,
    bounds: Sequence[Known] = (),
) -> Value:  # fmt: skip
    """Code for the expression over register values of `lanes` lanes; the result is in its register form. `bounds`: what
    is known of the operands' values."""
    if not expression:
        return operands[0]
    table, results = renderers(), list[Value]()
    known = ranges(expression, bounds or [of_dtype(dtype) for dtype in operand_dtypes])
    types = dtypes_of(expression, operand_dtypes)
    for instruction, dtypes, taken in zip(expression.instructions, types, known, strict=True):
        values = [
            _operand(f, operand, operands, results, dtype, lanes)
            for operand, dtype in zip(instruction.operands, dtypes, strict=True)
        ]
        value = table[instruction.op](f, Site(instruction, dtypes, taken), *values)
        results.append(round_to(f, value, instruction.dtype))
    return results[-1]


def _operand(
    f: Function, operand: Operand, operands: Sequence[Value], results: Sequence[Value], dtype: str, lanes: int
) -> Value:
    match operand:
        case Input(index):
            return operands[index]
        case Result(index):
            return results[index]
        case Literal(value):
            return f.constant(vector(register_element(dtype), lanes), stored(value, dtype))


def stored(value: int | float, dtype: str) -> int | float:
    """A literal as its type holds it."""
    number = np.asarray(value).astype(numpy_dtype(dtype))
    return float(number) if dtype in FLOATS else int(number)


# -- memory -----------------------------------------------------------------------------------------------------------


def load(f: Function, dtype: str, pointer: Value, offset: Index, lanes: int, mask: Value | None = None) -> Value:
    """`lanes` elements from memory in register form; masked-off lanes are zero."""
    type_ = vector(MEMORY[dtype], lanes)
    if mask is None:
        raw = f.load(type_, pointer, offset)
    else:
        raw = f.load_masked(type_, pointer, mask, offset)
    return widen(f, raw, dtype)


def store(
    f: Function, dtype: str, value: Value, pointer: Value, offset: Index, mask: Value | None = None
) -> None:  # fmt: skip
    """Store a value in register form as `dtype`."""
    raw = narrow(f, value, dtype)
    if mask is None:
        f.store(raw, pointer, offset)
    else:
        f.store_masked(raw, pointer, mask, offset)


def broadcast(f: Function, dtype: str, pointer: Value, offset: Index, lanes: int) -> Value:
    """One element from memory in every lane."""
    return widen(f, f.splat(f.load(MEMORY[dtype], pointer, offset), lanes), dtype)


def widen(f: Function, raw: Value, dtype: str) -> Value:
    """Memory form → register form."""
    if dtype == "bool":
        return f.compare("ne", raw, 0)
    if dtype == "float16":
        return f.cast("fpext", raw, "float")
    if dtype in _CODECS:
        return _CODECS[dtype][0](f, raw)
    return _wrapped(f, raw, dtype)


def narrow(f: Function, value: Value, dtype: str) -> Value:
    """Register form → memory form (rounding to nearest even where narrower)."""
    if dtype == "bool":
        return f.cast("zext", value, "i8")
    if dtype == "float16":
        return f.cast("fptrunc", value, "half")
    if dtype in _CODECS:
        return _CODECS[dtype][1](f, value)
    return f.binary("and", value, (1 << SUB_BYTE[dtype]) - 1) if dtype in SUB_BYTE else value


def round_to(f: Function, value: Value, dtype: str) -> Value:
    """A register value rounded to a narrow float's precision, wrapped to an integer's bits (others unchanged)."""
    if dtype == "float16":
        return f.cast("fpext", f.cast("fptrunc", value, "half"), "float")
    if dtype == "bfloat16":
        return render_narrow.round_bfloat16(f, value)
    if dtype in _CODECS:
        return widen(f, narrow(f, value, dtype), dtype)
    return _wrapped(f, value, dtype)


def _wrapped(f: Function, value: Value, dtype: str) -> Value:
    if dtype not in SUB_BYTE:
        return value
    spare = 8 - SUB_BYTE[dtype]
    return f.binary("ashr" if dtype.startswith("int") else "lshr", f.binary("shl", value, spare), spare)

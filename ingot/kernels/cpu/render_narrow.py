"""Floats narrower than half in integer arithmetic: a register holds the float, memory the code of 16, 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass

from ingot.kernels.cpu.llvm import Function, Value, lanes_of, vector


@dataclass(frozen=True)
class Format:
    """Sign, exponent and mantissa bits from the top. `largest`: code of the largest number; `overflow`: of what is
    above it, `infinite` where that means infinity; `nan`: of NaN, which with `unsigned_zero` has the code of -0."""

    exponent: int
    mantissa: int
    bias: int
    largest: int
    overflow: int
    nan: int
    infinite: bool = False
    unsigned_zero: bool = False

    @property
    def sign(self) -> int:
        """The sign's bit."""
        return 1 << (self.exponent + self.mantissa)

    @property
    def maximum(self) -> float:
        """The largest number."""
        fraction = self.largest & ((1 << self.mantissa) - 1)
        return (1 + fraction / (1 << self.mantissa)) * 2.0 ** ((self.largest >> self.mantissa) - self.bias)


FORMATS = {
    "float8_e4m3fn": Format(4, 3, 7, 0x7E, 0x7F, 0x7F),
    "float8_e4m3fnuz": Format(4, 3, 8, 0x7F, 0x80, 0x80, unsigned_zero=True),
    "float8_e5m2": Format(5, 2, 15, 0x7B, 0x7C, 0x7E, infinite=True),
    "float8_e5m2fnuz": Format(5, 2, 16, 0x7F, 0x80, 0x80, unsigned_zero=True),
    "float4_e2m1fn": Format(2, 1, 1, 0x7, 0x7, 0x8),
}


def decode(f: Function, raw: Value, dtype: str) -> Value:
    """Codes of a format of the table → float."""
    form = FORMATS[dtype]
    code = f.binary("and", f.cast("zext", raw, "i32"), form.sign * 2 - 1)
    size = f.binary("and", code, form.sign - 1)
    shift = 23 - form.mantissa
    number = f.bitcast(f.binary("shl", size, shift), _floats(raw)) * 2.0 ** (127 - form.bias)
    if form.infinite:
        number = f.select(f.compare("eq", size, form.overflow), float("inf"), number)
    if not form.unsigned_zero:
        last = form.overflow if form.infinite else form.largest
        number = f.select(f.compare("ugt", size, last), float("nan"), number)
    sign = f.binary("shl", f.binary("and", code, form.sign), 32 - form.sign.bit_length())
    number = f.bitcast(f.binary("or", f.bitcast(number, code.type), sign), number.type)
    return f.select(f.compare("eq", code, form.sign), float("nan"), number) if form.unsigned_zero else number


def encode(f: Function, value: Value, dtype: str) -> Value:
    """float → the nearest code (ties to even) of a format of the table, in an i8."""
    form = FORMATS[dtype]
    size = f.call("llvm.fabs", value.type, value)
    bits, smallest = _bits(f, size), 2.0 ** (1 - form.bias)
    shift = 23 - form.mantissa
    odd = f.binary("and", f.binary("lshr", bits, shift), 1)
    normal = f.binary("lshr", bits + odd + ((1 << (shift - 1)) - 1), shift) - ((127 - form.bias) << form.mantissa)
    magic = f.constant(value.type, smallest * 2.0**shift)  # its last bit is the smallest subnormal
    subnormal = _bits(f, size + magic) - _bits(f, magic)
    code = f.select(f.compare("olt", size, smallest), subnormal, normal)
    code = f.select(f.compare("sgt", code, form.largest), form.overflow, code)
    sign = f.binary("lshr", f.binary("and", _bits(f, value), 1 << 31), 32 - form.sign.bit_length())
    if form.unsigned_zero:
        sign = f.select(f.compare("eq", code, 0), 0, sign)
    sign = f.select(f.compare("uno", value, value), 0, sign) if form.nan == form.sign else sign
    code = f.select(f.compare("uno", value, value), form.nan, code)
    return f.cast("trunc", f.binary("or", code, sign), "i8")


def decode_scale(f: Function, raw: Value) -> Value:
    """float8_e8m0fnu → float: 2**(code - 127), code 255 is NaN."""
    code = f.cast("zext", raw, "i32")
    number = f.bitcast(f.binary("shl", code, 23), _floats(raw))
    number = f.select(f.compare("eq", code, 0), 2.0**-127, number)
    return f.select(f.compare("eq", code, 255), float("nan"), number)


def encode_scale(f: Function, value: Value) -> Value:
    """float → float8_e8m0fnu: the nearest power of two, the upper one of two; NaN for what is not a positive number."""
    bits = _bits(f, value)
    code = f.binary("lshr", bits + (1 << 22), 23)
    positive = f.binary("and", f.compare("ogt", value, 0.0), f.compare("olt", value, float("inf")))
    return f.cast("trunc", f.select(positive, code, 255), "i8")


def decode_bfloat16(f: Function, raw: Value) -> Value:
    """bfloat16 → float: its upper half."""
    return f.bitcast(f.binary("shl", f.cast("zext", raw, "i32"), 16), _floats(raw))


def encode_bfloat16(f: Function, value: Value) -> Value:
    """float → bfloat16, ties to even, in an i16; subnormal numbers count as zero where the processor's instruction does
    it."""
    if f.rounds_bfloat16:
        return f.bitcast(f.cast("fptrunc", value, "bfloat"), vector("i16", lanes_of(value.type)))
    return f.cast("trunc", f.binary("lshr", _rounded_bfloat16(f, value), 16), "i16")


def round_bfloat16(f: Function, value: Value) -> Value:
    """The float nearest to a bfloat16; storing it as bfloat16 costs nothing more."""
    if f.rounds_bfloat16:
        return f.cast("fpext", f.cast("fptrunc", value, "bfloat"), "float")
    return f.bitcast(f.binary("and", _rounded_bfloat16(f, value), 0xFFFF0000), value.type)


def _rounded_bfloat16(f: Function, value: Value) -> Value:
    """i32 bits whose upper half is the bfloat16 nearest to a float; NaN stays a quiet NaN."""
    bits = _bits(f, value)
    odd = f.binary("and", f.binary("lshr", bits, 16), 1)
    return f.select(f.compare("uno", value, value), f.binary("or", bits, 0x00400000), bits + odd + 0x7FFF)


def _floats(raw: Value) -> str:
    return vector("float", lanes_of(raw.type))


def _bits(f: Function, value: Value) -> Value:
    return f.bitcast(value, vector("i32", lanes_of(value.type)))

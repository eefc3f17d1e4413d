"""Renderers of Cast, Quantize and Dequantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ingot.ir.elementwise import FLOATS, INTEGERS, SATURATING
from ingot.ir.expression import Literal, Operand
from ingot.kernels.cpu.llvm import Function, Value, bits_of, element_of, lanes_of, vector
from ingot.kernels.cpu.math import at_least, at_most
from ingot.kernels.cpu.render import SUB_BYTE, Dequantized, Product, Site, register_element, render
from ingot.kernels.cpu.render_narrow import FORMATS


def is_signed(dtype: str) -> bool:
    """Whether a type is a signed integer."""
    return dtype.startswith("int")


def integer_range(dtype: str) -> tuple[int, int]:
    """Lowest and highest number of an integer type."""
    bits = SUB_BYTE.get(dtype) or bits_of(register_element(dtype))
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if is_signed(dtype) else (0, (1 << bits) - 1)


def convert(f: Function, x: Value, source: str, target: str) -> Value:
    """Register form of one dtype → that of another, not yet rounded to a narrow target; to integers by truncation."""
    if source == target:
        return x
    if target == "bool":
        return f.compare("une" if source in FLOATS else "ne", x, 0)
    element = register_element(target)
    if source in FLOATS:
        return _resized(f, x, target) if target in FLOATS else _truncated(f, x, target)
    if target in FLOATS:
        return f.cast("sitofp" if is_signed(source) else "uitofp", x, element)
    if bits_of(element) <= bits_of(x.type):
        return f.cast("trunc", x, element)
    return f.cast("sext" if is_signed(source) else "zext", x, element)


def _resized(f: Function, x: Value, target: str) -> Value:
    element = register_element(target)
    if bits_of(element) >= bits_of(x.type):
        return f.cast("fpext", x, element)
    return f.cast("fptrunc", _odd(f, x) if target != "float32" else x, element)


def _odd(f: Function, x: Value) -> Value:
    """A double cut to a float's mantissa with its last bit set if anything was lost: it can be rounded again."""
    bits = f.bitcast(x, vector("i64", lanes_of(x.type)))
    lost = f.compare("ne", f.binary("and", bits, (1 << 29) - 1), 0)
    kept = f.binary("and", bits, -1 << 29)
    return f.bitcast(f.select(lost, f.binary("or", kept, 1 << 29), kept), x.type)


def _truncated(f: Function, x: Value, target: str) -> Value:
    """As x86 does it, and numpy with it: through int32 or int64, wrapping; beyond those gives the lowest number."""
    element = register_element(target)
    if target == "uint64":
        return _to_uint64(f, x)
    middle = "i64" if bits_of(element) == 64 or target == "uint32" else "i32"
    return f.cast("trunc", f.cast("fptosi", x, middle), element)


def _to_uint64(f: Function, x: Value) -> Value:
    """Numbers above int64 less 2**63, whose bit is put back."""
    large = f.compare("oge", x, 2.0**63)
    below = f.cast("fptosi", f.select(large, x - 2.0**63, x), "i64")
    return f.binary("xor", below, f.select(large, f.constant(below.type, -(1 << 63)), 0))


@render("Cast")
def cast(f: Function, site: Site, x: Value) -> Value:
    """x in another type; 8-bit floats saturate unless told otherwise."""
    source, target = site.dtypes[0], site.dtype
    return _saturated(f, convert(f, x, source, target), site) if source != target else x


def _saturated(f: Function, x: Value, site: Site) -> Value:
    if site.dtype not in SATURATING or not site.instruction.attribute("saturate"):
        return x
    maximum = FORMATS[site.dtype].maximum
    return at_most(f, at_least(f, x, -maximum), maximum)


@dataclass(frozen=True)
class _Quantized:
    """What a quantized number was before it became a byte. `word`: what saturation makes the byte of; `bounded`: the
    integer without its zero point; `near` makes a float of it, where rounding can be by addition."""

    word: Value
    bounded: Value
    near: Callable[[], Value] | None
    zero: Operand


@render("Quantize")
def quantize(f: Function, site: Site, x: Value, scale: Value, zero: Value) -> Value:
    """saturate(round(x / scale) + zero)"""
    if site.dtype not in INTEGERS:
        return _saturated(f, f.binary("fdiv", *(_real(f, site, v, i) for i, v in enumerate((x, scale)))), site)
    exact = "double" if _wide(site) else "float"
    ratio = _ratio(f, site, *(f.cast("fpext", _real(f, site, v, i), exact) for i, v in enumerate((x, scale))))
    integer, largest = "i64" if exact == "double" else "i32", _largest(site)
    shift = f.cast("sext" if is_signed(site.dtype) else "zext", zero, integer)
    low, high = (f.constant(shift.type, bound) - shift for bound in integer_range(site.dtype))
    capped = ratio
    if largest > _SAFE:
        below = f.cast("sitofp", high, exact)
        capped = f.select(f.compare("olt", below, ratio), below, ratio)
    rounded = f.intrinsic(_lrint(capped, integer), shift.type, capped)  # NaN and what is too low: the lowest integer
    raised = f.select(f.compare("sgt", rounded, low), rounded, low)
    bounded, word = raised, raised + shift
    if largest <= _SAFE:
        bounded, word = f.select(f.compare("slt", raised, high), raised, high), rounded + shift
    elif _is_zero(site.instruction.operands[2]):
        word = rounded
    made = f.cast("trunc", bounded + shift, element_of(zero.type))
    near = largest < _NEAR and exact == "float"
    f.origins[made.text] = _Quantized(
        word, bounded, partial(_rounded, f, x, ratio, low, high) if near else None, site.instruction.operands[2]
    )
    return made


_SAFE = 2.0**30  # ratios that certainly become 32-bit integers
_NEAR = 2.0**21  # and those to which adding 1.5 * 2**23 rounds


def _largest(site: Site) -> float:
    """The largest magnitude that the ratio can have."""
    known, scale = site.bounds[0], site.instruction.operands[1]
    if known is None or not isinstance(scale, Literal) or not abs(scale.value) > 1e-30:
        return float("inf")
    return known.largest / abs(scale.value)


def _is_zero(operand: Operand) -> bool:
    return isinstance(operand, Literal) and operand.value == 0


def _rounded(f: Function, x: Value, ratio: Value, low: Value, high: Value) -> Value:
    """The ratio rounded, within integers low and high, as a float: one addition rounds, in which a product may take
    part, one subtraction leaves the integer."""
    middle = f.constant(ratio.type, 1.5 * 2**23)
    origin = f.origins.get(x.text) if ratio.text == x.text else None
    moved = f.fma(origin.a, origin.b, middle) if isinstance(origin, Product) else ratio + middle
    ends = [f.cast("sitofp", end, "float") + middle for end in (low, high)]
    return _clipped(f, moved, *ends) - middle


def pack_bytes(f: Function, numbers: Sequence[Value], dtype: str) -> Value | None:
    """Four vectors of 16 bytes, just quantized, as one of 64; None where they were not. (AVX-512: saturation bounds
    them below, and each of four steps serves several vectors.)"""
    origins = [f.origins.get(number.text) for number in numbers]
    if not all(isinstance(o, _Quantized) and o.word.type == "<16 x i32>" for o in origins):
        return None
    words = [o.word for o in origins if isinstance(o, _Quantized)]
    pairs = [
        f.intrinsic("llvm.x86.avx512.packssdw.512", "<32 x i16>", a, b)
        for a, b in zip(words[::2], words[1::2], strict=True)
    ]
    pack = "packsswb" if is_signed(dtype) else "packuswb"
    mixed = f.bitcast(f.intrinsic(f"llvm.x86.avx512.{pack}.512", "<64 x i8>", *pairs), "<16 x i32>")
    return f.shuffle(mixed, mixed, [4 * lane + vector for vector in range(4) for lane in range(4)])


def _ratio(f: Function, site: Site, x: Value, scale: Value) -> Value:
    """x / scale. By a known scale: the product with its reciprocal, corrected by the remainder, which rounds as a
    division does (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990) at a
    tenth of its time; bounds in between keep infinities from becoming NaN."""
    known = site.instruction.operands[1]
    if not isinstance(known, Literal) or element_of(x.type) != "float":
        return f.binary("fdiv", x, scale)
    number = np.float32(known.value)
    if number == 1:
        return x
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / number
    if not (np.isfinite(inverse) and abs(inverse) > np.finfo(np.float32).tiny and abs(number) > 1e-30):
        return f.binary("fdiv", x, scale)
    rough = _clipped(f, x * float(inverse), f.constant(x.type, -1e5), f.constant(x.type, 1e5))
    remainder = f.fma(f.constant(x.type, -float(number)), rough, x)
    return f.fma(remainder, float(inverse), rough)


def _wide(site: Site) -> bool:
    """Whether a float does not hold all numbers in question."""
    return any(dtype in ("int32", "uint32", "int64", "uint64", "float64") for dtype in (site.dtypes[0], site.dtype))


def _real(f: Function, site: Site, value: Value, position: int) -> Value:
    dtype = site.dtypes[position]
    return value if dtype in FLOATS else convert(f, value, dtype, "float64" if _wide(site) else "float32")


def _clipped(f: Function, x: Value, low: Value, high: Value) -> Value:
    """min(max(x, low), high); NaN gives low."""
    raised = f.select(f.compare("ogt", x, low), x, low)
    return f.select(f.compare("olt", raised, high), raised, high)


def _lrint(x: Value, integer: str) -> str:
    lanes = f"v{lanes_of(x.type)}" if lanes_of(x.type) > 1 else ""
    return f"llvm.lrint.{lanes}{integer}.{lanes}{'f64' if element_of(x.type) == 'double' else 'f32'}"


@render("Dequantize")
def dequantize(f: Function, site: Site, x: Value, scale: Value, zero: Value) -> Value:
    """(x - zero) scale, in float32"""
    source, element, origin = site.dtypes[0], register_element(site.dtype), f.origins.get(x.text)
    if isinstance(origin, _Quantized) and origin.zero == site.instruction.operands[2] and bits_of(x.type) == 8:
        if origin.near is not None:
            real = origin.near()
        else:
            real = f.cast("sitofp", origin.bounded, "float" if "i32" in origin.bounded.type else "double")
        return _scaled(f, _matched(f, real, "float"), scale, element)
    if source in INTEGERS and bits_of(x.type) < 32:
        wide = [f.cast("sext" if is_signed(source) else "zext", v, "i32") for v in (x, zero)]
        return _shifted(f, site, wide, scale, element)
    real = convert(f, x, source, "float32")
    real = real - convert(f, zero, source, "float32") if site.dtypes[2] in INTEGERS else real
    return _scaled(f, real, scale, element)


def _shifted(f: Function, site: Site, wide: Sequence[Value], scale: Value, element: str) -> Value:
    """The product of a short integer, and what it is made of where the zero point is known."""
    made = _scaled(f, f.cast("sitofp", wide[0] - wide[1], "float"), scale, element)
    known = [operand for operand in site.instruction.operands[1:] if isinstance(operand, Literal)]
    if len(known) == 2 and known[1].value and element == "float":
        rest = f.constant(made.type, -float(np.float32(known[1].value) * np.float32(known[0].value)))
        f.origins[made.text] = Dequantized(
            lambda: (_scaled(f, f.cast("sitofp", wide[0], "float"), scale, element), rest)
        )
    return made


def _scaled(f: Function, real: Value, scale: Value, element: str) -> Value:
    """The product; a sum that it goes into may be rounded once with it."""
    made = _matched(f, f.binary("fmul contract", real, _matched(f, scale, "float")), element)
    f.origins[made.text] = Dequantized()
    return made


def _matched(f: Function, x: Value, element: str) -> Value:
    return f.cast("fpext" if bits_of(element) > bits_of(x.type) else "fptrunc", x, element)

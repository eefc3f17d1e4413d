"""Renderers of arithmetic, comparison, logic and selection."""

from __future__ import annotations

from ingot.ir.expression import Literal
from ingot.kernels.cpu.llvm import Function, Value, bits_of, element_of, lanes_of, vector
from ingot.kernels.cpu.math import at_least, at_most, magnitude
from ingot.kernels.cpu.render import Dequantized, Product, Site, render

_COMPARE = {
    "Equal": ("oeq", "eq", "eq"), "Less": ("olt", "slt", "ult"), "LessOrEqual": ("ole", "sle", "ule"),
    "Greater": ("ogt", "sgt", "ugt"), "GreaterOrEqual": ("oge", "sge", "uge"),
}  # fmt: skip
_BITWISE = {"And": "and", "Or": "or", "Xor": "xor", "BitwiseAnd": "and", "BitwiseOr": "or", "BitwiseXor": "xor"}
_ROUNDING = {"Floor": "llvm.floor", "Ceil": "llvm.ceil", "Round": "llvm.rint", "Sqrt": "llvm.sqrt"}


@render("Add")
def add(f: Function, site: Site, a: Value, b: Value) -> Value:
    """a + b; integers wrap. A dequantized operand's product and the sum may be rounded once; of two, the zero point of
    one joins the product of the other."""
    if not site.is_float:
        return a + b
    for one, other in ((a, b), (b, a)):
        origin = f.origins.get(other.text)
        if not isinstance(f.origins.get(one.text), Dequantized) or not isinstance(origin, Dequantized):
            continue
        if origin.apart is not None:
            product, rest = origin.apart()
            return f.binary("fadd contract", f.binary("fadd contract", one, rest), product)
    return f.binary("fadd contract", a, b)


@render("Sub")
def subtract(f: Function, site: Site, a: Value, b: Value) -> Value:
    """a - b; integers wrap."""
    return a - b


@render("Mul")
def multiply(f: Function, site: Site, a: Value, b: Value) -> Value:
    """a * b; integers wrap."""
    made = a * b
    if site.is_float:
        f.origins[made.text] = Product(a, b)
    return made


@render("Div")
def divide(f: Function, site: Site, a: Value, b: Value) -> Value:
    """a / b; integers truncate towards zero, by zero gives 0."""
    return f.binary("fdiv", a, b) if site.is_float else integer_quotient(f, site, a, b)


@render("Mod")
def modulo(f: Function, site: Site, a: Value, b: Value) -> Value:
    """Remainder with the sign of b; with that of a where fmod is set."""
    as_c = bool(site.instruction.attribute("fmod"))
    if site.is_float:
        return _float_modulo(f, a, b, as_c)
    rest = a - integer_quotient(f, site, a, b) * b
    rest = f.select(f.compare("eq", b, 0), 0, rest)
    if as_c or not site.is_signed:
        return rest
    crossed = f.compare("slt", f.binary("xor", rest, b), 0)
    return rest + f.select(f.binary("and", f.compare("ne", rest, 0), crossed), b, 0)


def integer_quotient(f: Function, site: Site, a: Value, b: Value) -> Value:
    """Truncated quotient; 0 where b is 0; the lowest number by -1 wraps."""
    if bits_of(a.type) <= 32:
        return _quotient_through_double(f, site, a, b)
    by_zero = f.compare("eq", b, 0)
    if not site.is_signed:
        return f.select(by_zero, 0, f.binary("udiv", a, f.select(by_zero, 1, b)))
    negated = f.compare("eq", b, -1)
    safe = f.select(f.binary("or", by_zero, negated), 1, b)
    quotient = f.binary("sdiv", a, safe)
    return f.select(by_zero, 0, f.select(negated, 0 - a, quotient))


def _quotient_through_double(f: Function, site: Site, a: Value, b: Value) -> Value:
    """Exact: an inexact quotient of 32-bit numbers is at least 2**-32 from an integer, relatively."""
    convert = "sitofp" if site.is_signed else "uitofp"
    quotient = f.binary("fdiv", f.cast(convert, a, "double"), f.cast(convert, b, "double"))
    quotient = f.select(f.compare("eq", b, 0), 0.0, quotient)
    element = element_of(a.type)
    if site.is_signed and bits_of(a.type) == 32:  # the lowest number by -1 does not fit
        return f.cast("trunc", f.cast("fptosi", quotient, "i64"), element)
    wide = f.cast("fptosi" if site.is_signed else "fptoui", quotient, "i32")
    return f.cast("trunc", wide, element)


def _float_modulo(f: Function, a: Value, b: Value, as_c: bool) -> Value:
    """Exact while |a / b| < 2**53: one fused a - b trunc(a / b), corrected where the quotient was rounded up."""
    narrow = element_of(a.type) == "float"
    wide_a, wide_b = (f.cast("fpext", v, "double") if narrow else v for v in (a, b))
    count = f.call("llvm.trunc", wide_a.type, f.binary("fdiv", wide_a, wide_b))
    rest = f.fma(count, wide_b * -1.0, wide_a)
    size = magnitude(f, wide_b)
    signed_size = f.call("llvm.copysign", wide_a.type, size, wide_a)
    rest = f.select(f.compare("olt", rest * signed_size, 0.0), rest + signed_size, rest)
    finite = f.compare("olt", magnitude(f, wide_a), float("inf"))
    rest = f.select(f.binary("and", f.compare("oeq", size, float("inf")), finite), wide_a, rest)
    if not as_c:
        rest = f.select(f.compare("olt", rest * wide_b, 0.0), rest + wide_b, rest)
    return f.cast("fptrunc", rest, "float") if narrow else rest


@render("Min")
def minimum(f: Function, site: Site, a: Value, b: Value) -> Value:
    """min(a, b); NaN if either is."""
    return _extreme(f, site, a, b, "olt", "llvm.smin", "llvm.umin")


@render("Max")
def maximum(f: Function, site: Site, a: Value, b: Value) -> Value:
    """max(a, b); NaN if either is."""
    return _extreme(f, site, a, b, "ogt", "llvm.smax", "llvm.umax")


def _extreme(f: Function, site: Site, a: Value, b: Value, before: str, signed: str, unsigned: str) -> Value:
    if not site.is_float:
        return f.call(signed if site.is_signed else unsigned, a.type, a, b)
    known = [isinstance(operand, Literal) for operand in site.instruction.operands]
    first, second = (b, a) if known[1] else (a, b)
    chosen = f.select(f.compare(before, first, second), first, second)  # NaN in either gives `second`
    return chosen if any(known) else f.select(f.compare("uno", first, first), first, chosen)


@render("Clip")
def clip(f: Function, site: Site, x: Value, low: Value, high: Value) -> Value:
    """min(max(x, low), high); NaN stays NaN."""
    if site.is_float:
        return at_most(f, at_least(f, x, low), high)
    sign = "s" if site.is_signed else "u"
    return f.call(f"llvm.{sign}min", x.type, f.call(f"llvm.{sign}max", x.type, x, low), high)


@render("Relu")
def relu(f: Function, site: Site, x: Value) -> Value:
    """max(x, 0); NaN stays NaN."""
    if site.is_float:
        return at_least(f, x, 0.0)
    return f.call("llvm.smax", x.type, x, 0) if site.is_signed else x


@render("Neg")
def negate(f: Function, site: Site, x: Value) -> Value:
    """-x"""
    return f.value(x.type, f"fneg {x.type} {x.text}") if site.is_float else 0 - x


@render("Abs")
def absolute(f: Function, site: Site, x: Value) -> Value:
    """|x|; the lowest integer stays."""
    if site.is_float:
        return magnitude(f, x)
    return f.select(f.compare("slt", x, 0), 0 - x, x) if site.is_signed else x


@render("Sign")
def sign(f: Function, site: Site, x: Value) -> Value:
    """-1, 0 or 1; NaN stays NaN."""
    if site.is_float:
        return f.select(f.compare("ogt", x, 0.0), 1.0, f.select(f.compare("olt", x, 0.0), f.lift(-1.0, x.type), x))
    one_or_none = f.cast("zext", f.compare("ne", x, 0), f"i{bits_of(x.type)}")
    return f.select(f.compare("slt", x, 0), -1, one_or_none) if site.is_signed else one_or_none


@render("Reciprocal")
def reciprocal(f: Function, site: Site, x: Value) -> Value:
    """1 / x"""
    return f.binary("fdiv", 1.0, x)


@render(*_ROUNDING)
def rounded(f: Function, site: Site, x: Value) -> Value:
    """Floor, Ceil, Round (half to even) and Sqrt are instructions; integers stay."""
    return f.call(_ROUNDING[site.instruction.op], x.type, x) if site.is_float else x


@render(*_COMPARE)
def compared(f: Function, site: Site, a: Value, b: Value) -> Value:
    """a ? b; false where either is NaN."""
    ordered, signed, unsigned = _COMPARE[site.instruction.op]
    return f.compare(ordered if site.is_float else signed if site.is_signed else unsigned, a, b)


@render("IsNaN")
def is_nan(f: Function, site: Site, x: Value) -> Value:
    """Whether x is not a number."""
    return f.compare("uno", x, x) if site.is_float else f.constant(vector("i1", lanes_of(x.type)), 0)


@render(*_BITWISE)
def bitwise(f: Function, site: Site, a: Value, b: Value) -> Value:
    """And, or, exclusive or of integers or truth values."""
    return f.binary(_BITWISE[site.instruction.op], a, b)


@render("Not", "BitwiseNot")
def inverted(f: Function, site: Site, x: Value) -> Value:
    """All bits flipped."""
    return f.binary("xor", x, 1 if site.dtypes[0] == "bool" else -1)


@render("BitShift")
def shifted(f: Function, site: Site, a: Value, b: Value) -> Value:
    """a shifted by b bits; by its width or more gives 0 (-1 for negative numbers to the right)."""
    bits = bits_of(a.type)
    last = f.call("llvm.umin", b.type, b, bits - 1)
    if site.instruction.attribute("direction") != "LEFT" and site.is_signed:
        return f.binary("ashr", a, last)
    instruction = "shl" if site.instruction.attribute("direction") == "LEFT" else "lshr"
    return f.select(f.compare("ugt", b, bits - 1), 0, f.binary(instruction, a, last))


@render("Where")
def where(f: Function, site: Site, condition: Value, yes: Value, no: Value) -> Value:
    """condition ? yes : no"""
    return f.select(condition, yes, no)


@render("LeakyRelu")
def leaky_relu(f: Function, site: Site, x: Value) -> Value:
    """x >= 0 ? x : alpha x"""
    alpha = float(site.instruction.attribute("alpha"))
    return f.select(f.compare("olt", x, 0.0), x * alpha, x)


@render("HardSigmoid")
def hard_sigmoid(f: Function, site: Site, x: Value) -> Value:
    """clip(alpha x + beta, 0, 1)"""
    alpha, beta = (float(site.instruction.attribute(name)) for name in ("alpha", "beta"))
    return at_most(f, at_least(f, x * alpha + beta, 0.0), 1.0)


@render("HardSwish")
def hard_swish(f: Function, site: Site, x: Value) -> Value:
    """x clip(x / 6 + 1/2, 0, 1)"""
    return x * at_most(f, at_least(f, f.fma(x, 1 / 6, f.constant(x.type, 0.5)), 0.0), 1.0)

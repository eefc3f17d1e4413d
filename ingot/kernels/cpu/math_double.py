"""Functions that are computed in double, for floats too: circular, hyperbolic, their inverses, power.

Float results are rounded once, double ones are within a few ulp. Sources: as math.py.
"""

from __future__ import annotations

import functools
import math as numbers
from collections.abc import Callable

from ingot.kernels.cpu.llvm import Function, Value, element_of
from ingot.kernels.cpu.math import (
    LN2_SHORT,
    at_least,
    at_most,
    exp,
    expm1,
    integers,
    log,
    magnitude,
    polynomial,
    split,
    with_sign,
)

# (sin r - r) / r³ and (cos r - 1 + r²/2) / r⁴ in r² on |r| <= π/4
_SIN = (-0.16666666666666632, 0.00833333333332233, -0.00019841269829734394, 2.7557313664770174e-06,
        -2.5050753636980292e-08, 1.5896524277032076e-10)  # fmt: skip
_COS = (0.0416666666666666, -0.001388888888887411, 2.480158728945944e-05, -2.755731434257182e-07,
        2.0875721589595753e-09, -1.1359544920042429e-11)  # fmt: skip
# (atan r - r) / r³ in r² on |r| <= tan(π/8); (asin r - r) / r³ in r² on |r| <= 1/2
_ATAN = (-0.333333333333332, 0.19999999999953322, -0.14285714280165945, 0.11111110781761947, -0.09090897704509424,
         0.07692059194646907, -0.06663091648225969, 0.05847793411963876, -0.050388479779186784, 0.03805235400805062,
         -0.017893207946266237)  # fmt: skip
_ASIN = (0.16666666666666763, 0.07499999999969809, 0.044642857175588926, 0.03038194265971559, 0.02237221636983728,
         0.01735158675686639, 0.013981127841856124, 0.011396364512126134, 0.01079470609400247, 0.0036511955685314956,
         0.021843232577979554, -0.021193206854798044, 0.032751250819871736)  # fmt: skip
_LOG_TAIL = (0.6666666666666735, 0.39999999999411545, 0.2857142874317752, 0.22222198483711345, 0.18183569376196382,
             0.15313911812972686, 0.14797427829979776)  # fmt: skip
_HALF_PI, _HALF_PI_REST = numbers.pi / 2, 6.123233995736766e-17
_MAGIC = 1.5 * 2.0**52  # added, it leaves the nearest integer in the low bits


def through_double(function: Callable[..., Value]) -> Callable[..., Value]:
    """The function for float vectors too: widened, computed, rounded."""

    @functools.wraps(function)
    def run(f: Function, *operands: Value) -> Value:
        if element_of(operands[0].type) == "double":
            return function(f, *operands)
        return f.cast("fptrunc", function(f, *(f.cast("fpext", x, "double") for x in operands)), "float")

    return run


def _quadrant(f: Function, x: Value) -> tuple[Value, Value]:
    """(integers whose low bits are n, r) with x = n π/2 + r, |r| <= π/4; beyond |x| = 2⁵¹ r is arbitrary."""
    shifted = f.fma(x, 2 / numbers.pi, f.constant(x.type, _MAGIC))
    n = shifted - _MAGIC
    remainder = f.fma(n, -_HALF_PI_REST, f.fma(n, -_HALF_PI, x))
    return f.bitcast(shifted, integers(x)), at_most(f, at_least(f, remainder, -0.8), 0.8)


def _sine_and_cosine(f: Function, r: Value) -> tuple[Value, Value]:
    square = r * r
    sine = f.fma(square * r, polynomial(f, square, _SIN), r)
    tail = f.fma(square * square, polynomial(f, square, _COS), square * -0.5)
    return sine, tail + 1.0


def _turned(f: Function, x: Value, quarters: int) -> Value:
    """sin(x + quarters π/2)"""
    bits, r = _quadrant(f, x)
    sine, cosine = _sine_and_cosine(f, r)
    place = bits + quarters
    odd = f.compare("ne", f.binary("and", place, 1), 0)
    flip = f.binary("shl", f.binary("and", place, 2), 62)
    value = f.bitcast(f.select(odd, cosine, sine), place.type)
    return f.bitcast(f.binary("xor", value, flip), x.type)


@through_double
def sin(f: Function, x: Value) -> Value:
    """Sine; of infinity NaN."""
    return f.select(f.compare("oeq", x, 0.0), x, _turned(f, x, 0))


@through_double
def cos(f: Function, x: Value) -> Value:
    """Cosine; of infinity NaN."""
    return _turned(f, x, 1)


@through_double
def tan(f: Function, x: Value) -> Value:
    """sin / cos; a quarter turn further it is -cos / sin"""
    bits, r = _quadrant(f, x)
    sine, cosine = _sine_and_cosine(f, r)
    odd = f.compare("ne", f.binary("and", bits, 1), 0)
    above, below = f.select(odd, cosine * -1.0, sine), f.select(odd, sine, cosine)
    return f.select(f.compare("oeq", x, 0.0), x, f.binary("fdiv", above, below))


@through_double
def atan(f: Function, x: Value) -> Value:
    """atan t = π/4 + atan((t - 1) / (t + 1)) = π/2 - atan(1 / t)"""
    size = magnitude(f, x)
    middle, far = f.compare("ogt", size, numbers.tan(numbers.pi / 8)), f.compare("ogt", size, 1 + numbers.sqrt(2))
    above = f.select(far, -1.0, f.select(middle, size - 1.0, size))
    below = f.select(far, size, f.select(middle, size + 1.0, f.constant(x.type, 1.0)))
    r = f.binary("fdiv", above, below)
    start = f.select(far, numbers.pi / 2, f.select(middle, f.constant(x.type, numbers.pi / 4), 0.0))
    square = r * r
    return with_sign(f, start + f.fma(square * r, polynomial(f, square, _ATAN), r), x)


def _arcsine(f: Function, x: Value, square: Value) -> Value:
    return f.fma(square * x, polynomial(f, square, _ASIN), x)


def _half_angle(f: Function, x: Value) -> tuple[Value, Value, Value]:
    """(|x| > 1/2, asin of what stays below 1/2: |x| or √((1 - |x|) / 2), |x|)"""
    size = magnitude(f, x)
    large = f.compare("ogt", size, 0.5)
    square = f.select(large, (1.0 - size) * 0.5, size * size)
    root = f.select(large, f.call("llvm.sqrt", x.type, square), size)
    return large, _arcsine(f, root, square), size


@through_double
def asin(f: Function, x: Value) -> Value:
    """asin t = π/2 - 2 asin √((1 - t) / 2); NaN beyond 1."""
    large, angle, _ = _half_angle(f, x)
    return with_sign(f, f.select(large, numbers.pi / 2 - 2.0 * angle, angle), x)


@through_double
def acos(f: Function, x: Value) -> Value:
    """acos t = 2 asin √((1 - t) / 2) = π/2 - asin t; NaN beyond 1."""
    large, angle, _ = _half_angle(f, x)
    negative = f.compare("olt", x, 0.0)
    far = f.select(negative, numbers.pi - 2.0 * angle, 2.0 * angle)
    near = numbers.pi / 2 - with_sign(f, angle, x)
    return f.select(large, far, near)


def _log1p(f: Function, x: Value) -> Value:
    """log(1 + x) for x >= 0, the rounding of 1 + x made good; infinity stays."""
    u = x + 1.0
    lost = f.select(f.compare("olt", x, 1.0), x - (u - 1.0), 1.0 - (u - x))
    corrected = log(f, u) + f.binary("fdiv", lost, u)
    return f.select(f.compare("oeq", u, numbers.inf), u, corrected)


@through_double
def sinh(f: Function, x: Value) -> Value:
    """(t + t / (t + 1)) / 2 with t = exp |x| - 1; eˣ / 2 for large x, by halves."""
    size = magnitude(f, x)
    t = expm1(f, size)
    half = exp(f, size * 0.5)
    value = f.select(f.compare("ogt", size, 22.0), half * 0.5 * half, (t + f.binary("fdiv", t, t + 1.0)) * 0.5)
    return with_sign(f, value, x)


@through_double
def cosh(f: Function, x: Value) -> Value:
    """h² / 2 + 1 / (2 h²) with h = exp(|x| / 2)"""
    half = exp(f, magnitude(f, x) * 0.5)
    return half * 0.5 * half + f.binary("fdiv", 0.5, half * half)


@through_double
def asinh(f: Function, x: Value) -> Value:
    """log1p(|x| + x² / (1 + √(x² + 1))); log 2|x| for large x."""
    size = magnitude(f, x)
    square = size * size
    root = f.call("llvm.sqrt", x.type, square + 1.0)
    near = _log1p(f, size + f.binary("fdiv", square, root + 1.0))
    return with_sign(f, f.select(f.compare("ogt", size, 1e9), log(f, size) + numbers.log(2), near), x)


@through_double
def acosh(f: Function, x: Value) -> Value:
    """log1p(t + √(2t + t²)) with t = x - 1; log 2x for large x; NaN below 1."""
    t = x - 1.0
    near = _log1p(f, t + f.call("llvm.sqrt", x.type, f.fma(t, t, t + t)))
    value = f.select(f.compare("ogt", x, 1e9), log(f, x) + numbers.log(2), near)
    return f.select(f.compare("olt", x, 1.0), numbers.nan, value)


@through_double
def atanh(f: Function, x: Value) -> Value:
    """log1p(2 |x| / (1 - |x|)) / 2; ±1 gives infinity, beyond is NaN."""
    size = magnitude(f, x)
    value = _log1p(f, f.binary("fdiv", size + size, 1.0 - size)) * 0.5
    return with_sign(f, f.select(f.compare("ogt", size, 1.0), numbers.nan, value), x)


def _log_pair(f: Function, x: Value) -> tuple[Value, Value]:
    """log x as an unevaluated sum, about 2⁻⁶⁴ exact; x positive and finite."""
    tiny = f.compare("olt", x, 2.0**-1022)
    exponent, fraction = split(f, f.select(tiny, x * 2.0**52, x))
    exponent = f.select(tiny, exponent - 52.0, exponent)
    sum_ = fraction + 2.0
    s = f.binary("fdiv", fraction, sum_)
    lost = fraction - (sum_ - 2.0)
    s_rest = f.binary("fdiv", f.fma(s, lost * -1.0, f.fma(s * -1.0, sum_, fraction)), sum_)
    tail = f.fma(s * s * s, polynomial(f, s * s, _LOG_TAIL), s_rest + s_rest)
    high, low = LN2_SHORT["double"]
    large, lost_there = _exact_sum(exponent * high, s + s)
    total, lost = _exact_sum(large, f.fma(exponent, low, tail))
    return total, lost + lost_there


def _exact_sum(a: Value, b: Value) -> tuple[Value, Value]:
    """(a + b rounded, what the rounding lost): Knuth's two-sum."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def pow(f: Function, x: Value, y: Value) -> Value:
    """xʸ within 2 ulp, special values as IEEE 754-2019 section 9.2.1; of negative numbers NaN unless y is whole."""
    size = magnitude(f, x)
    power = _power_of_doubles(f, size, y) if element_of(x.type) == "double" else _power_of_floats(f, size, y)
    half = y * 0.5
    whole = f.compare("oeq", f.call("llvm.trunc", y.type, y), y)
    odd = f.binary("and", whole, f.compare("une", f.call("llvm.trunc", y.type, half), half))
    power = f.select(f.compare("oeq", size, 1.0), f.select(f.compare("uno", y, y), y, f.lift(1.0, y.type)), power)
    negative = f.binary("and", f.compare("olt", x, 0.0), f.compare("ogt", x, -numbers.inf))
    power = f.select(f.binary("and", negative, f.binary("xor", whole, 1)), numbers.nan, power)
    signed = f.select(odd, with_sign(f, power, x), power)
    one = f.binary("or", f.compare("oeq", y, 0.0), f.compare("oeq", x, 1.0))
    return f.select(one, 1.0, signed)


@through_double
def _power_of_floats(f: Function, x: Value, y: Value) -> Value:
    return exp(f, y * log(f, x))


def _power_of_doubles(f: Function, x: Value, y: Value) -> Value:
    """exp(y log x) with the logarithm and the product as pairs; 0 and infinity through the plain logarithm."""
    high, low = _log_pair(f, x)
    product = high * y
    rest = f.fma(high, y, product * -1.0) + low * y
    power = exp(f, product)
    moderate = f.compare("olt", magnitude(f, product), 745.0)
    refined = f.select(moderate, f.fma(power, rest, power), power)
    regular = f.binary("and", f.compare("ogt", x, 0.0), f.compare("olt", x, numbers.inf))
    edge = exp(f, y * log(f, x))
    return f.select(regular, refined, edge)

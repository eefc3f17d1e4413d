"""Transcendental functions on vectors of float or double, as polynomials: LLVM's own would call libm.

Coefficients are minimax fits (Remez; for quotients reweighted least squares), ascending, at 40 digits and rounded once.
Reductions follow Muller, "Elementary Functions", 3rd ed., chapters 11-12. test_render.py bounds the errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ingot.kernels.cpu.llvm import Function, Operand, Value, element_of, lanes_of, vector

Coefficients = dict[str, tuple[float, ...]]

# (exp(r) - 1 - r) / r² on |r| <= ln(2) / 2
_EXP: Coefficients = {
    "float": (0.5, 0.16666533052921295, 0.04166730120778084, 0.008367576636373997, 0.0013861225452274084),
    "double": (0.5, 0.16666666666666435, 0.04166666666660342, 0.008333333333499483, 0.0013888888926957943,
               0.0001984126946769097, 2.480150849387939e-05, 2.7557639253098225e-06, 2.7625261189008705e-07,
               2.4978996159734972e-08),
}  # fmt: skip
# (2ʳ - 1) / r on |r| <= 1/2
_EXP2 = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
# (log(1 + f) - f + f²/2) / f³ on 1 + f in [√½, √2]; for double R(s²) of log(1 + f) = 2 s + s³ R, s = f / (2 + f)
_LOG: Coefficients = {
    "float": (0.3333333134651184, -0.2500081956386566, 0.20001226663589478, -0.1662335842847824, 0.14201752841472626,
              -0.13160167634487152, 0.12761607766151428, -0.07634566724300385),
    "double": (0.6666666666666735, 0.39999999999411545, 0.2857142874317752, 0.22222198483711345, 0.18183569376196382,
               0.15313911812972686, 0.14797427829979776),
}  # fmt: skip
# erf(x) = x P(x²) / Q(x²) up to where it is 1 to the last bit
_ERF_P: Coefficients = {
    "float": (1.1283791065216064, 0.191521555185318, 0.052870973944664, 0.0038067412097007036, 0.0002846247225534171,
              2.025727326326887e-06),
    "double": (1.1283791670955126, 0.22050965730180708, 0.06618063194332262, 0.006907837551839497,
               0.0008572893533234473, 5.714831099999498e-05, 3.911224398414454e-06, 1.701848475363311e-07,
               6.779121199623069e-09, 1.7257077011572373e-10, 3.331970092778769e-12, 2.2105377224335566e-14,
               1.5528312389881247e-17),
}  # fmt: skip
_ERF_Q: Coefficients = {
    "float": (1.0, 0.5030642747879028, 0.11454713344573975, 0.015052275732159615, 0.001170322997495532,
              3.782661951845512e-05),
    "double": (1.0, 0.5287549289565524, 0.13490270095720522, 0.022023509534506082, 0.002570426098232105,
               0.00022670945907302462, 1.554748549951648e-05, 8.37917765050415e-07, 3.528030571959093e-08,
               1.1281235814569646e-09, 2.553978130044013e-11, 3.3040121350136436e-13, 8.765227752341758e-16),
}  # fmt: skip
_ERF_RANGE = {"float": 4.05, "double": 6.0}

LN2 = {"float": (float.fromhex("0x1.62e43p-1"), -1.904654299957768e-09),
       "double": (float.fromhex("0x1.62e42fefa39efp-1"), 2.3190468138462996e-17)}  # fmt: skip
LN2_SHORT = {"float": (0.693359375, -2.12194440054690583e-4),
             "double": (float.fromhex("0x1.62e42feep-1"), 1.90821492927058770e-10)}  # fmt: skip
_MANTISSA = {"float": 23, "double": 52}
_BIAS = {"float": 127, "double": 1023}
_INTEGER = {"float": "i32", "double": "i64"}
_EXP_RANGE = {"float": (-105.0, 89.0), "double": (-746.0, 710.0)}
_EXPM1_RANGE = {"float": (-40.0, 88.73), "double": (-80.0, 709.79)}
_LEAST_EXPONENT = -127.0
_SCALEF = {"float": "ps", "double": "pd"}


def polynomial(f: Function, x: Value, coefficients: Sequence[float]) -> Value:
    """Σ coefficients[i] xⁱ by Horner's rule."""
    result = f.constant(x.type, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = f.fma(result, x, f.constant(x.type, coefficient))
    return result


def at_least(f: Function, x: Value, low: Operand) -> Value:
    """max(x, low); NaN stays."""
    return f.select(f.compare("olt", x, low), low, x)


def at_most(f: Function, x: Value, high: Operand) -> Value:
    """min(x, high); NaN stays."""
    return f.select(f.compare("ogt", x, high), high, x)


def magnitude(f: Function, x: Value) -> Value:
    """|x|"""
    return f.call("llvm.fabs", x.type, x)


def with_sign(f: Function, x: Value, sign: Operand) -> Value:
    """|x| with the sign of `sign`."""
    return f.call("llvm.copysign", x.type, x, sign)


def integers(x: Value) -> str:
    """Type of integers of x's width, one per lane."""
    return vector(_INTEGER[element_of(x.type)], lanes_of(x.type))


def _nearest_power(f: Function, x: Value) -> tuple[Value, Value, Value]:
    """(n, integers whose low bits are n, r) with x = n ln 2 + r, |r| <= ln(2) / 2; |x| must be moderate."""
    element = element_of(x.type)
    magic = 1.5 * 2.0 ** _MANTISSA[element]
    shifted = f.fma(x, 1 / math.log(2), f.constant(x.type, magic))
    n = shifted - magic
    high, low = LN2[element]
    remainder = f.fma(n, -low, f.fma(n, -high, x))
    return n, f.bitcast(shifted, integers(x)), remainder


def _power_of_two(f: Function, bits: Value, type_: str) -> Value:
    """2ⁿ for n in the low end of `bits`, within the normal range."""
    element = element_of(type_)
    return f.bitcast(f.binary("shl", bits + _BIAS[element], _MANTISSA[element]), type_)


def _scaled(f: Function, y: Value, n: Value, bits: Value) -> Value:
    """y 2ⁿ, rounded once, also into the subnormal range and to infinity."""
    element, lanes = element_of(y.type), lanes_of(y.type)
    width = lanes * (32 if element == "float" else 64)
    if width == 512 and _has(f, "avx512f"):
        mask, rounding = Value(f, f"i{lanes}", "-1"), Value(f, "i32", "4")
        return f.intrinsic(f"llvm.x86.avx512.mask.scalef.{_SCALEF[element]}.512", y.type, y, n, y, mask, rounding)
    mantissa = _MANTISSA[element]
    exact = bits - (0x4B400000 if element == "float" else 0x4338000000000000)
    half = f.binary("ashr", exact, 1)
    first = f.bitcast(f.binary("shl", half + _BIAS[element], mantissa), y.type)
    second = f.bitcast(f.binary("shl", exact - half + _BIAS[element], mantissa), y.type)
    return y * first * second


def _has(f: Function, feature: str) -> bool:
    builder = getattr(f, "builder", None)
    return builder is not None and builder.isa.has(feature)


def exp(f: Function, x: Value) -> Value:
    """eˣ within 1 ulp; 0, subnormals, infinity and NaN where IEEE has them."""
    low, high = _EXP_RANGE[element_of(x.type)]
    n, bits, r = _nearest_power(f, at_most(f, at_least(f, x, low), high))
    tail = f.fma(r * r, polynomial(f, r, _EXP[element_of(x.type)]), r)
    return _scaled(f, tail + 1.0, n, bits)


def exp2_below(f: Function, x: Value) -> Value:
    """2ˣ of floats x <= 0 within 2 ulp, in half of the time of exp; 0 of -infinity, below 2^-126 something near it."""
    x = at_least(f, x, _LEAST_EXPONENT)
    shifted = x + 1.5 * 2.0 ** _MANTISSA["float"]
    rest = x - (shifted - 1.5 * 2.0 ** _MANTISSA["float"])
    power = f.fma(rest, polynomial(f, rest, _EXP2), f.constant(x.type, 1.0))
    exponent = f.binary("shl", f.bitcast(shifted, integers(x)), _MANTISSA["float"])
    return f.bitcast(f.bitcast(power, exponent.type) + exponent, x.type)


def expm1(f: Function, x: Value) -> Value:
    """eˣ - 1 without cancellation near 0."""
    low, high = _EXPM1_RANGE[element_of(x.type)]
    _, bits, r = _nearest_power(f, at_most(f, at_least(f, x, low), high))
    tail = f.fma(r * r, polynomial(f, r, _EXP[element_of(x.type)]), r)
    half = _power_of_two(f, bits - 1, x.type)
    return f.fma(tail, half, half - 0.5) * 2.0


def tanh(f: Function, x: Value) -> Value:
    """tanh |x| = -t / (t + 2) with t = exp(-2 |x|) - 1"""
    t = expm1(f, magnitude(f, x) * -2.0)
    return with_sign(f, f.binary("fdiv", t, t + 2.0), x)


def sigmoid(f: Function, x: Value) -> Value:
    """1 / (1 + exp(-x))"""
    return f.binary("fdiv", 1.0, exp(f, -1.0 * x) + 1.0)


def erf(f: Function, x: Value) -> Value:
    """Error function."""
    element = element_of(x.type)
    size = at_most(f, magnitude(f, x), _ERF_RANGE[element])
    square = size * size
    ratio = f.binary("fdiv", polynomial(f, square, _ERF_P[element]), polynomial(f, square, _ERF_Q[element]))
    return with_sign(f, at_most(f, size * ratio, 1.0), x)


def log(f: Function, x: Value) -> Value:
    """Natural logarithm; log(0) = -inf, of negative numbers NaN."""
    element = element_of(x.type)
    smallest = 2.0 ** (2 - _BIAS[element] - 1)
    tiny = f.compare("olt", x, smallest)
    lifted = f.select(tiny, x * 2.0 ** _MANTISSA[element], x)
    exponent, fraction = split(f, lifted)
    exponent = f.select(tiny, exponent - float(_MANTISSA[element]), exponent)
    finite = log_of(f, exponent, fraction)
    positive = f.select(f.compare("oeq", x, math.inf), x, finite)
    edge = f.select(f.compare("oeq", x, 0.0), f.constant(x.type, -math.inf), math.nan)
    return f.select(f.compare("ogt", x, 0.0), positive, edge)


def split(f: Function, x: Value) -> tuple[Value, Value]:
    """(e, m - 1) with x = 2ᵉ m, m in [√½, √2); x positive and normal."""
    element, kind = element_of(x.type), integers(x)
    root = 0x3F3504F3 if element == "float" else 0x3FE6A09E667F3BCD
    bits = f.bitcast(x, kind)
    exponent = f.binary("ashr", bits - root, _MANTISSA[element])
    mantissa = f.bitcast(bits - f.binary("shl", exponent, _MANTISSA[element]), x.type)
    return f.cast("sitofp", exponent, element), mantissa - 1.0


def log_of(f: Function, exponent: Value, fraction: Value) -> Value:
    """log(2^exponent (1 + fraction)) for 1 + fraction in [√½, √2]."""
    element = element_of(fraction.type)
    high, low = LN2_SHORT[element]
    half_square = fraction * fraction * 0.5
    if element == "float":
        cube = fraction * fraction * fraction
        tail = f.fma(cube, polynomial(f, fraction, _LOG["float"]), exponent * low) - half_square
    else:
        s = f.binary("fdiv", fraction, fraction + 2.0)
        square = s * s
        rest = square * polynomial(f, square, _LOG["double"])
        tail = f.fma(s, half_square + rest, exponent * low) - half_square
    return f.fma(exponent, high, tail + fraction)


def softplus(f: Function, x: Value) -> Value:
    """log(1 + eˣ) = max(x, 0) + log1p(exp(-|x|))"""
    small = exp(f, magnitude(f, x) * -1.0)
    upper = f.compare("ogt", small, math.sqrt(2) - 1)
    fraction = f.select(upper, (small - 1.0) * 0.5, small)
    exponent = f.select(upper, f.constant(x.type, 1.0), 0.0)
    return at_least(f, x, 0.0) + log_of(f, exponent, fraction)

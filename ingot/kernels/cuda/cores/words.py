"""Numbers of fewer than 32 bits out of words of 32 or 64, as float32."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def bfloats(word):
    """The two bfloat16 of a word of 32 bits."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def halves(word):
    """The two float16 of a word of 32 bits."""
    low, high = word.to(tl.int16).to(tl.float16, bitcast=True), (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def eighth(word, place: tl.constexpr):
    """The float8_e4m3fn in one of the four bytes of a word."""
    bits = ((word << (24 - 8 * place)) >> 4) & -2014314496  # sign, exponent and fraction where float32 has them
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120: the exponents' difference


@triton.jit
def eighths(word):
    """The four float8_e4m3fn of a word."""
    return eighth(word, 0), eighth(word, 1), eighth(word, 2), eighth(word, 3)


@triton.jit
def converted_eighths(word):
    """The same by the processor's own conversion."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high, a, b, c, d;
        .reg .b32 lows, highs;
        mov.b32 {low, high}, $4;
        cvt.rn.f16x2.e4m3x2 lows, low;
        cvt.rn.f16x2.e4m3x2 highs, high;
        mov.b32 {a, b}, lows;
        mov.b32 {c, d}, highs;
        cvt.f32.f16 $0, a;
        cvt.f32.f16 $1, b;
        cvt.f32.f16 $2, c;
        cvt.f32.f16 $3, d;
        }""",
        "=f,=f,=f,=f,r", [word], (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1)  # fmt: skip


@triton.jit
def _half_of_eighth(bits):
    """float16 of the float8_e4m3fn in the low byte of 16 bits."""
    shifted = ((bits & 128) << 8) | ((bits & 127) << 7)  # sign, exponent and fraction where float16 has them
    return (shifted.to(tl.float16, bitcast=True) * 256.0).to(tl.float16)  # 2 ** 8: the exponents' difference


@triton.jit
def two_eighths(pair):
    """The two float8_e4m3fn of 16 bits, as float16."""
    return _half_of_eighth(pair), _half_of_eighth((pair >> 8) & 255)


@triton.jit
def converted_two_eighths(pair):
    """The same by the processor's own conversion, of two pairs at a time: their first numbers, their second ones."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 first, second;
        .reg .b32 turned;
        prmt.b32 turned, $2, $2, 0x3120;
        mov.b32 {first, second}, turned;
        cvt.rn.f16x2.e4m3x2 $0, first;
        cvt.rn.f16x2.e4m3x2 $1, second;
        }""",
        "=r,=r,r", [pair], (tl.float16, tl.float16), is_pure=True, pack=2)  # fmt: skip

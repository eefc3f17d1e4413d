"""Products of weights of four or eight bits with rows of sixteen, as integers: four multiplied and added at a time."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def rounded(x, times):
    """The integer nearest to x * times, which is less than 2 ** 22."""
    return (x * times + 12582912.0).to(tl.int32, bitcast=True) - 1262485504  # 1.5 * 2 ** 23, whose last bit is 1


@triton.jit
def parted(a, b, c, d):
    """(high bytes, with a sign; low bytes, without one) of four integers of 16 bits, as words of a, c, b, d."""
    first, second = (a & 65535) | (b << 16), (c & 65535) | (d << 16)
    high = ((first >> 8) & 0x00FF00FF) | (second & -16711936)
    return high, (first & 0x00FF00FF) | ((second & 0x00FF00FF) << 8)


@triton.jit
def _byte(word, place: tl.constexpr):
    return (word >> (8 * place)) & 255


@triton.jit
def _signed_byte(word, place: tl.constexpr):
    return (word << (24 - 8 * place)) >> 24


@triton.jit
def _of_bytes(a, high, low, total, signed: tl.constexpr):
    for place in tl.static_range(4):
        weight = _signed_byte(a, place) if signed else _byte(a, place)
        total += weight * (_signed_byte(high, place) * 256 + _byte(low, place))
    return total


@triton.jit
def nibbles(word, high, low, further_high, further_low, total):
    """total + the products of eight numbers of four bits, without signs: the lower halves of the word's bytes with the
    bytes of `high` and `low`, the upper halves with the further ones."""
    total = _of_bytes(word & 0x0F0F0F0F, high, low, total, False)
    return _of_bytes((word >> 4) & 0x0F0F0F0F, further_high, further_low, total, False)


@triton.jit
def fast_nibbles(word, high, low, further_high, further_low, total):
    """The same by the processor's products of four bytes."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 lower, upper, highs, lows;
        and.b32 lower, $1, 0x0f0f0f0f;
        shr.u32 upper, $1, 4;
        and.b32 upper, upper, 0x0f0f0f0f;
        dp4a.u32.s32 highs, lower, $2, 0;
        dp4a.u32.s32 highs, upper, $4, highs;
        dp4a.u32.u32 lows, lower, $3, $6;
        dp4a.u32.u32 lows, upper, $5, lows;
        mad.lo.s32 $0, highs, 256, lows;
        }""",
        "=r,r,r,r,r,r,r", [word, high, low, further_high, further_low, total], tl.int32, is_pure=True,
        pack=1)  # fmt: skip


@triton.jit
def octets(word, high, low, total):
    """total + the products of four numbers of eight bits with a sign."""
    return _of_bytes(word, high, low, total, True)


@triton.jit
def fast_octets(word, high, low, total):
    """The same by the processor's products of four bytes."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 highs, lows;
        dp4a.s32.s32 highs, $1, $2, 0;
        dp4a.s32.u32 lows, $1, $3, $4;
        mad.lo.s32 $0, highs, 256, lows;
        }""",
        "=r,r,r,r,r", [word, high, low, total], tl.int32, is_pure=True, pack=1)  # fmt: skip


@triton.jit
def _nibble(words, place: tl.constexpr, scale, less):
    numbers = (((words >> (4 * place)) & 15) << 19) | 0x3F800000  # 1 + n / 16 as float32
    return numbers.to(tl.float32, bitcast=True) * scale - less


@triton.jit
def eight_nibbles(words, scale, less, dtype: tl.constexpr):
    """(1 + n / 16) * scale - less of the numbers n of four bits, [..., words] to [..., 8 * words]."""
    even = tl.interleave(_nibble(words, 0, scale, less), _nibble(words, 4, scale, less))
    other = tl.interleave(_nibble(words, 2, scale, less), _nibble(words, 6, scale, less))
    odd = tl.interleave(_nibble(words, 1, scale, less), _nibble(words, 5, scale, less))
    last = tl.interleave(_nibble(words, 3, scale, less), _nibble(words, 7, scale, less))
    # converted at the end: of a block that is only reshaped Triton's compiler makes layouts that do not exist
    return tl.interleave(tl.interleave(even, other), tl.interleave(odd, last)).to(dtype)


@triton.jit
def _octet(words, place: tl.constexpr, scale, less):
    return _signed_byte(words, place).to(tl.float32) * scale - less


@triton.jit
def four_octets(words, scale, less, dtype: tl.constexpr):
    """n * scale - less of the numbers n of eight bits, [..., words] to [..., 4 * words]."""
    even = tl.interleave(_octet(words, 0, scale, less), _octet(words, 2, scale, less))
    odd = tl.interleave(_octet(words, 1, scale, less), _octet(words, 3, scale, less))
    return tl.interleave(even, odd).to(dtype)

"""Gluon functions of `llm_cuda_rings`: fragments of tensor cores (PTX ISA, mma.m16n8k16), numbers of a row's words.

A lane of a warp holds 16 bytes of two columns, eight apart, which lie along the depth as the row does; `row` has the
numbers of the same places, twice: even and odd columns of the second factor hold different parts of a number. Eight
sums belong to a lane, of two products that take turns.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def plus(a, b):
    """For reductions."""
    return a + b


@gluon.jit
def base():
    """The address where a block's shared memory begins: what a kernel allocates first lies there."""
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], gl.int32, is_pure=True, pack=1)


@gluon.jit
def ask(there, words, wanted):
    """Copies two times 16 bytes, 512 apart, to addresses of shared memory; a group of their own even if not wanted."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        setp.ne.s32 wanted, $3, 0;
        @wanted cp.async.cg.shared.global [$1], [$2], 16;
        @wanted cp.async.cg.shared.global [$1 + 512], [$2 + 512], 16;
        cp.async.commit_group;
        mov.u32 $0, 0;
        }""",
        "=r,r,l,r", [there, words, wanted.to(gl.int32)], gl.int32, is_pure=False, pack=1)  # fmt: skip


def _four_by_row(part: int) -> str:
    """Instructions for one of the four words of each column: its numbers as float16, a product to half of the sums."""
    sums, row = ", ".join(f"${part % 2 * 4 + k}" for k in range(4)), f"${16 + 2 * part}, ${17 + 2 * part}"
    product = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    return f"""
        mov.b32 {{low, high}}, ${8 + part};
        cvt.rn.f16x2.e4m3x2 a, low;
        cvt.rn.f16x2.e4m3x2 c, high;
        mov.b32 {{low, high}}, ${12 + part};
        cvt.rn.f16x2.e4m3x2 b, low;
        cvt.rn.f16x2.e4m3x2 d, high;
        {product} {{{sums}}}, {{a, b, c, d}}, {{{row}}}, {{{sums}}};"""


_SIXTEEN_BY_ROW = gl.constexpr(f"""{{
        .reg .b16 low, high;
        .reg .b32 a, b, c, d;{"".join(map(_four_by_row, range(4)))}
        }}""")


@gluon.jit
def eighths_by_row(weights, row, sums):
    """Sixteen float8_e4m3fn a column by float16."""
    return gl.inline_asm_elementwise(
        _SIXTEEN_BY_ROW,
        "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,0,1,2,3,4,5,6,7", [weights, row, sums], gl.float32,
        is_pure=True, pack=8)  # fmt: skip


@gluon.jit
def two_bfloats(word):
    """The bfloat16 of a word, in float32."""
    return (word << 16).to(gl.float32, bitcast=True), (word & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _word_of_halves(low, high):
    return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], gl.int32, is_pure=True,
                                     pack=1)  # fmt: skip


@gluon.jit
def small_and_large(low, high, bound: gl.constexpr, up: gl.constexpr, down: gl.constexpr):
    """Words of two float16: numbers below the bound times `up` or zero, the others times `down` or zero. Between them
    they have the range that float16 lacks."""
    first, second = gl.abs(low) < bound, gl.abs(high) < bound
    small = _word_of_halves(gl.where(first, low * up, 0.0), gl.where(second, high * up, 0.0))
    large = _word_of_halves(gl.where(first, 0.0, low * down), gl.where(second, 0.0, high * down))
    return small, large


@gluon.jit
def total(x, count: gl.constexpr):
    """The sum of a block of so many numbers."""
    return gl.reduce(gl.reshape(x, [count]), 0, plus)


@gluon.jit
def of_columns(sums, first: gl.constexpr, second: gl.constexpr, layout: gl.constexpr):
    """The sums of sixteen columns out of all warps' fragments: those by the row's first part times `first`, by its
    second part times `second`; each is there for four places of the depth."""
    both = gl.reshape(gl.reduce(sums, 1, plus), [sums.shape[0], 8, 4, 2, 2])
    both = gl.permute(gl.reduce(gl.reduce(both, 2, plus), 0, plus), [1, 0, 2])
    one, other = gl.split(gl.reshape(both, [16, 2]))
    return gl.convert_layout(one * (0.25 * first) + other * (0.25 * second), layout)

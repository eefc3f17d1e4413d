"""Gluon functions of the product that streams weights through shared memory. Every tensor has one number for each
thread of the block; what lies in shared memory is at addresses from `base()` on.
"""
# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def base():
    """The address where a block's shared memory begins: what a kernel allocates first lies there."""
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], gl.int32, is_pure=True, pack=1)


@gluon.jit
def unknown(count):
    """The same number, of which compilers know nothing: loops of so many rounds stay loops, and small ones."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 none; mov.u32 none, %nsmid; shr.u32 none, none, 31; add.u32 $0, $1, none; }", "=r,r", [count],
        gl.int32, is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def ask(there, words, wanted):
    """Copies two times 16 bytes, 512 apart, to an address of shared memory; a group of their own even if not wanted."""
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


@gluon.jit
def four(address, wanted):
    """Four words of global memory, or zeros."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        .reg .b32 a, b, c, d;
        setp.ne.s32 wanted, $5, 0;
        mov.b32 a, 0;
        mov.b32 b, 0;
        mov.b32 c, 0;
        mov.b32 d, 0;
        @wanted ld.global.v4.b32 {a, b, c, d}, [$4];
        mov.b32 $0, a;
        mov.b32 $1, b;
        mov.b32 $2, c;
        mov.b32 $3, d;
        }""",
        "=r,=r,=r,=r,l,r", [address, wanted.to(gl.int32)], (gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False,
        pack=1)  # fmt: skip


@gluon.jit
def keep_four(address, a, b, c, d, wanted):
    """Four words to shared memory."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        setp.ne.s32 wanted, $6, 0;
        @wanted st.shared.v4.b32 [$1], {$2, $3, $4, $5};
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r,r,r", [address, a, b, c, d, wanted.to(gl.int32)], gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def keep_two(address, a, b, wanted):
    """Two numbers to shared memory, 32 bytes apart."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        setp.ne.s32 wanted, $4, 0;
        @wanted st.shared.f32 [$1], $2;
        @wanted st.shared.f32 [$1 + 32], $3;
        mov.u32 $0, 0;
        }""",
        "=r,r,f,f,r", [address, a, b, wanted.to(gl.int32)], gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def keep_total(address, x, lane):
    """The sum of a warp's numbers to shared memory."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .f32 x, y;
        setp.eq.s32 first, $3, 0;
        shfl.sync.bfly.b32 y, $2, 16, 31, -1;
        add.f32 x, $2, y;
        shfl.sync.bfly.b32 y, x, 8, 31, -1;
        add.f32 x, x, y;
        shfl.sync.bfly.b32 y, x, 4, 31, -1;
        add.f32 x, x, y;
        shfl.sync.bfly.b32 y, x, 2, 31, -1;
        add.f32 x, x, y;
        shfl.sync.bfly.b32 y, x, 1, 31, -1;
        add.f32 x, x, y;
        @first st.shared.f32 [$1], x;
        mov.u32 $0, 0;
        }""",
        "=r,r,f,r", [address, x, lane], gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def bfloats(word):
    """The two bfloat16 of a word, in float32."""
    return (word << 16).to(gl.float32, bitcast=True), (word & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def halves(word):
    """The two float16 of a word, in float32."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }", "=&f,=&f,r",
        [word], (gl.float32, gl.float32), is_pure=True, pack=1)  # fmt: skip


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

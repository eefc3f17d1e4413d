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


@gluon.jit
def draw(tickets, wanted):
    """The next number of a counter, or -1; without waiting for it."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        setp.ne.s32 wanted, $2, 0;
        mov.b32 $0, -1;
        @wanted atom.relaxed.gpu.global.add.u32 $0, [$1], 1;
        }""",
        "=&r,l,r", [tickets, wanted.to(gl.int32)], gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def keep_drawn(address, tickets, drawn, first: gl.constexpr, count: gl.constexpr, one):
    """The tile of a drawn number to shared memory. Each block draws once more than there are tiles for it: the last
    number of all leaves the counter as it was."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred one, last, none;
        .reg .b32 tile;
        setp.ne.s32 one, $6, 0;
        add.s32 tile, $3, $4;
        setp.lt.s32 none, $3, 0;
        selp.b32 tile, $5, tile, none;
        @one st.shared.b32 [$1], tile;
        setp.eq.s32 last, tile, $7;
        and.pred last, last, one;
        mov.b32 tile, 0;
        @last st.relaxed.gpu.global.b32 [$2], tile;
        mov.u32 $0, 0;
        }""",
        "=r,r,l,r,r,r,r,r", [address, tickets, drawn, first + drawn * 0, count + drawn * 0, one.to(gl.int32),
                             first + count - 1 + drawn * 0], gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def known(address):
    """A number of shared memory that is the same of all threads."""
    return gl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [address], gl.int32, is_pure=False, pack=1)


@gluon.jit
def number_at(address):
    """A number of global memory that is the same of all threads."""
    return gl.inline_asm_elementwise("ld.global.b32 $0, [$1];", "=r,l", [address], gl.int32, is_pure=False, pack=1)


@gluon.jit
def turn_over(address, turn, one):
    """One thread stores the other turn."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred one;
        .reg .b32 other;
        setp.ne.s32 one, $3, 0;
        xor.b32 other, $2, 1;
        @one st.global.b32 [$1], other;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r", [address, turn + 0 * one.to(gl.int32), one.to(gl.int32)], gl.int32, is_pure=False,
        pack=1)  # fmt: skip


@gluon.jit
def tell(address, other, number, wanted):
    """A half word to one address, zero to another."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        .reg .b16 low, none;
        setp.ne.s32 wanted, $4, 0;
        mov.b32 {low, none}, $3;
        mov.b16 none, 0;
        @wanted st.relaxed.gpu.global.b16 [$1], low;
        @wanted st.relaxed.gpu.global.b16 [$2], none;
        mov.u32 $0, 0;
        }""",
        "=r,l,l,r,r", [address, other, number, wanted.to(gl.int32)], gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def look(address):
    """Waits until a word is not zero; after some seconds the kernel ends with an error."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred there, late;
        .reg .b32 a, n;
        mov.b32 n, 0;
        AGAIN:
        ld.relaxed.gpu.global.b32 a, [$1];
        setp.ne.s32 there, a, 0;
        @there bra DONE;
        add.s32 n, n, 1;
        setp.gt.s32 late, n, 4194304;
        @late trap;
        nanosleep.u32 100;
        bra AGAIN;
        DONE:
        mov.u32 $0, 0;
        }""",
        "=r,l", [address], gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def glance(address):
    """A word as it is; without waiting for it."""
    return gl.inline_asm_elementwise("ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", [address], gl.int32, is_pure=False,
                                     pack=1)  # fmt: skip


@gluon.jit
def settled(address, word):
    """A word, as soon as no half of any lane's is zero; after some seconds the kernel ends with an error."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred none, late;
        .reg .b32 x, y, n;
        mov.b32 n, 0;
        mov.b32 $0, $2;
        AGAIN:
        sub.u32 x, $0, 65537;
        not.b32 y, $0;
        and.b32 x, x, y;
        and.b32 x, x, 0x80008000;
        setp.ne.s32 none, x, 0;
        vote.sync.any.pred none, none, -1;
        @!none bra DONE;
        add.s32 n, n, 1;
        setp.gt.s32 late, n, 4194304;
        @late trap;
        nanosleep.u32 100;
        ld.relaxed.gpu.global.b32 $0, [$1];
        bra AGAIN;
        DONE:
        }""",
        "=&r,l,r", [address, word], gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def told(address, wanted):
    """The half word that was told, as the low bits of a word."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        .reg .b16 low, none;
        setp.ne.s32 wanted, $2, 0;
        mov.b16 low, 0;
        mov.b16 none, 0;
        @wanted ld.relaxed.gpu.global.b16 low, [$1];
        not.b16 low, low;
        mov.b32 $0, {low, none};
        }""",
        "=r,l,r", [address, wanted.to(gl.int32)], gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def keep_words(address, a, b, apart: gl.constexpr):
    """Two words to shared memory."""
    gl.inline_asm_elementwise("{ st.shared.b32 [$1], $2; st.shared.b32 [$4], $3; mov.u32 $0, 0; }", "=r,r,r,r,r",
                              [address, a, b, address + apart], gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def sync_warp(lane):
    """What lanes stored is there for the others."""
    gl.inline_asm_elementwise("{ bar.warp.sync -1; mov.u32 $0, 0; }", "=r,r", [lane], gl.int32, is_pure=False, pack=1)

"""The interpreter of PTX finds what a GPU would not tell."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.cuda.ptx import Module

HEAD = """.entry KERNEL(
 .param .u64 KERNEL_param_0
) .reqntid 64 {
 .reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<4>;
 ld.param.b64 %rd1, [KERNEL_param_0];
 mov.u32 %r1, %tid.x;
 shl.b32 %r2, %r1, 2;
 mad.wide.u32 %rd2, %r1, 4, %rd1;
"""


def _run(body: str, words: int = 64) -> np.ndarray:
    memory = np.arange(words, dtype=np.uint32)
    Module(HEAD + body + " ret; }").run(0, [memory.view(np.uint8)], 4096)
    return memory


def test_a_barrier_orders_what_threads_exchange() -> None:
    swap = "ld.global.b32 %r3, [%rd2]; st.shared.b32 [%r2], %r3; {} xor.b32 %r4, %r2, 128; ld.shared.b32 %r5, [%r4]; "
    body = swap + "add.s32 %r5, %r5, -1; st.global.b32 [%rd2], %r5;"
    wanted = (np.arange(64) ^ 32) - 1
    assert (_run(body.format("bar.sync 0;")).view(np.int32) == wanted).all()
    with pytest.raises(AssertionError, match="another thread"):
        _run(body.format(""))


def test_a_branch_of_a_warp_goes_one_way() -> None:
    body = "setp.lt.u32 %p1, %r1, {}; @%p1 bra $END; st.global.b32 [%rd2], 7; $END: "
    assert _run(body.format(32)).tolist() == [*range(32), *[7] * 32]
    with pytest.raises(AssertionError, match="two ways"):
        _run(body.format(5))


def test_copies_arrive_when_they_are_waited_for() -> None:
    copy = "shl.b32 %r2, %r1, 4; mad.wide.u32 %rd3, %r1, 16, %rd1; cp.async.cg.shared.global [%r2], [%rd3], 16; "
    read = "cp.async.commit_group; {} ld.shared.b32 %r3, [%r2 + 4]; st.global.b32 [%rd2], %r3; cp.async.wait_group 0;"
    assert _run((copy + read).format("cp.async.wait_group 0;"), 256).tolist() == [*range(1, 256, 4), *range(64, 256)]
    with pytest.raises(AssertionError, match="under way"):
        _run((copy + read).format("cp.async.wait_group 1;"), 256)


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(NotImplementedError, match="brev"):
        _run("brev.b32 %r3, %r1;")

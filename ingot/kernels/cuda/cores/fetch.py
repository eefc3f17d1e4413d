"""Asking for memory ahead of its use."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def prefetch(addresses):
    """The second level of cache fetches the line of each address."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], tl.int32, is_pure=False,
                              pack=1)  # fmt: skip

"""Reductions that Triton's language lacks."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def product(x, axis: tl.constexpr):
    """Product along an axis."""
    return tl.reduce(x, axis, _times)

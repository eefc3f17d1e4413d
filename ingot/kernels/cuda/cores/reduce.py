"""Reductions that Triton's language lacks."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _times(a: Any, b: Any) -> Any:
    return a * b


@triton.jit
def product(x: Any, axis: tl.constexpr) -> Any:
    """Product along an axis."""
    return tl.reduce(x, axis, _times)

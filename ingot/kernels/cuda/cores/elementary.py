"""Functions of one number for results of 16 bits: cheaper than the exact ones, to less than half a step of float16."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def erf(x):
    """Within 2.2e-5 and 1 from 3 on: the odd polynomial of degree 17 whose largest error in between is least."""
    t = tl.minimum(tl.maximum(x * 0.3333333333333333, -1.0), 1.0)
    s = t * t
    y = 5.2614772 * s - 27.906256
    y = y * s + 65.464131
    y = y * s - 90.529169
    y = y * s + 83.366382
    y = y * s - 54.900258
    y = y * s + 26.992425
    y = y * s - 10.133556
    return (y * s + 3.3848236) * t


@triton.jit
def gelu(x):
    """x times the normal distribution function."""
    half = 0.5 * x
    return half * erf(x * 0.7071067811865476) + half

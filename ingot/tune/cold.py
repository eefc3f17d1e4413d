"""Making memory cold before a candidate is timed: activations were just written by the step before, weights were last
read a whole run ago."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np

from ingot.kernels.cpu.compile import compile_object
from ingot.kernels.cpu.isa import AVX2
from ingot.kernels.cpu.link import link
from ingot.runtime.buffers import Array, address_of
from ingot.runtime.image import Image

CACHED = 32 << 20  # bytes of weights that stay in the last level of cache from run to run, one tenant among several
_FARTHEST = 3  # doublings: beyond them no kernel's form of weights is the smaller or larger one
_SWEEP_BYTES = 12 << 20  # several times a core's private caches
_SWEPT: list[Array] = []

_EVICT = """
declare void @llvm.x86.sse2.clflush(ptr)
declare void @llvm.x86.sse2.mfence()

define void @ingot_evict(ptr %from, i64 %bytes) #0 {
entry:
  br label %head
head:
  %at = phi i64 [0, %entry], [%next, %body]
  %more = icmp slt i64 %at, %bytes
  br i1 %more, label %body, label %done
body:
  %line = getelementptr i8, ptr %from, i64 %at
  call void @llvm.x86.sse2.clflush(ptr %line)
  %next = add i64 %at, 64
  br label %head
done:
  call void @llvm.x86.sse2.mfence()
  ret void
}
attributes #0 = { nounwind "no-builtins" }
"""


def distance(weights: int) -> int:
    """A model's bytes of weights beside what stays in the cache, in doublings; negative where they stay."""
    return max(min(math.floor(math.log2(max(weights, 1) / CACHED)), _FARTHEST), -_FARTHEST)


def sweep() -> None:
    """Push everything out of the private caches."""
    if not _SWEPT:
        _SWEPT.append(np.zeros(_SWEEP_BYTES // 8))
    _SWEPT[0] += 1.0


def evict(arrays: Iterable[Array]) -> None:
    """Push these arrays out of all caches."""
    for array in arrays:
        _evict()(address_of(array), array.nbytes)


@cache
def _evict() -> Callable[[int, int], Any]:
    code, exported = link([compile_object(_EVICT, AVX2)])
    image = Image(code, exported)
    function: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(image.address("ingot_evict"))
    function.image = image  # the code lives as long as the function
    return function

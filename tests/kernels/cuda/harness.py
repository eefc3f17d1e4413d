"""Checks a CUDA kernel against its op's numpy meaning, through Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.ir.ops_paged import STATEFUL
from ingot.kernels import Candidate
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.axes import memory_order
from ingot.kernels.cuda.build import CudaBuilder, Handle
from ingot.kernels.cuda.standalone import generate
from ingot.kernels.layout import physical_shape
from ingot.kernels.node import Node, Port
from ingot.plan.extent import evaluate
from ingot.runtime.buffers import address_of, aligned_bytes
from tests.kernels.cuda import interpret
from tests.kernels.cuda.picking import compare, picked

Array = np.ndarray[Any, Any]
POISON = 0x7B


def interpreted(build: CudaBuilder, inputs: Sequence[Array | None], symbols: Mapping[str, int]) -> list[Array]:
    """Row-major results of all launches."""
    node = build.node
    held: dict[tuple[str, int], Array] = {}
    for index, (x, port) in enumerate(zip(inputs, node.inputs, strict=True)):
        if x is not None and port is not None and port.constant is None:
            held["input", index] = _copy(_physical(x, port))
    for index, constant in enumerate(build.constants):
        held["constant", index] = _copy(constant)
    for index, size in enumerate(build.temporaries):
        held["temporary", index] = aligned_bytes(max(evaluate(size, symbols), 1))
        held["temporary", index][:] = POISON
    for index, size in enumerate(build.counters):
        held["counter", index] = aligned_bytes(evaluate(size, symbols))
        held["counter", index][:] = 0
    for index, port in enumerate(node.outputs):
        held["output", index] = held["input", 0] if node.op in STATEFUL and index == 0 else _empty(port, symbols)

    def address(handle: Handle) -> int:
        return address_of(held[handle.kind, handle.index])

    for call in build.launches:
        values = [*(address(h) for h in call.handles), *(evaluate(e, symbols) for e in call.extents)]
        if 0 not in (grid := [evaluate(e, symbols) for e in call.grid]):
            interpret.run(call.unit, grid, values)
    assert not any(held["counter", index].any() for index in range(len(build.counters))), "a counter was not reset"
    return [_logical(held["output", i], port) for i, port in enumerate(node.outputs)]


def check(node: Node, inputs: Sequence[Array | None], expected: Sequence[Array], rtol: float = 1e-4, atol: float = 1e-5,
          limit: int = 4, only: str | None = None, symbols: Mapping[str, int] | None = None,
          precision: str = "fp32") -> list[Candidate]:  # fmt: skip
    """Interpret up to `limit` candidates, evenly picked; fail if one differs. Returns those run: Gluon has no
    interpreter."""
    target, chosen = architecture("sm_90", precision), list[Candidate]()
    for candidate in picked(node, target, limit, only):
        build = generate(node, candidate, target)
        if any(call.unit.gluon and 0 not in [evaluate(e, symbols or {}) for e in call.grid] for call in build.launches):
            continue
        chosen.append(candidate)
        mine = interpreted(build, inputs, symbols or {})
        for y, wanted in zip(mine, expected, strict=True):
            compare(y, wanted, rtol, atol, f"{candidate.label} {candidate.ports}")
    assert chosen, "no candidate that can be interpreted"
    return chosen


def _physical(x: Array, port: Port) -> Array:
    return np.transpose(x, memory_order(x.ndim, port.layout))


def _logical(y: Array, port: Port) -> Array:
    return np.asarray(np.transpose(y, np.argsort(memory_order(y.ndim, port.layout))), order="C")


def _copy(x: Array) -> Array:
    memory = aligned_bytes(max(x.nbytes, 1))
    held: Array = memory[: x.nbytes].view(x.dtype).reshape(x.shape)
    held[...] = x
    return held


def _empty(port: Port, symbols: Mapping[str, int]) -> Array:
    shape = [evaluate(d, symbols) for d in physical_shape(port.shape, port.layout, 1)]
    dtype = numpy_dtype(port.dtype)
    memory = aligned_bytes(max(int(np.prod(shape)) * dtype.itemsize, 1))
    memory[:] = POISON
    return memory[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)

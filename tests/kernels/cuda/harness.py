"""Checks a CUDA kernel against its op's numpy meaning, through Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.kernels import Candidate, candidates, with_layouts
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.axes import memory_order
from ingot.kernels.cuda.build import CudaBuilder, Handle
from ingot.kernels.layout import physical_shape
from ingot.kernels.node import Node, Port
from ingot.plan.extent import evaluate
from ingot.runtime.buffers import address_of, aligned_bytes
from tests.kernels.cuda import interpret

Array = np.ndarray[Any, Any]
POISON = 0x7B


def found(node: Node, only: str | None = None, precision: str = "fp32") -> list[Candidate]:
    """Candidates for sm_90."""
    target = architecture("sm_90", precision)
    made = [c for c in candidates(node, "cuda", target) if only is None or c.kernel.name == only]
    assert made, f"no kernel for {node.op} {[p and (p.dtype, p.shape) for p in node.inputs]}"
    return made


def generate(node: Node, candidate: Candidate, precision: str = "fp32") -> CudaBuilder:
    """The candidate's launches."""
    shaped = with_layouts(node, candidate.ports)
    build = CudaBuilder(shaped, architecture("sm_90", precision))
    candidate.kernel.generate(build, shaped, **candidate.tactic)
    build.checked()
    return build


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
    for index, port in enumerate(node.outputs):
        held["output", index] = _empty(port, symbols)

    def address(handle: Handle) -> int:
        return address_of(held[handle.kind, handle.index])

    for call in build.launches:
        values = [*(address(h) for h in call.handles), *(evaluate(e, symbols) for e in call.extents)]
        interpret.run(call.unit, [evaluate(e, symbols) for e in call.grid], values)
    return [_logical(held["output", i], port) for i, port in enumerate(node.outputs)]


def check(node: Node, inputs: Sequence[Array | None], expected: Sequence[Array], rtol: float = 1e-4, atol: float = 1e-5,
          limit: int = 4, only: str | None = None, symbols: Mapping[str, int] | None = None,
          precision: str = "fp32") -> list[Candidate]:  # fmt: skip
    """Interpret up to `limit` candidates, evenly picked; fail if one differs. Returns those run."""
    all_of_them = found(node, only, precision)
    first = {c.ports: c for c in reversed(all_of_them)}.values()  # of each choice of layouts
    picked = itertools.islice(all_of_them, 0, None, max(1, -(-len(all_of_them) // limit)))
    chosen = list({id(c): c for c in (*first, *picked)}.values())
    for candidate in chosen:
        mine = interpreted(generate(node, candidate, precision), inputs, symbols or {})
        for y, wanted in zip(mine, expected, strict=True):
            compare(y, wanted, rtol, atol, f"{candidate.label} {candidate.ports}")
    return chosen


def compare(mine: Array, theirs: Array, rtol: float, atol: float, what: str) -> None:
    """Equal integers, floats within the tolerances."""
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, (what, mine.dtype, theirs.dtype, mine.shape,
                                                                       theirs.shape)  # fmt: skip
    if mine.dtype.kind in "biu":
        assert np.array_equal(mine, theirs), f"{what}: {(mine != theirs).sum()} of {mine.size} differ"
    else:
        np.testing.assert_allclose(mine.astype(np.float64), theirs.astype(np.float64), rtol=rtol, atol=atol,
                                   err_msg=what)  # fmt: skip


def _physical(x: Array, port: Port) -> Array:
    return np.transpose(x, memory_order(x.ndim, port.layout))


def _logical(y: Array, port: Port) -> Array:
    return np.ascontiguousarray(np.transpose(y, np.argsort(memory_order(y.ndim, port.layout))))


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

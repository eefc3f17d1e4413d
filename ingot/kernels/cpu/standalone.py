"""One kernel compiled and run by itself: what tests and the tuner use. Static shapes, or symbols bound by the
caller."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.ir.ops_paged import STATEFUL
from ingot.kernels import Candidate, with_layouts
from ingot.kernels.cpu.build import PLACEHOLDER, Handle, KernelBuilder
from ingot.kernels.cpu.compile import compile_object, kernel_name
from ingot.kernels.cpu.isa import BEST_FIRST, Isa
from ingot.kernels.cpu.link import link
from ingot.kernels.layout import from_blocked, physical_shape, to_blocked
from ingot.kernels.node import Node, Port
from ingot.plan.extent import evaluate
from ingot.runtime.buffers import Array, address_of, aligned_bytes
from ingot.runtime.image import Image
from ingot.runtime.machine import cpu_features


def native_isa() -> Isa | None:
    """The best ISA this machine can run, if any."""
    return next((isa for isa in BEST_FIRST if isa.machine <= cpu_features()), None)


@dataclass(frozen=True)
class Compiled:
    """One candidate's linked code, entry points by name; travels between processes."""

    name: str
    code: bytes
    exported: Mapping[str, int]


def generate(node: Node, candidate: Candidate, isa: Isa) -> KernelBuilder:
    """The candidate's kernel for the node, not compiled yet."""
    shaped = with_layouts(node, candidate.ports)
    build = KernelBuilder(shaped, isa)
    candidate.kernel.generate(build, shaped, **candidate.tactic)
    return build


def compiled(build: KernelBuilder, level: int = 2) -> Compiled:
    """The kernel's code."""
    text = build.text()
    name = kernel_name(text, build.isa)
    code, exported = link([compile_object(text.replace(PLACEHOLDER, name), build.isa, level)])
    return Compiled(name, code, exported)


class Standalone:
    """A candidate of a node, ready to run on arrays: `Standalone(node, candidate, isa)(x, w) -> [y]`. `ready`: its code
    where that has been compiled before."""

    def __init__(
        self,
        node: Node,
        candidate: Candidate,
        isa: Isa,
        symbols: Mapping[str, int] | None = None,
        level: int = 2,
        ready: Compiled | None = None,
    ) -> None:
        self.isa, self.symbols = isa, dict(symbols or {})
        self.build = build = generate(node, candidate, isa)
        self.node = build.node
        ready = ready or compiled(build, level)
        name = ready.name
        self.image = Image(ready.code, ready.exported)
        kinds = [ctypes.c_void_p if t == "ptr" else ctypes.c_int64 for t, _ in build.arguments]
        signature = ctypes.CFUNCTYPE(None, *kinds)
        self.calls = [signature(self.image.address(f"{name}_p{i}")) for i in range(len(build.phases))]
        self._memory = {h: _aligned_copy(build.constants[h.index]) for h in build.handles if h.kind == "constant"}
        for h in build.handles:
            if h.kind == "temporary":
                self._memory[h] = aligned_bytes(evaluate(build.temporaries[h.index], self.symbols))
        self._scratch = aligned_bytes(max(build.scratch_bytes, 64))
        self.outputs = [self._empty(port) for port in self.node.outputs]

    def __call__(self, *inputs: Array | None, chunks: int = 1) -> list[Array]:
        """Run all phases, each split into `chunks` ranges; inputs and outputs are row-major."""
        self.bind(inputs)
        self.run(chunks)
        return [self._plain(y, port) for y, port in zip(self.outputs, self.node.outputs, strict=True)]

    def bind(self, inputs: Sequence[Array | None]) -> None:
        """Set the inputs; constant ones are ignored."""
        self._inputs = [self._physical(x, port) for x, port in zip(inputs, self.node.inputs, strict=False)]
        if self.node.op in STATEFUL and self._inputs[0] is not None:  # a plan keeps the output where the input is
            self.outputs[0][...] = self._inputs[0]
        pointers = [address_of(self._array(h)) for h in self.build.handles]
        extents = [evaluate(e, self.symbols) for e in self.build.extents]
        self._arguments = [*pointers, *extents, address_of(self._scratch)]

    def run(self, chunks: int = 1) -> None:
        """Run on what was bound last."""
        for call, phase in zip(self.calls, self.build.phases, strict=True):
            count = evaluate(phase.count, self.symbols)
            size = max(-(-count // chunks), phase.grain)
            for begin in range(0, count, size):
                call(*self._arguments, begin, min(begin + size, count))

    @property
    def constants(self) -> list[Array]:
        """The packed weights and tables."""
        return [array for handle, array in self._memory.items() if handle.kind == "constant"]

    def warm_inputs(self) -> None:
        """Bring the run-time inputs into the cache, as a producer would have left them."""
        for array in self._inputs:
            if array is not None:
                array.view(np.uint8).reshape(-1)[::64].sum()

    def time(self, repeats: int = 5) -> float:
        """Median seconds of one run on one thread."""
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            self.run()
            samples.append(time.perf_counter() - start)
        return sorted(samples)[len(samples) // 2]

    def _array(self, handle: Handle) -> Array:
        if handle.kind == "input":
            array = self._inputs[handle.index]
            assert array is not None, f"input {handle.index} is needed"
            return array
        return self.outputs[handle.index] if handle.kind == "output" else self._memory[handle]

    def _empty(self, port: Port) -> Array:
        shape = physical_shape(port.shape, port.layout, self.isa.lanes)
        concrete = [evaluate(d, self.symbols) for d in shape]
        dtype = numpy_dtype(port.dtype)
        size = int(np.prod(concrete)) * dtype.itemsize
        array = aligned_bytes(size)
        array[:] = 0x7B
        return array.view(dtype).reshape(concrete) if size else np.empty(concrete, dtype)

    def _physical(self, x: Array | None, port: Port | None) -> Array | None:
        if x is None or port is None or port.constant is not None:
            return None
        stored = to_blocked(x, self.isa.lanes, fill=_poison(x)) if port.layout == "blocked" else x
        return _aligned_copy(stored)

    def _plain(self, y: Array, port: Port) -> Array:
        if port.layout != "blocked":
            return y.copy()
        return from_blocked(y, evaluate(port.shape[1], self.symbols))


def _poison(x: Array) -> float:
    return float("nan") if x.dtype.kind == "f" else 101


def _aligned_copy(x: Any) -> Array:
    x = np.ascontiguousarray(x)
    memory = aligned_bytes(x.nbytes)
    array = memory.view(x.dtype).reshape(x.shape) if x.nbytes else np.empty(x.shape, x.dtype)
    array[...] = x
    return array

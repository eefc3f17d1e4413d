"""One kernel compiled and run by itself on a GPU: what tests and the tuner use. Static shapes."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import DeviceError
from ingot.kernels import Candidate, with_layouts
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.axes import memory_order
from ingot.kernels.cuda.build import NAME, CudaBuilder, Handle, LibraryUse
from ingot.kernels.cuda.compile import Cubin, compile_unit, overlaps
from ingot.kernels.layout import physical_shape
from ingot.kernels.node import Node, Port
from ingot.plan.extent import evaluate
from ingot.plan.plan import LibraryCall
from ingot.runtime import cuda, library
from ingot.runtime.buffers import Array
from ingot.runtime.cubins import Code

_JUNK = 0x7B
_MOST_COPIES, _COLD = 32, 120 << 20  # bytes that no second level of cache holds


def generate(node: Node, candidate: Candidate, target: Architecture) -> CudaBuilder:
    """The candidate's launches for the node."""
    shaped = with_layouts(node, candidate.ports)
    build = CudaBuilder(shaped, target)
    candidate.kernel.generate(build, shaped, **candidate.tactic)
    build.checked()
    return build


Given = dict[tuple[int, str], cuda.Allocation]
"""Inputs on a device, by index and layout."""


class Standalone:
    """A candidate of a node on a device: `Standalone(node, candidate, target, context)(x, w) -> [y]`, row-major. A
    library's candidate is the library, not the kernels that may have to take its place. `given`: inputs that lie on the
    device already, where candidates share them; it adds those that it brings."""

    def __init__(self, node: Node, candidate: Candidate, target: Architecture, context: cuda.Context,
                 cubins: Sequence[Cubin] | None = None, given: Given | None = None) -> None:  # fmt: skip
        self.context, self.build = context, generate(node, candidate, target)
        self._given = given
        self.node = self.build.node
        launches = () if self.build.libraries else self.build.launches
        self.cubins = cubins or [compile_unit(call.unit, target.name) for call in launches]
        kinds = [(overlaps(call.unit, target.capability), False, call.unit.together) for call in launches]
        self._libraries = [(use.handles, self._ready(use)) for use in self.build.libraries]
        codes = {str(i): Code(c.code, NAME, c.threads, c.shared, *kinds[i]) for i, c in enumerate(self.cubins)}
        self._kernels, self._stream = cuda.Kernels(context, codes), context.stream()
        self._memory: dict[tuple[str, int, int], cuda.Allocation] = {}
        weakref.finalize(self, context.driver.raw("cuStreamDestroy"), self._stream)

    def _ready(self, use: LibraryUse) -> library.Ready:
        ready = library.prepare(self.context, LibraryCall(use.library, 0, use.recipe, ()), {}, use.code)
        if ready is None:
            raise DeviceError(f"{use.library} cannot compute {self.node.op} here")
        return ready

    def __call__(self, *inputs: Array | None, items: Array | None = None) -> list[Array]:
        """Results for row-major inputs, of a graph as in an engine; constant inputs are ignored. items: those that are
        wanted along axis 0, in the place of all."""
        self._fill(inputs, copies=1, known=self._given is not None)
        self._spoil()
        for number in range(len(self.cubins)):
            self._kernels.function(str(number))  # nothing can be loaded while a stream is captured
        graph = self.context.capture(self._stream, lambda: self._put(0, self._stream))
        self.context.call("cuGraphLaunch", graph, self._stream)
        results = [self._fetch(index, port, items) for index, port in enumerate(self.node.outputs)]
        self.context.wait(self._stream, f"{self.node.op} by itself")
        self.context.call("cuGraphExecDestroy", graph)
        pairs = zip(results, self.node.outputs, strict=True)
        return [np.asarray(y.transpose(np.argsort(memory_order(y.ndim, p.layout))), order="C") for y, p in pairs]

    def _fetch(self, index: int, port: Port, items: Array | None) -> Array:
        """An output as it lies in memory, or items of it; its bytes are there when the stream is done."""
        whole, address = _empty(port), self._memory["output", index, 0].address
        if items is None:
            self.context.download(whole, address, self._stream)
            return whole
        assert memory_order(whole.ndim, port.layout)[0] == 0, "items lie one after the other in every layout"
        some = np.empty((len(items), *whole.shape[1:]), whole.dtype)
        for place, item in zip(some, items, strict=True):
            self.context.download(place, address + int(item) * place.nbytes, self._stream)
        return some

    def time(self, inputs: Sequence[Array | None], runs: int = 5, before: Standalone | None = None) -> float:
        """Microseconds of one run within a graph of many, each with weights of its own that are not in the cache; the
        best of `runs` graphs. With `before` every run follows one of that candidate, and the time is both's."""
        copies = min(one._copies for one in (self, before) if one is not None)
        for one in (self, before):
            if one is not None:
                one._fill(inputs, copies, known=True)
                one._put(0, self._stream)  # modules loaded
        graph = self.context.capture(self._stream, lambda: self._put_all(copies, before))
        begin, end = self.context.event(), self.context.event()
        best = float("inf")
        for _ in range(runs):
            self.context.call("cuEventRecord", begin, self._stream)
            self.context.call("cuGraphLaunch", graph, self._stream)
            self.context.call("cuEventRecord", end, self._stream)
            self.context.wait(self._stream, f"timing {self.node.op}")
            best = min(best, 1e3 * self.context.call("cuEventElapsedTime", begin, end) / copies)
        self.context.call("cuGraphExecDestroy", graph)
        return best

    @property
    def _copies(self) -> int:
        """How many weights no cache holds."""
        constants = sum(array.nbytes for array in self.build.constants)
        return min(max(_COLD // max(constants, 1), 4), _MOST_COPIES)

    def _fill(self, inputs: Sequence[Array | None], copies: int, known: bool) -> None:
        """Everything on the device; known: inputs that are there need not be brought again."""
        for index, (x, port) in enumerate(zip(inputs, self.node.inputs, strict=False)):
            if x is not None and port is not None and port.constant is None:
                self._bring(index, x, port, known)
        for index, array in enumerate(self.build.constants):
            self._upload("constant", index, 0, array)
            first = self._memory["constant", index, 0]
            for copy in range(1, copies):
                address = self._own("constant", index, copy, first.size).address
                self.context.call("cuMemcpyDtoDAsync", address, first.address, first.size, self._stream)
        self.context.wait(self._stream, "copies of weights")
        for index, size in enumerate(self.build.temporaries):
            self._own("temporary", index, 0, evaluate(size, {}))
        for index, size in enumerate(self.build.counters):
            if ("counter", index, 0) not in self._memory:
                self._upload("counter", index, 0, np.zeros(evaluate(size, {}), np.uint8))
        for index, port in enumerate(self.node.outputs):
            self._own("output", index, 0, int(evaluate(port.bytes, {})))

    def _bring(self, index: int, x: Array, port: Port, known: bool) -> None:
        key, given = ("input", index, 0), self._given if self._given is not None else {}
        if known and (index, port.layout) in given:
            self._memory[key] = given[index, port.layout]
        elif not (known and key in self._memory):
            self._upload("input", index, 0, _physical(x, port))
            given[index, port.layout] = self._memory[key]

    def _spoil(self) -> None:
        """Memory as a run finds it: results and temporaries hold what others left."""
        for (kind, *_), memory in self._memory.items():
            if kind in ("output", "temporary"):
                size = max(memory.size, 1)
                self.context.call("cuMemsetD8Async", memory.address, _JUNK, size, self._stream)

    def _own(self, kind: str, index: int, copy: int, size: int) -> cuda.Allocation:
        key = (kind, index, copy)
        if key not in self._memory or self._memory[key].size < size:
            self._memory[key] = self.context.allocate(size, f"{self.node.op} by itself")
        return self._memory[key]

    def _upload(self, kind: str, index: int, copy: int, array: Array) -> None:
        held = np.ascontiguousarray(array)
        self.context.upload(self._own(kind, index, copy, held.nbytes).address, held, self._stream)
        self.context.wait(self._stream, "an upload")

    def _put_all(self, copies: int, before: Standalone | None) -> None:
        for copy in range(copies):
            if before is not None:
                before._put(copy, self._stream)
            self._put(copy, self._stream)

    def _put(self, copy: int, stream: Any) -> None:
        for handles, ready in self._libraries:
            ready([self._address(handle, copy) for handle in handles], stream)
        for number, call in enumerate(() if self._libraries else self.build.launches):
            grid = [evaluate(e, {}) for e in call.grid]
            values = [self._address(h, copy) for h in call.handles]
            extents = [evaluate(e, {}) for e in call.extents]
            kinds: list[Any] = [ctypes.c_void_p] * len(values) + [ctypes.c_int] * len(extents)
            arguments = ((*values, *extents, 0, 0), (*kinds, ctypes.c_void_p, ctypes.c_void_p))
            self._kernels.launch(str(number), [*grid, 1, 1][:3], arguments, stream)

    def _address(self, handle: Handle, copy: int) -> int:
        return self._memory[handle.kind, handle.index, copy if handle.kind == "constant" else 0].address


def _physical(x: Array, port: Port) -> Array:
    return np.transpose(x, memory_order(x.ndim, port.layout))


def _empty(port: Port) -> Array:
    shape = [evaluate(d, {}) for d in physical_shape(port.shape, port.layout, 1)]
    return np.empty(shape, numpy_dtype(port.dtype))

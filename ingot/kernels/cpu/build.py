"""`KernelBuilder`: what a CPU kernel generator writes with. A kernel is one or more phases; a phase is a function over
a
range of independent work items, called by as many threads as there are, which ends when all items are done.

    @kernel("Scale", on="cpu")
    def scale_f32(build, node):
        x, y = build.input(0), build.output(0)
        def body(f, begin, end):
            ...
        build.phase(node.output.elements, body, grain=4096)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ingot.errors import BuildError
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.llvm import Function, Index, Value
from ingot.kernels.node import Node
from ingot.plan.extent import Extent

PLACEHOLDER = "KERNEL"


@dataclass(frozen=True)
class Handle:
    """A pointer argument of every phase: an operand, a packed constant or a temporary."""

    kind: Literal["input", "output", "constant", "temporary"]
    index: int

    @property
    def name(self) -> str:
        """Argument name in the generated function."""
        return f"{self.kind}{self.index}"


@dataclass(frozen=True)
class Phase:
    """`count` work items handed out in chunks of at least `grain`; items of one phase may run in any order."""

    count: Extent
    grain: int


@dataclass(eq=False)
class PhaseFunction(Function):
    """A phase's function: pointers of handles and values of extents by lookup."""

    builder: KernelBuilder | None = None

    @property
    def rounds_bfloat16(self) -> bool:
        return self.builder is not None and self.builder.isa.has("avx512_bf16")

    def pointer(self, handle: Handle) -> Value:
        """The i8 pointer of an operand, packed constant or temporary."""
        return Value(self, "ptr", f"%{handle.name}")

    def extent(self, extent: Extent) -> Index:
        """A Python int for a static extent, an i64 argument for a symbolic one."""
        assert self.builder is not None
        return extent if isinstance(extent, int) else Value(self, "i64", f"%{self.builder.extent_argument(extent)}")

    @property
    def scratch(self) -> Value:
        """Pointer to this thread's scratch memory (64-byte aligned, see KernelBuilder.scratch)."""
        return Value(self, "ptr", "%scratch")


@dataclass(eq=False)
class KernelBuilder:
    """Collects the phases, constants, temporaries and scratch of one kernel instance."""

    node: Node
    isa: Isa
    phases: list[Phase] = field(default_factory=list)
    functions: list[PhaseFunction] = field(default_factory=list)
    constants: list[np.ndarray[Any, Any]] = field(default_factory=list)
    temporaries: list[Extent] = field(default_factory=list)
    counters: list[Extent] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    handles: list[Handle] = field(default_factory=list)
    scratch_bytes: int = 0
    helpers: dict[str, str] = field(default_factory=dict)
    symbol: str = ""

    def input(self, index: int) -> Handle:
        """Input `index`; a constant one is stored with the engine as it is (pack it yourself for another order)."""
        port = self.node.input(index)
        return self.pack(port.constant) if port.constant is not None else self._use(Handle("input", index))

    def output(self, index: int = 0) -> Handle:
        """Output `index`."""
        return self._use(Handle("output", index))

    def pack(self, array: np.ndarray[Any, Any]) -> Handle:
        """A constant stored with the engine, 64-byte aligned, followed by at least 64 readable bytes."""
        for index, known in enumerate(self.constants):
            if known is array:
                return Handle("constant", index)
        self.constants.append(array)
        return self._use(Handle("constant", len(self.constants) - 1))

    def temporary(self, size: Extent) -> Handle:
        """Arena memory of `size` bytes that lives from the first to the last phase of this kernel."""
        self.temporaries.append(size)
        return self._use(Handle("temporary", len(self.temporaries) - 1))

    def scratch(self, size: int) -> int:
        """Reserve private memory per thread within a phase; returns its byte offset from `f.scratch`."""
        offset = self.scratch_bytes
        self.scratch_bytes += -(-size // 64) * 64
        return offset

    def phase(self, count: Extent, body: Callable[[PhaseFunction, Value, Value], None], grain: int = 1) -> None:
        """Append a phase; `body(f, begin, end)` emits the code for the items [begin, end)."""
        f = PhaseFunction(f"{PLACEHOLDER}_p{len(self.phases)}", (), builder=self)
        body(f, Value(f, "i64", "%begin"), Value(f, "i64", "%end"))
        self.phases.append(Phase(count, max(grain, 1)))
        self.functions.append(f)

    def extent_argument(self, extent: Extent) -> str:
        """Name of the argument that carries a symbolic extent."""
        if extent not in self.extents:
            self.extents.append(extent)
        return f"extent{self.extents.index(extent)}"

    def _use(self, handle: Handle) -> Handle:
        if handle not in self.handles:
            self.handles.append(handle)
        return handle

    @property
    def arguments(self) -> tuple[tuple[str, str], ...]:
        """Signature shared by all phases: handles in order of use, extents, scratch, begin, end."""
        return (
            *(("ptr", h.name) for h in self.handles),
            *(("i64", f"extent{i}") for i in range(len(self.extents))),
            ("ptr", "scratch"),
            ("i64", "begin"),
            ("i64", "end"),
        )

    def text(self) -> str:
        """The module's IR with PLACEHOLDER in the place of the kernel's name."""
        if not self.functions:
            raise BuildError(
                f"the kernel for {self.node.op} {self.node.name!r} emitted no phase; this is a bug in Ingot"
            )
        for f in self.functions:
            f.arguments = self.arguments
        declarations = sorted(set().union(*(f.declarations for f in self.functions)))
        parts = [*declarations, *self.helpers.values(), *(f.text() for f in self.functions)]
        return "\n".join([*parts, f"attributes #0 = {{ {self.isa.attributes} }}\n"])

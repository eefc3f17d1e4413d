"""A kernel for Pointwise that goes wrong as generated code can; its tactic says how. Importing registers it."""

from __future__ import annotations

from ingot import kernels
from ingot.errors import BuildError
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.node import Node

FAULTS = ("refuse", "garble", "crash", "hang")
FOREVER = 1 << 62


@kernels.kernel("Pointwise", on="cpu", cost=lambda node, isa, fault: 1e-3, space={"fault": FAULTS})
def faulty(build: KernelBuilder, node: Node, fault: str) -> None:
    """Raises, emits what is not LLVM IR, stores far away, or never returns."""
    build.input(0)
    y = build.output(0)
    if fault == "refuse":
        raise BuildError("this kernel does not like the shape")

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        value = f.load("float", f.pointer(y))
        if fault == "garble":
            f.emit("this is no instruction")
        elif fault == "crash":
            f.store(value, f.pointer(y), f.index(FOREVER))
        elif fault == "hang":
            f.loop(f.index(0), f.index(FOREVER), lambda i: f.store(value, f.pointer(y)))

    build.phase(node.output.elements, body)

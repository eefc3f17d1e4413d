"""The CPU's part in making a plan: texts of kernels and segment functions, compiled while others are generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ingot.kernels import Candidate
from ingot.kernels.cpu.build import PLACEHOLDER, KernelBuilder
from ingot.kernels.cpu.compile import kernel_name
from ingot.kernels.cpu.driver import Call, counters, segment_text
from ingot.kernels.cpu.emit import Compilation
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.node import Node
from ingot.kernels.target import Place
from ingot.kernels.work import bytes_of, flops_of
from ingot.plan.plan import NativeSegment, Step
from ingot.report import BuildLog

_SERIAL_BYTES, _SERIAL_FLOPS = 32 << 10, 200_000


@contextmanager
def open_backend(target: Isa, log: BuildLog) -> Iterator[CpuBackend]:
    """A backend for one variant; its children end with it."""
    with Compilation(target, log) as compilation:
        yield CpuBackend(target, compilation)


@dataclass(eq=False)
class CpuBackend:
    """Kernels for one ISA, added to a compilation."""

    target: Isa
    compilation: Compilation
    segments: int = 0

    def generate(self, node: Node, candidate: Candidate) -> KernelBuilder:
        """The kernel's builder, with its name as `symbol`."""
        build = KernelBuilder(node, self.target)
        candidate.kernel.generate(build, node, **candidate.tactic)
        text = build.text()
        build.symbol = kernel_name(text, self.target)
        self.compilation.add(build.symbol, text.replace(PLACEHOLDER, build.symbol))
        return build

    def calls(self, build: KernelBuilder, place: Place) -> list[Call]:
        """A call per phase."""
        pointers = tuple(place.storage(h) for h in build.handles)
        extents = tuple(place.extent(e) for e in build.extents)
        small, last = _is_small(build.node), len(build.phases) - 1
        return [
            Call(
                f"{build.symbol}_p{k}", pointers, extents,
                phase.count if isinstance(phase.count, int) else None,
                None if isinstance(phase.count, int) else place.extent(phase.count),
                phase.grain, small or (isinstance(phase.count, int) and phase.count <= phase.grain),
                place.step if k == last else None,
            )
            for k, phase in enumerate(build.phases)
        ]  # fmt: skip

    def segment(self, steps: tuple[Step, ...], calls: Sequence[Call]) -> NativeSegment:
        """One native function."""
        self.segments += 1
        symbol = f"segment{self.segments}"
        self.compilation.add(symbol, segment_text(symbol, calls, self.target))
        return NativeSegment(symbol, counters(calls), steps)

    def image(self) -> tuple[bytes, dict[str, int]]:
        """The code section and its entry points."""
        return self.compilation.image()


def _is_small(node: Node) -> bool:
    """Work below a few microseconds is not worth sharing."""
    size, flops = bytes_of(node), flops_of(node)
    return isinstance(size, int) and isinstance(flops, int) and size < _SERIAL_BYTES and flops < _SERIAL_FLOPS

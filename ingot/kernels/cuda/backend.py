"""CUDA's part in making a plan: Triton functions compiled in children, launches for a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from ingot.errors import BuildError
from ingot.kernels import Candidate
from ingot.kernels.cpu.workers import WorkerPool
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.build import NAME, CudaBuilder, Unit
from ingot.kernels.cuda.compile import Cubin, beside, overlaps
from ingot.kernels.node import Node
from ingot.kernels.target import Place
from ingot.plan.plan import GraphSegment, Launch, LibraryCall, Step
from ingot.report import BuildLog
from ingot.runtime.cpu import usable_threads
from ingot.runtime.cubins import Code, pack

_LIMIT = 300.0  # seconds for one kernel


@contextmanager
def open_backend(target: Architecture, log: BuildLog) -> Iterator[CudaBackend]:
    """A backend for one variant; its children end with it."""
    with WorkerPool(usable_threads()) as pool:
        yield CudaBackend(target, pool, log)


@dataclass(eq=False)
class CudaBackend:
    """Kernels for one architecture."""

    target: Architecture
    pool: WorkerPool
    log: BuildLog
    _cubins: dict[str, tuple[Future[Cubin], Unit, str]] = field(default_factory=dict)
    _plans: dict[str, Code] = field(default_factory=dict)

    def generate(self, node: Node, candidate: Candidate) -> CudaBuilder:
        """The step's launches; what is not being compiled yet is now."""
        build = CudaBuilder(node, self.target)
        candidate.kernel.generate(build, node, **candidate.tactic)
        for call in build.checked():
            name = call.unit.symbol(self.target)
            if name not in self._cubins:
                arguments = (call.unit, self.target.name)
                job = self.pool.submit("ingot.kernels.cuda.compile:compile_unit", *arguments, limit=_LIMIT)
                self._cubins[name] = (job, call.unit, f"{candidate.label} of {', '.join(node.origins) or node.name}")
        self._plans.update({use.entry: Code(use.code, "", 0, 0) for use in build.libraries if use.code})
        return build

    def calls(self, build: CudaBuilder, place: Place) -> list[Launch | LibraryCall]:
        """A launch per function, and what a library does in their place."""
        libraries = [
            LibraryCall(use.library, place.step, use.recipe, tuple(place.storage(h) for h in use.handles), use.entry)
            for use in build.libraries
        ]
        launches = [
            Launch(
                call.unit.symbol(self.target), place.step, call.grid,
                tuple(place.storage(h) for h in call.handles), tuple(place.extent(e) for e in call.extents),
            )
            for call in build.launches
            if not (call.copies and len({place.storage(h) for h in call.handles}) == 1)
        ]  # fmt: skip
        return [*libraries, *launches]

    def segment(self, steps: tuple[Step, ...], calls: Sequence[Launch | LibraryCall]) -> GraphSegment:
        """One graph."""
        launches = tuple(call for call in calls if isinstance(call, Launch))
        return GraphSegment(steps, launches, tuple(call for call in calls if isinstance(call, LibraryCall)))

    def image(self) -> tuple[bytes, dict[str, int]]:
        """The code section."""
        codes = dict(self._plans)
        for count, (name, (job, unit, what)) in enumerate(self._cubins.items()):
            made = _result(job, what)
            early, both = (known(unit, self.target.capability) for known in (overlaps, beside))
            codes[name] = Code(made.code, NAME, made.threads, made.shared, early, both, unit.together)
            self.log.advance(f"compile {self.target.name}", (count + 1) / len(self._cubins))
        return pack(codes), {}


def _result(job: Future[Cubin], what: str) -> Cubin:
    try:
        return job.result()
    except BuildError as error:
        raise BuildError(f"{what}: {error}; this is a bug in Ingot") from None

"""What runs in the child processes of a build for a GPU: compiling candidates, and timing them in graphs."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ingot.errors import DeviceError
from ingot.kernels import Candidate
from ingot.kernels.cuda.architecture import Architecture, parse
from ingot.kernels.cuda.compile import Cubin, compile_unit
from ingot.kernels.cuda.standalone import Given, Standalone, generate
from ingot.kernels.node import Node
from ingot.runtime import cuda
from ingot.tune import draws
from ingot.tune.expected import alike, expected
from ingot.tune.measure import Description, candidate_of
from ingot.tune.turns import alone_on

_RUNS = 5


def compile_candidate(node: Node, described: Description, named: str) -> list[Cubin]:
    """The candidate's cubins, in the order of its launches; none where a library will be timed in their place."""
    target, drawn = parse(named), draws.with_weights(node)
    candidate = candidate_of(drawn, described, target)
    if candidate.kernel.library is not None:
        return []
    build = generate(drawn, candidate, target)
    return [compile_unit(call.unit, target.name) for call in build.launches]


def time_candidates(
    node: Node, ready: Sequence[tuple[Description, Sequence[Cubin]]], named: str, budget: float, share: float
) -> list[float | str]:
    """Microseconds of each candidate, or what is wrong with its results: all must be what the operator means."""
    target, node = parse(named), draws.with_weights(node)
    contest = _Contest(node, target, cuda.context_of(cuda.select("cuda")))
    candidates = [candidate_of(node, described, target) for described, _ in ready]
    order = sorted(range(len(ready)), key=lambda k: candidates[k].kernel.library is not None)  # libraries last
    outcomes = {k: contest.enter(candidates[k], ready[k][1]) for k in order}
    return [outcomes[k] for k in range(len(ready))]


class _Contest:
    """Candidates of a node, one after the other, with the same inputs and the same results to give."""

    def __init__(self, node: Node, target: Architecture, context: cuda.Context) -> None:
        self.context, self._node, self._target = context, node, target
        self._feeds = draws.feeds(node)
        self._wanted = expected(node, self._feeds)
        self._given: Given = {}
        self._fastest: tuple[float, Standalone] | None = None  # of generated ones

    def enter(self, candidate: Candidate, cubins: Sequence[Cubin]) -> float | str:
        """Its microseconds, or what is wrong with it."""
        try:
            return self._timed(candidate, cubins)
        except DeviceError as error:
            if self.context.fault:  # nothing can be done with this process any more: the parent tries one by one
                os._exit(1)
            return str(error)

    def _timed(self, candidate: Candidate, cubins: Sequence[Cubin]) -> float | str:
        alone = Standalone(self._node, candidate, self._target, self.context, cubins, self._given)
        with alone_on(self.context.device):
            found = alone(*self._feeds, items=self._wanted.items)
        gap = self._wanted.gap(found)
        if not gap <= alike(self._node):
            return f"its results are wrong by {gap:.1e}"
        with alone_on(self.context.device):
            return self._time(alone)

    def _time(self, alone: Standalone) -> float:
        if alone.build.libraries and self._fastest is not None:
            return self._among_generated(alone, *self._fastest)
        taken = alone.time(self._feeds, _RUNS)
        if not alone.build.libraries and (self._fastest is None or taken < self._fastest[0]):
            self._fastest = taken, alone
        return taken

    def _among_generated(self, library: Standalone, taken: float, generated: Standalone) -> float:
        """What a library's run adds to generated ones in a row. Those begin before what is before them has ended; in
        a library's neighbourhood they cannot, which a row of the library's runs alone does not show."""
        return max(library.time(self._feeds, _RUNS, generated) - taken, 0.0)

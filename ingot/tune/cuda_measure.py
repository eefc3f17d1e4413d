"""What runs in the child processes of a build for a GPU: compiling candidates, and timing them in graphs."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ingot.errors import DeviceError
from ingot.kernels.cuda.architecture import parse
from ingot.kernels.cuda.compile import Cubin, compile_unit
from ingot.kernels.cuda.standalone import Standalone, generate
from ingot.kernels.node import Node
from ingot.runtime import cuda
from ingot.tune.expected import alike, expected
from ingot.tune.measure import Description, candidate_of, draw, with_drawn_weights

_RUNS = 5


def compile_candidate(node: Node, described: Description, named: str) -> list[Cubin]:
    """The candidate's cubins, in the order of its launches; none where a library will be timed in their place."""
    target, drawn = parse(named), with_drawn_weights(node)
    candidate = candidate_of(drawn, described, target)
    if candidate.kernel.library is not None:
        return []
    build = generate(drawn, candidate, target)
    return [compile_unit(call.unit, target.name) for call in build.launches]


def time_candidates(
    node: Node, ready: Sequence[tuple[Description, Sequence[Cubin]]], named: str, budget: float, distant: bool
) -> list[float | str]:
    """Microseconds of each candidate, or what is wrong with its results: all must be what the operator means."""
    target, node = parse(named), with_drawn_weights(node)
    context = cuda.context_of(cuda.select("cuda"))
    feeds = [None if p is None or p.constant is not None else draw(p) for p in node.inputs]
    wanted = expected(node, feeds)
    outcomes: list[float | str] = []
    try:
        for described, cubins in ready:
            alone = Standalone(node, candidate_of(node, described, target), target, context, cubins)
            gap = wanted.gap(alone(*feeds))
            outcomes.append(alone.time(feeds, _RUNS) if gap <= alike(node) else f"its results are wrong by {gap:.1e}")
    except DeviceError:
        if context.fault:  # nothing can be done with this process any more: the parent tries one by one
            os._exit(1)
        raise
    return outcomes

"""What a candidate costs when nothing is timed: its kernel's own estimate, or the roofline of its node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingot.kernels import Candidate, with_layouts
from ingot.kernels.node import Node
from ingot.kernels.work import bytes_of, flops_of
from ingot.plan.lower import Work
from ingot.tune.binding import bind


def estimate(node: Node, candidate: Candidate, isa: Any) -> float:
    """Microseconds (of one core, or of the whole GPU) for a node with static extents."""
    shaped = with_layouts(node, candidate.ports)
    if candidate.kernel.cost is not None:
        return candidate.kernel.cost(shaped, isa, **candidate.tactic)
    size, flops = bytes_of(node), flops_of(node)
    assert isinstance(size, int) and isinstance(flops, int)
    return isa.pace.step + size / isa.pace.bytes + flops / isa.pace.flops


class Estimates:
    """A price function that remembers bound nodes."""

    def __init__(self, isa: Any, symbols: Mapping[str, int]) -> None:
        self.isa, self.symbols = isa, symbols
        self._bound: dict[Work, Node] = {}

    def __call__(self, work: Work, candidate: Candidate) -> float:
        return estimate(self.bound(work), candidate, self.isa)

    def bound(self, work: Work) -> Node:
        """The work's node at typical sizes."""
        if work not in self._bound:
            assert work.node is not None
            self._bound[work] = bind(work.node, self.symbols)
        return self._bound[work]

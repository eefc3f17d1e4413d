"""Launches for ranges of a size that a run decides: those whose range the size is not in have no blocks, and a graph
that is captured for a size does not hold them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ingot.kernels.cuda.build import CudaBuilder
from ingot.plan.extent import Extent, product


@dataclass(frozen=True)
class Rung:
    """Sizes from `low` to `high`, or all from `low` on."""

    low: int
    high: int | None = None

    def takes(self, size: Extent) -> bool:
        """Whether the size may be in the range."""
        return not isinstance(size, int) or (self.low <= size and (self.high is None or size <= self.high))

    def cut(self, size: Extent) -> Extent:
        """The size, no larger than the range's end: what memory is taken for."""
        if self.high is None:
            return size
        return min(size, self.high) if isinstance(size, int) else f"min({size},{self.high})"

    def factor(self, size: Extent) -> Extent:
        """1 where the size is in the range, else 0."""
        if isinstance(size, int):
            return int(self.takes(size))
        above = [f"min(max({size}-{self.low - 1},0),1)"] if self.low > 1 else []
        below = [f"min(max({self.high + 1}-({size}),0),1)"] if self.high is not None else []
        return product((*above, *below))


@contextmanager
def only(build: CudaBuilder, rung: Rung, size: Extent) -> Iterator[None]:
    """Launches that are written inside happen for sizes of the range alone."""
    first = len(build.launches)
    yield
    for number in range(first, len(build.launches)):
        call = build.launches[number]
        grid = (product((call.grid[0], rung.factor(size))), *call.grid[1:])
        build.launches[number] = replace(call, grid=grid)

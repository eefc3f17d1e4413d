"""What the stages that all targets share know of a target, and ask of it: kernels generated, segments made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ingot.kernels import Candidate
from ingot.kernels.node import Node
from ingot.plan.extent import Extent
from ingot.plan.plan import Segment, Step


@dataclass(frozen=True)
class Pace:
    """Rough speed for where nothing is timed: microseconds of any step, bytes and operations per microsecond; the same
    for bringing a tensor into another layout (bytes read and written)."""

    step: float
    bytes: float
    flops: float
    reorder: float
    reorder_bytes: float


class Target(Protocol):
    """What kernels are generated for: `name` as variants are called, `lanes` channels in a block of the blocked layout,
    `machine` what a machine must have."""

    @property
    def name(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def lanes(self) -> int: ...
    @property
    def machine(self) -> frozenset[str]: ...
    @property
    def pace(self) -> Pace: ...


class Handle(Protocol):
    """A pointer that a kernel takes: "input", "output", "constant" or "temporary" number `index`."""

    @property
    def kind(self) -> str: ...
    @property
    def index(self) -> int: ...


class Build(Protocol):
    """A generated kernel: what it wants stored with the engine, bytes of its temporaries, bytes of scratch a thread."""

    constants: list[np.ndarray[Any, Any]]
    temporaries: list[Extent]
    counters: list[Extent]
    scratch_bytes: int


@dataclass(frozen=True)
class Place:
    """Where the operands of one step lie: storage of a handle, number of an extent in the plan's table; `step` is its
    number in the segment."""

    storage: Callable[[Handle], int]
    extent: Callable[[Extent], int]
    step: int


class Backend(Protocol):
    """A target's part in making a plan. `calls` are its own affair: what it makes of a step, and a segment of them."""

    @property
    def target(self) -> Target: ...

    def generate(self, node: Node, candidate: Candidate) -> Build:
        """The candidate's kernel for a node whose ports have the candidate's layouts; it is being compiled."""
        ...

    def calls(self, build: Any, place: Place) -> Sequence[Any]:
        """What a segment does for one step."""
        ...

    def segment(self, steps: tuple[Step, ...], calls: Sequence[Any]) -> Segment:
        """Steps in a row as one segment."""
        ...

    def image(self) -> tuple[bytes, dict[str, int]]:
        """The code section, all compiled, and its entry points."""
        ...

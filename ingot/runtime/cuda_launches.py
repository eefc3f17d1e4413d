"""What the segments of a plan put on a GPU's stream: kernels, libraries' calls, what ranks tell each other."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ingot.errors import DeviceError
from ingot.plan.extent import evaluate
from ingot.plan.plan import CollectiveSegment, GraphSegment, Launch
from ingot.runtime import library

if TYPE_CHECKING:
    from ingot.runtime.cuda_executor import CudaFrame

_LARGEST_GRID = (2**31 - 1, 65535, 65535)


class Launches:
    """Those of a frame."""

    def __init__(self, frame: CudaFrame) -> None:
        self._frame = frame
        self._libraries: dict[int, Mapping[int, library.Replacement]] = {}

    def load(self, number: int) -> None:
        """What a segment needs; loading is not allowed while a stream is being captured."""
        segment = self._frame.plan.segments[number]
        if isinstance(segment, GraphSegment):
            replaced = self._replaced(number, segment)
            for launch in segment.launches:
                if launch.step not in replaced:
                    self._frame.loaded.kernels.function(launch.entry)

    def put(self, number: int, between: Callable[[int], None] = lambda step: None) -> None:
        """Every launch of the segment; `between(step)` before the first launch of each step."""
        segment = self._frame.plan.segments[number]
        if isinstance(segment, CollectiveSegment):
            self._exchange(segment)
        else:
            assert isinstance(segment, GraphSegment)
            self._put_all(number, segment, between)

    def _replaced(self, number: int, segment: GraphSegment) -> Mapping[int, library.Replacement]:
        """Steps of a segment that a library computes here."""
        frame = self._frame
        if number not in self._libraries:
            made = library.replacements(frame.context, frame.loaded.kernels, segment.libraries, frame.symbols)
            self._libraries[number] = made
        return self._libraries[number]

    def _put_all(self, number: int, segment: GraphSegment, between: Callable[[int], None]) -> None:
        frame, replaced, latest = self._frame, self._replaced(number, segment), -1
        synchronous = os.environ.get("INGOT_CUDA_SYNC") == "1"
        for launch in segment.launches:
            if latest == launch.step and latest in replaced:
                continue
            while latest < launch.step:
                latest += 1
                between(latest)
            step = segment.steps[launch.step]
            with frame.executor.marks.step(step):
                self._put(launch, replaced.get(launch.step))
            if synchronous:
                frame.wait(f"step {step.name!r} ({step.kernel}, nodes {', '.join(step.nodes)})")

    def _put(self, launch: Launch, instead: library.Replacement | None = None) -> None:
        frame = self._frame
        if instead is not None:
            library.put(instead, frame.pointers, frame.stream)
            return
        grid = [evaluate(e, frame.symbols) for e in launch.grid]
        grid += [1] * (3 - len(grid))
        if 0 in grid:
            return
        if any(n > most for n, most in zip(grid, _LARGEST_GRID, strict=True)):
            raise DeviceError(f"{launch.entry} would need {grid} blocks, at most {_LARGEST_GRID} are allowed")
        values = (*(int(frame.pointers[p]) for p in launch.pointers), *(int(frame.extents[e]) for e in launch.extents))
        kinds = (ctypes.c_void_p,) * len(launch.pointers) + (ctypes.c_int,) * len(launch.extents)
        arguments = ((*values, 0, 0), (*kinds, ctypes.c_void_p, ctypes.c_void_p))  # Triton's two scratch pointers
        frame.loaded.kernels.launch(launch.entry, grid, arguments, frame.stream)

    def _exchange(self, segment: CollectiveSegment) -> None:
        frame, values = self._frame, self._frame.plan.values
        ranks, step = frame.executor.ranks, segment.step
        (source,), (target,) = step.inputs, step.outputs
        assert ranks is not None and source is not None
        addresses = int(frame.pointers[values[source].storage]), int(frame.pointers[values[target].storage])
        count = frame.elements(values[source])
        ranks.put(segment.operation, addresses, count, values[source].dtype, frame.stream)
        if os.environ.get("INGOT_CUDA_SYNC") == "1":
            frame.wait(f"step {step.name!r} ({segment.operation})")


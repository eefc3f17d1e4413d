"""What the segments of a plan put on a GPU's stream: kernels, libraries' calls, what ranks tell each other."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from ingot.errors import DeviceError
from ingot.plan.extent import evaluate
from ingot.plan.plan import CollectiveSegment, GraphSegment, Launch
from ingot.runtime import cuda, lanes, library

if TYPE_CHECKING:
    from ingot.runtime.cuda_executor import CudaFrame

_LARGEST_GRID = (2**31 - 1, 65535, 65535)


class Launches:
    """Those of a frame."""

    def __init__(self, frame: CudaFrame) -> None:
        self._frame = frame
        self._libraries: dict[int, Mapping[int, library.Replacement]] = {}
        self._beside: list[Any] = []  # streams for steps beside those on the frame's own
        self._events: list[Any] = []  # of the last capture
        weakref.finalize(self, _destroy, frame.context, self._beside, self._events)

    def load(self, number: int) -> None:
        """What a segment needs; loading is not allowed while a stream is being captured."""
        segment = self._frame.plan.segments[number]
        if isinstance(segment, GraphSegment):
            replaced = self._replaced(number, segment)
            for launch in segment.launches:
                if launch.step not in replaced:
                    self._frame.loaded.kernels.function(launch.entry)
            self._beside += [self._frame.context.stream() for _ in range(len(self._beside), segment.lanes - 1)]

    def alone(self, put: Callable[[], None]) -> None:
        """Puts on the stream what may not be beside others that must be alone on the device."""
        frame = self._frame
        with frame.context.alone(frame.stream) if frame.loaded.kernels.together else nullcontext():
            put()

    def put(self, number: int, between: Callable[[int], None] | None = None) -> None:
        """Every launch of the segment, one after the other; `between(step)` before the first launch of each step."""
        segment = self._frame.plan.segments[number]
        if isinstance(segment, CollectiveSegment):
            self._exchange(segment)
        else:
            assert isinstance(segment, GraphSegment)
            self._put_all(number, segment, between or (lambda step: None))

    def times(self, number: int, repeats: int) -> list[float]:
        """Microseconds of each step of a segment, by events between the steps of one graph; the best of some runs."""
        frame, context, segment = self._frame, self._frame.context, self._frame.plan.segments[number]
        assert isinstance(segment, GraphSegment)
        events = [context.event() for _ in range(len(segment.steps) + 1)]
        self.load(number)

        def record() -> None:
            self.put(number, lambda step: context.record(events[step], frame.stream))
            context.record(events[-1], frame.stream)

        graph = context.capture(frame.stream, record)
        best = [float("inf")] * len(segment.steps)
        for _ in range(repeats):
            self.alone(lambda: context.call("cuGraphLaunch", graph, frame.stream))
            frame.wait("a timed run")
            taken = [1e3 * context.call("cuEventElapsedTime", a, b) for a, b in pairwise(events)]
            best = [min(pair) for pair in zip(best, taken, strict=True)]
        context.call("cuGraphExecDestroy", graph)
        for event in events:
            context.call("cuEventDestroy", event)
        return best

    def put_beside(self, number: int) -> None:
        """The same while the stream is being captured: steps that do not need each other go side by side where the
        plan has lanes for them."""
        segment = self._frame.plan.segments[number]
        if isinstance(segment, GraphSegment) and segment.lanes > 1:
            self._put_in_lanes(number, segment)
        else:
            self.put(number)

    def _replaced(self, number: int, segment: GraphSegment) -> Mapping[int, library.Replacement]:
        """Steps of a segment that a library computes here."""
        frame = self._frame
        if number not in self._libraries:
            made = library.replacements(frame.context, frame.loaded.kernels, segment.libraries, frame.symbols)
            self._libraries[number] = made
        return self._libraries[number]

    def _put_all(self, number: int, segment: GraphSegment, between: Callable[[int], None]) -> None:
        frame, replaced, latest = self._frame, self._replaced(number, segment), -1
        for launch in segment.launches:
            if latest == launch.step and latest in replaced:
                continue
            while latest < launch.step:
                latest += 1
                between(latest)
            step = segment.steps[launch.step]
            with frame.executor.marks.step(step):
                self._put(launch, replaced.get(launch.step))
            if frame.executor.synchronous:
                frame.wait(f"step {step.name!r} ({step.kernel}, nodes {', '.join(step.nodes)})")

    def _put_in_lanes(self, number: int, segment: GraphSegment) -> None:
        frame, streams = self._frame, [self._frame.stream, *self._beside]
        replaced = self._replaced(number, segment)
        turns = lanes.arranged(lanes.uses(frame.plan, segment, self._shared()), segment.lanes)
        _destroy(frame.context, (), self._events)
        fork = _Fork(frame.context, streams, self._events)
        for step, launches in groupby(segment.launches, lambda launch: launch.step):
            turn, instead = turns[step], replaced.get(step)
            late = fork.wait(turn)
            for launch in launches if instead is None else [next(launches)]:
                self._put(launch, instead, streams[turn.lane], late)
                late = False
            fork.tell(step, turn)
        fork.join()

    def _shared(self) -> list[frozenset[int]]:
        """For each storage those with memory in common with it."""
        frame = self._frame
        sizes = [evaluate(storage.bytes, frame.symbols) for storage in frame.plan.storages]
        return lanes.sharing([(int(p), int(p) + n) for p, n in zip(frame.pointers, sizes, strict=True)])

    def _put(
        self, launch: Launch, instead: library.Replacement | None = None, lane: Any = None, late: bool = False
    ) -> None:
        """On the frame's stream, or on a lane's. late: it may not begin before all before it has ended."""
        frame, stream = self._frame, self._frame.stream if lane is None else lane
        if instead is not None:
            library.put(instead, frame.pointers, stream)
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
        frame.loaded.kernels.launch(launch.entry, grid, arguments, stream, late)

    def _exchange(self, segment: CollectiveSegment) -> None:
        frame, values = self._frame, self._frame.plan.values
        ranks, step = frame.executor.ranks, segment.step
        (source,), (target,) = step.inputs, step.outputs
        assert ranks is not None and source is not None
        addresses = int(frame.pointers[values[source].storage]), int(frame.pointers[values[target].storage])
        count = frame.elements(values[source])
        ranks.put(segment.operation, addresses, count, values[source].dtype, frame.stream)
        if frame.executor.synchronous:
            frame.wait(f"step {step.name!r} ({segment.operation})")


class _Fork:
    """The streams of a capture while they go side by side: events of steps, in graphs only edges."""

    def __init__(self, context: cuda.Context, streams: Sequence[Any], made: list[Any]) -> None:
        self._context, self._streams, self._made = context, streams, made
        self._events: dict[int, Any] = {}
        self._last: dict[int, int] = {}  # step of each lane that was begun
        self._begin = self._record(streams[0])

    def _record(self, stream: Any) -> Any:
        self._made.append(self._context.event())
        self._context.call("cuEventRecord", self._made[-1], stream)
        return self._made[-1]

    def wait(self, turn: lanes.Turn) -> bool:
        """What comes next in the lane waits for what the turn names; whether there is anything."""
        stream = self._streams[turn.lane]
        events = [self._events[step] for step in turn.waits]
        if turn.lane and turn.lane not in self._last and not events:
            events = [self._begin]
        for event in events:
            self._context.call("cuStreamWaitEvent", stream, event, 0)
        return bool(events)

    def tell(self, step: int, turn: lanes.Turn) -> None:
        """The step is on its lane: others may wait for it."""
        self._events[step] = self._record(self._streams[turn.lane])
        self._last[turn.lane] = step

    def join(self) -> None:
        """All lanes end in the first one."""
        for lane, step in self._last.items():
            if lane:
                self._context.call("cuStreamWaitEvent", self._streams[0], self._events[step], 0)


def _destroy(context: cuda.Context, streams: Sequence[Any], events: list[Any]) -> None:
    """Give streams and events back; the list of events is empty then."""
    if not context.fault:
        context.activate()
        for stream in streams:
            context.driver.raw("cuStreamDestroy")(stream)
        for event in events:
            context.driver.raw("cuEventDestroy")(event)
    events.clear()

"""Running a plan: frames bind one arena to one set of shapes, so that a repeated run only sets its input pointers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import DeviceError, InputError
from ingot.plan.extent import evaluate, symbols_of
from ingot.plan.packing import Interval, pack
from ingot.plan.plan import (
    CollectiveSegment,
    ControlSegment,
    GraphSegment,
    HostSegment,
    MemoryPlan,
    NativeSegment,
    Plan,
    Segment,
    Storage,
    Value,
    steps_of,
)
from ingot.runtime import control, host
from ingot.runtime.buffers import Array, address_of, aligned_bytes
from ingot.runtime.cpu import NativeCode, Teams, zeros
from ingot.runtime.group import Group

Shapes = tuple[tuple[int, ...], ...]
Bindings = tuple[tuple[str, int], ...]
Action = Callable[["Frame"], None]
Carried = tuple[int, int, Array]  # position of an input, that of an output of the run before, [C, 2] places in the two
_FRAMES_KEPT = 16
_WORTH_A_TEAM = 40.0  # microseconds of one core's work, below which other threads are left asleep
_BYTES_PER_MICROSECOND, _FLOPS_PER_MICROSECOND = 10_000.0, 100_000.0


class Executor:
    """A plan made ready: native entry points, host functions and nested executors resolved once; safe from many
    threads."""

    def __init__(self, plan: Plan, code: NativeCode | None, weights: Array, team: Teams | None,
                 group: Group | None = None) -> None:  # fmt: skip
        self.plan, self.code, self.weights, self.team, self.group = plan, code, weights, team, group
        self._free: dict[tuple[Shapes, Bindings], list[Frame]] = {}
        self._lock = threading.Lock()
        self.symbol_sources = _symbol_sources(plan)
        self.outer_symbols = _outer_symbols(plan, {symbol for _, _, symbol in self.symbol_sources})
        self.actions = [self._prepare(segment) for segment in plan.segments]

    def run(self, inputs: Sequence[Any], outer: Mapping[str, int]) -> list[Any]:
        """Outputs of a nested plan, in order; `outer` binds the symbols of the plan around it."""
        shapes = tuple(x.shape if isinstance(x, np.ndarray) else () for x in inputs)
        frame = self.take(shapes, tuple((s, outer[s]) for s in self.outer_symbols if s in outer))
        try:
            return frame.run(inputs, None)
        finally:
            self.give(frame)

    def take(self, shapes: Shapes, outer: Bindings = ()) -> Frame:
        """A frame nobody else uses."""
        with self._lock:
            free = self._free.get((shapes, outer))
            if free:
                return free.pop()
        return self._frame(shapes, outer)

    def give(self, frame: Frame) -> None:
        """Return a frame; shapes not seen lately are forgotten."""
        with self._lock:
            free = self._free.pop(frame.key, [])
            self._free[frame.key] = [*free, frame]
            late = list(self._free)[: max(len(self._free) - _FRAMES_KEPT, 0)]
            forgotten = [frame for key in late for frame in self._free.pop(key)]
        for frame in forgotten:
            frame.forget()

    def forget(self) -> None:
        """All frames that nobody uses."""
        with self._lock:
            forgotten = [frame for frames in self._free.values() for frame in frames]
            self._free.clear()
        for frame in forgotten:
            frame.forget()

    @property
    def context(self) -> Any:
        """The GPU's context; only an executor on one has it."""
        raise DeviceError("the session computes on no GPU; this is a bug in Ingot")

    def keep(self, addresses: Mapping[int, int]) -> None:
        """Inputs that stay on a GPU; only an executor on one has them."""
        raise DeviceError("inputs are kept by sessions on a GPU; this is a bug in Ingot")

    def close(self) -> None:
        """Leave what a session shares with others; idempotent."""

    def _frame(self, shapes: Shapes, outer: Bindings) -> Frame:
        return Frame(self, shapes, outer)

    def _nested(self, plan: Plan) -> Executor:
        return Executor(plan, self.code, self.weights, self.team, self.group)

    @property
    def goes_on(self) -> bool:
        """Whether a run goes on by itself once it is begun: nothing of it is the host's, nor ranks' sums through its
        memory."""
        return all(map(self._on_stream, self.plan.segments))

    def _on_stream(self, segment: Segment) -> bool:
        """Whether the device goes from the segment before to this one by itself."""
        return False

    @property
    def arena_bytes(self) -> int:
        """Bytes of arenas held at the moment."""
        with self._lock:
            return sum(frame.arena.size for frames in self._free.values() for frame in frames)

    def _prepare(self, segment: Segment) -> Callable[[Frame], None]:
        if isinstance(segment, NativeSegment):
            return self._native(segment)
        if isinstance(segment, HostSegment):
            function = host.prepare(segment)
            return lambda frame: frame.set_results(
                segment.step.outputs, function(frame.arguments(segment.step.inputs), frame.symbols)
            )
        if isinstance(segment, CollectiveSegment):
            return self._collective(segment)
        if isinstance(segment, GraphSegment):
            raise DeviceError("the plan is for a GPU, this is no session on one; this is a bug in Ingot")
        nested = [self._nested(plan) for plan in segment.plans]
        return lambda frame: _run_control(frame, segment, nested)

    def _collective(self, segment: CollectiveSegment) -> Callable[[Frame], None]:
        if self.group is None:
            raise DeviceError("the engine is one rank of several: open all of them together, as `ingot llm` does")
        (source,), exchange = segment.step.inputs, getattr(self.group, segment.operation)
        return lambda frame: frame.set_results(segment.step.outputs, [exchange(*frame.arguments((source,)))])

    def _native(self, segment: NativeSegment) -> Callable[[Frame], None]:
        if self.code is None or self.team is None:
            raise DeviceError("the plan has native code but the engine's variant holds none; rebuild the engine")
        entry, team, scratch = self.code.address(segment.symbol), self.team, self.plan.scratch
        number = self.plan.segments.index(segment)

        def run(frame: Frame) -> None:
            team.run(
                entry, frame.pointer_table, frame.extent_table, frame.scratch_address, scratch, frame.shared[number],
                frame.stamps,
            )  # fmt: skip

        return run


def _run_control(frame: Frame, segment: ControlSegment, nested: Sequence[Executor]) -> None:
    captures = [frame.arguments(c) for c in segment.captures]
    bodies = [
        lambda *own, e=executor, c=captured: e.run([*own, *c], frame.symbols)
        for executor, captured in zip(nested, captures, strict=True)
    ]
    arguments = frame.arguments(segment.step.inputs)
    frame.set_results(segment.step.outputs, control.run(segment, arguments, bodies))


def _symbol_sources(plan: Plan) -> list[tuple[int, int, str]]:
    """(input, axis, symbol) triples that bind the symbols, each taken once."""
    sources: dict[str, tuple[int, int, str]] = {}
    for position, index in enumerate(plan.inputs):
        for axis, extent in enumerate(plan.values[index].shape):
            if isinstance(extent, str) and extent.isidentifier():
                sources.setdefault(extent, (position, axis, extent))
    return list(sources.values())


def _outer_symbols(plan: Plan, own: set[str]) -> tuple[str, ...]:
    """Symbols a nested plan uses that neither its inputs nor its own host steps bind."""
    extents = [*plan.extents, *(s.bytes for s in plan.storages), *(d for v in plan.values for d in v.shape)]
    extents += [e for s in plan.segments for t in steps_of(s) for e in (t.bytes, t.flops)]
    used = {symbol for extent in extents for symbol in symbols_of(extent)}
    for segment in plan.segments:
        for inner in segment.plans if isinstance(segment, ControlSegment) else ():
            used.update(_outer_symbols(inner, {symbol for _, _, symbol in _symbol_sources(inner)}))
    return tuple(sorted(used - own - set(plan.derived)))


class Frame:
    """One arena, pointer table and extent table for one set of input shapes; used by one run at a time."""

    def __init__(self, executor: Executor, shapes: Shapes, outer: Bindings = ()) -> None:
        plan = executor.plan
        self.executor, self.plan, self.key = executor, plan, (shapes, outer)
        self.symbols = dict(outer) | {
            symbol: shapes[position][axis]
            for position, axis, symbol in executor.symbol_sources
            if axis < len(shapes[position])
        }
        self.pointers, self.extents = zeros(len(plan.storages), "uint64"), zeros(len(plan.extents), "int64")
        self.pointer_table, self.extent_table = address_of(self.pointers), address_of(self.extents)
        self.stamps = 0
        self.shared = [self._shared_phases(segment) for segment in plan.segments]
        self._objects: dict[int, Any] = {}
        self._views: dict[int, Array] = {}
        self._late = [i for i, s in enumerate(plan.storages) if _depends(s.bytes, plan.derived)]
        self._check_demands()
        self._place_weights()
        self._place_arena()
        self._fill_extents()
        self._results = [self._result_site(index, plan.outputs[:i]) for i, index in enumerate(plan.outputs)]
        self._input_storages = [plan.values[index].storage for index in plan.inputs]
        native = all(isinstance(segment, NativeSegment) for segment in plan.segments)
        self._direct = native and all(dtype is not None for _, _, dtype in self._results)  # nobody asks for arguments

    # -- one run --------------------------------------------------------------------------------------------------
    def run(
        self, inputs: Sequence[Any], outputs: Mapping[int, Array] | None, actions: Sequence[Action] | None = None
    ) -> list[Any]:
        """Bind inputs and outputs, execute every segment (or `actions` in their place), hand out the results."""
        for storage, x in zip(self._input_storages, inputs, strict=True):
            if type(x) is np.ndarray:
                self.pointers[storage] = address_of(x)
        results = [None if site[2] is None else self._result(i, site, outputs) for i, site in enumerate(self._results)]
        if not self._direct:
            given = {site[0]: y for site, y in zip(self._results, results, strict=True) if y is not None}
            self._objects = dict(zip(self.plan.inputs, inputs, strict=True)) | given
        for action in actions or self.executor.actions:
            action(self)
        if not self._direct:
            self._collect(results, outputs or {})
            self._objects = {}
        return results

    def _result(
        self, position: int, site: tuple[int, tuple[int, ...], Any], outputs: Mapping[int, Array] | None
    ) -> Array:
        """The buffer of an output, the user's or a new one, made known to native code."""
        index, shape, dtype = site
        value = self.plan.values[index]
        y = outputs.get(position) if outputs else None
        if y is None:
            y = np.empty(shape, dtype)
        elif y.shape != shape:
            raise InputError(
                f"the buffer for output {value.name!r} has shape {list(y.shape)}, this run gives {list(shape)}"
            )
        self.pointers[value.storage] = address_of(y)
        return y

    def _collect(self, results: list[Any], outputs: Mapping[int, Array]) -> None:
        """Outputs that live elsewhere (an input, a weight, a host object) are copied out."""
        for position, y in enumerate(results):
            if y is None:
                found = self.argument(self.plan.outputs[position])
                if position in outputs:
                    np.copyto(outputs[position], found)
                    found = outputs[position]
                results[position] = found.copy() if isinstance(found, np.ndarray) and position not in outputs else found

    # -- values for host steps ------------------------------------------------------------------------------------
    def arguments(self, indices: Sequence[int | None]) -> list[Any]:
        """Values as numpy arrays (or sequences); None where absent."""
        return [None if index is None else self.argument(index) for index in indices]

    def argument(self, index: int) -> Any:
        """One value: the user's array, a host object, or a view of arena or weights."""
        if index in self._objects:
            return self._objects[index]
        value = self.plan.values[index]
        storage = self.plan.storages[value.storage]
        if storage.place in ("input", "output", "host"):
            return self._reshaped(value, next(i for i in self._objects if self._shares(i, value)))
        if index not in self._views or value.storage in self._late:
            self._views[index] = self._view(value, storage)
        return self._views[index]

    def _shares(self, index: int, value: Value) -> bool:
        return self.plan.values[index].storage == value.storage

    def _reshaped(self, value: Value, owner: int) -> Any:
        held = self._objects[owner]
        if not isinstance(held, np.ndarray):
            return held
        if held.ndim == len(value.shape):
            self._bind(value, held)  # a view may have names of its own for extents that depend on the data
        return held.reshape([evaluate(d, self.symbols) for d in value.shape])

    def _view(self, value: Value, storage: Storage) -> Array:
        dtype = numpy_dtype(value.dtype)
        shape = [evaluate(d, self.symbols) for d in value.shape]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = self.executor.weights[storage.offset :] if storage.place == "weight" else self._memory[value.storage]
        view: Array = memory[:size].view(dtype).reshape(shape)
        if storage.place == "weight":
            view.flags.writeable = False
        return view

    def set_results(self, indices: Sequence[int], results: Sequence[Any]) -> None:
        """Store what a host or control step computed; binds data-dependent symbols from the shapes found."""
        for index, result in zip(indices, results, strict=False):
            value = self.plan.values[index]
            place = self.plan.storages[value.storage].place
            if isinstance(result, np.ndarray) or np.isscalar(result):
                result = np.asarray(result)
                self._bind(value, result)
            if place == "host" or not isinstance(result, np.ndarray):
                result = np.ascontiguousarray(result).reshape(result.shape) if _is_array(result) else result
                self._objects[index] = result
                if _is_array(result):
                    self.pointers[value.storage] = address_of(result)
            else:
                target = self.argument(index)
                np.copyto(target, result.reshape(target.shape), casting="same_kind")

    def _bind(self, value: Value, found: Array) -> None:
        new = {
            symbol: extent
            for symbol, extent in zip(value.shape, found.shape, strict=False)
            if isinstance(symbol, str) and symbol in self.plan.derived and self.symbols.get(symbol) != extent
        }
        if new:
            self.symbols.update(new)
            self._check_demands()
            self._views = {i: v for i, v in self._views.items() if self.plan.values[i].storage not in self._late}
            self._fill_extents()
            self._place_late()

    def _shared_phases(self, segment: Segment) -> int:
        """Phases to share among the team; 0 where waking it would cost more than it saves at these sizes."""
        if not isinstance(segment, NativeSegment):
            return 0
        extents = [e for step in segment.steps for e in (step.bytes, step.flops)]
        if any(not symbols_of(e) <= self.symbols.keys() for e in extents):
            return segment.phases
        sizes = [evaluate(e, self.symbols) for e in extents]
        alone = sum(sizes[::2]) / _BYTES_PER_MICROSECOND + sum(sizes[1::2]) / _FLOPS_PER_MICROSECOND
        return segment.phases if alone > _WORTH_A_TEAM else 0

    def forget(self) -> None:
        """Give back what the garbage collector would find late; it runs no more."""

    def step_times(self, segment: GraphSegment, repeats: int = 1) -> list[float]:
        """Microseconds of each step of a graph; only a frame on a GPU has graphs."""
        raise DeviceError("the plan is for a GPU, this is no session on one; this is a bug in Ingot")

    def begin(self, inputs: Sequence[Any], positions: Sequence[int], after: Frame | None = None,
              carried: Sequence[Carried] = ()) -> Callable[[], list[Any]]:  # fmt: skip
        """A run whose outputs at these positions are asked for: what computes it when it is called."""
        if carried:
            raise InputError("inputs are carried over from one run to the next on a GPU alone; this is a bug in Ingot")

        def result() -> list[Any]:
            results = self.run(inputs, None)
            return [results[position] for position in positions]

        return result

    def run_on_device(self, inputs: Sequence[Any]) -> list[Any]:
        """Results that stay on a GPU; only a frame on one has them."""
        raise DeviceError("results stay on a device in a session on one; this is a bug in Ingot")

    def _check_demands(self) -> None:
        """InputError where sizes contradict what a node was compiled for, as far as they are known by now."""
        for demand in self.plan.demands:
            if not (symbols_of(demand.left) | symbols_of(demand.right)) <= self.symbols.keys():
                continue
            left, right = (evaluate(extent, self.symbols) for extent in (demand.left, demand.right))
            if left != right:
                raise InputError(
                    f"node {demand.node} needs {demand.left} and {demand.right} to be equal, these inputs make them "
                    f"{left} and {right}; give inputs that fit (an axis is broadcast where the model says that it is 1)"
                )

    # -- placing --------------------------------------------------------------------------------------------------
    def _place_weights(self) -> None:
        base = address_of(self.executor.weights)
        for index, storage in enumerate(self.plan.storages):
            if storage.place == "weight":
                self.pointers[index] = base + storage.offset

    def _place_arena(self) -> None:
        plan = self.plan
        offsets, size = self._offsets()
        self._late_owned: dict[int, Array] = {}
        team = self.executor.team.size if self.executor.team else 1
        self.arena = aligned_bytes(size + plan.scratch * team)
        base = address_of(self.arena)
        self._memory: dict[int, Array] = {}
        for index, offset in offsets.items():
            self.pointers[index] = base + offset
            self._memory[index] = self.arena[offset:]
        self.scratch_address = base + size

    def _offsets(self) -> tuple[dict[int, int], int]:
        plan = self.plan
        fixed = [i for i, s in enumerate(plan.storages) if s.place == "arena" and i not in set(self._late)]
        for memory in plan.memory:
            if self._fits(memory):
                return {i: offset for i in fixed if (offset := memory.offsets[i]) is not None}, memory.bytes
        sizes = [evaluate(plan.storages[i].bytes, self.symbols) for i in fixed]
        intervals = [
            Interval(size, plan.storages[i].first, plan.storages[i].last) for i, size in zip(fixed, sizes, strict=True)
        ]
        offsets, total = pack(intervals)
        return dict(zip(fixed, offsets, strict=True)), total

    def _fits(self, memory: MemoryPlan) -> bool:
        return all(symbol in memory.bounds and n <= memory.bounds[symbol] for symbol, n in self.symbols.items())

    def _place_late(self) -> None:
        """Buffers whose size a host step has just made known."""
        for index in self._late:
            storage = self.plan.storages[index]
            if storage.place != "arena" or not symbols_of(storage.bytes) <= self.symbols.keys():
                continue
            size = evaluate(storage.bytes, self.symbols)
            held = self._late_owned.get(index)
            if held is None or held.size < size:
                self._late_owned[index] = self._memory[index] = aligned_bytes(size, 64)
                self.pointers[index] = address_of(self._memory[index])

    def _fill_extents(self) -> None:
        for index, extent in enumerate(self.plan.extents):
            if symbols_of(extent) <= self.symbols.keys():
                self.extents[index] = evaluate(extent, self.symbols)

    def _result_site(self, index: int, earlier: Sequence[int]) -> tuple[int, tuple[int, ...], Any]:
        """(value, shape, dtype) of an output to allocate before the run; dtype None when it is found only
        afterwards."""
        value = self.plan.values[index]
        storage = self.plan.storages[value.storage]
        known = all(symbols_of(d) <= self.symbols.keys() - set(self.plan.derived) for d in value.shape)
        shared = any(self._shares(other, value) for other in earlier)
        if storage.place != "output" or not known or shared:
            return index, (), None
        return index, tuple(evaluate(d, self.symbols) for d in value.shape), numpy_dtype(value.dtype)


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def _depends(extent: int | str, derived: Sequence[str]) -> bool:
    return bool(derived) and not symbols_of(extent).isdisjoint(derived)

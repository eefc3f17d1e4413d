"""Running a plan on a GPU: a frame holds one arena, one stream and, per graph segment, one captured graph."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.engine import Variant
from ingot.errors import DeviceError, InputError
from ingot.plan.extent import evaluate, symbols_of
from ingot.plan.packing import align
from ingot.plan.plan import CollectiveSegment, GraphSegment, Plan, Segment, Value
from ingot.runtime import cubins, cuda, dlpack, nccl, nvtx, succession
from ingot.runtime.buffers import Array
from ingot.runtime.cuda_launches import Launches
from ingot.runtime.executor import Action, Bindings, Carried, Executor, Frame, Shapes
from ingot.runtime.group import Group

_DEVICE_ALIGNMENT = 256
_MOST_ELEMENTS, _GRAPHS_KEPT = 2**31, 16  # kernels count in 32 bits; graphs of a frame for tensors of others
Addresses = tuple[tuple[int, int], ...]  # (storage, address) of what is used in the place of the frame's own


@dataclass(frozen=True, eq=False)
class Loaded:
    """A variant on one device, shared by all its sessions there: kernels, and the weights uploaded once."""

    context: cuda.Context
    kernels: cuda.Kernels
    weights: Array
    on_device: cuda.Allocation


_LOADED: weakref.WeakKeyDictionary[Variant, dict[int, Loaded]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def load(variant: Variant, device: cuda.Device, weights: Array) -> Loaded:
    """The variant on the device; its weights are copied there the first time."""
    with _LOCK:
        places = _LOADED.setdefault(variant, {})
        if device.ordinal not in places:
            context = cuda.context_of(device)
            memory = context.allocate(weights.nbytes, "the engine's weights")
            context.call("cuMemcpyHtoD", memory.address, weights.ctypes.data, max(weights.nbytes, 1))
            kernels = cuda.Kernels(context, cubins.unpack(variant.code))
            places[device.ordinal] = Loaded(context, kernels, weights, memory)
        return places[device.ordinal]


def adopt(variant: Variant, device: cuda.Device, memory: cuda.Allocation) -> None:
    """The variant's weights lie there already: made on the device, or brought there by somebody else."""
    context = cuda.context_of(device)
    kernels = cuda.Kernels(context, cubins.unpack(variant.code))
    with _LOCK:
        places = _LOADED.setdefault(variant, {})
        places[device.ordinal] = Loaded(context, kernels, np.zeros(0, np.uint8), memory)


class CudaExecutor(Executor):
    """A plan on a GPU; host steps between its graphs read and write copies."""

    def __init__(self, plan: Plan, loaded: Loaded, group: Group | None = None) -> None:
        self.loaded = loaded
        self.marks = nvtx.Marks()
        self.synchronous = os.environ.get("INGOT_CUDA_SYNC") == "1"  # each step is waited for, and named if it fails
        self.eager = bool(plan.derived) or self.synchronous or self.marks.wanted
        self.resident: dict[int, int] = {}  # storage -> address
        exchanging = group is not None and any(isinstance(s, CollectiveSegment) for s in plan.segments)
        self.ranks = nccl.connect(loaded.context, group) if group is not None and exchanging else None
        super().__init__(plan, None, loaded.weights, None, group)
        self.together = self._together()

    @property
    def context(self) -> cuda.Context:
        """The GPU's context."""
        return self.loaded.context

    def keep(self, addresses: Mapping[int, int]) -> None:
        """Inputs (by position) that lie on the device from now on: every run reads and writes them where they are."""
        self.resident |= {self.plan.values[self.plan.inputs[k]].storage: a for k, a in addresses.items()}
        self.forget()

    def _frame(self, shapes: Shapes, outer: Bindings) -> CudaFrame:
        try:
            return CudaFrame(self, shapes, outer)
        except DeviceError:
            if self.context.fault or not self.arena_bytes:
                raise
        self.forget()  # memory is short: what waits for shapes to come again goes first
        return CudaFrame(self, shapes, outer)

    def _nested(self, plan: Plan) -> Executor:
        return CudaExecutor(plan, self.loaded, self.group)

    def _prepare(self, segment: Segment) -> Action:
        if not self._on_stream(segment):
            return super()._prepare(segment)
        return partial(_launch, [self.plan.segments.index(segment)])

    def _on_stream(self, segment: Segment) -> bool:
        return isinstance(segment, GraphSegment) or (self.ranks is not None and isinstance(segment, CollectiveSegment))

    def _together(self) -> list[Action]:
        """The plan's actions, segments on the stream that follow each other as one."""
        found: list[Action] = []
        for joined, group in groupby(enumerate(self.plan.segments), lambda pair: self._on_stream(pair[1])):
            numbers = [number for number, _ in group]
            found += [partial(_launch, numbers)] if joined else [self.actions[number] for number in numbers]
        return found

    def close(self) -> None:
        """Leave the other ranks, whose sums are in graphs; idempotent."""
        if self.ranks is not None:
            with self._lock:
                for frame in (frame for frames in self._free.values() for frame in frames):
                    _cuda(frame).forget_graphs(every=True)
            self.ranks.close()

    @property
    def arena_bytes(self) -> int:
        """Bytes of device memory held for runs at the moment."""
        with self._lock:
            return sum(_cuda(frame).memory.size for frames in self._free.values() for frame in frames)


def _cuda(frame: Frame) -> CudaFrame:
    assert isinstance(frame, CudaFrame)
    return frame


def _launch(numbers: Sequence[int], frame: Frame) -> None:
    _cuda(frame).launch(*numbers)


class CudaFrame(Frame):
    """Device memory for one set of shapes: arena, inputs and outputs in one block, pinned copies of the latter two."""

    executor: CudaExecutor

    def __init__(self, executor: CudaExecutor, shapes: Shapes, outer: Bindings = ()) -> None:
        self.loaded, self.context = executor.loaded, executor.loaded.context
        self.context.activate()
        self.stream, self.ended = self.context.stream(), self.context.event()
        self._graphs: OrderedDict[tuple[tuple[int, ...], Addresses], Any] = OrderedDict()
        self._launches = Launches(self)
        self._recent: OrderedDict[Addresses, None] = OrderedDict()
        self._late_device: dict[int, cuda.Allocation] = {}
        self._addresses: Addresses = ()
        super().__init__(executor, shapes, outer)
        self._destroyed = weakref.finalize(self, _destroy, self.context, self.stream, self.ended, self._graphs)

    # -- placing --
    def _place_weights(self) -> None:
        for index, storage in enumerate(self.plan.storages):
            if storage.place == "weight":
                self.pointers[index] = self.loaded.on_device.address + storage.offset

    def _place_arena(self) -> None:
        """One block: the arena, then inputs and outputs. Refused before it is taken when it does not fit."""
        self._check_sizes()
        offsets, end = self._offsets()
        executor = self.executor
        self._late_owned, self._memory = {}, {}
        for index, storage in enumerate(self.plan.storages):
            if index in executor.resident:
                self.pointers[index] = executor.resident[index]
            elif storage.place in ("input", "output") and index not in self._late:
                end = align(end, _DEVICE_ALIGNMENT)
                offsets[index] = end
                end += evaluate(storage.bytes, self.symbols)
        self.memory = self.context.allocate(end, f"a run at {dict(self.symbols) or 'these shapes'}")
        self.context.clear(self.memory, self.stream)
        for index, offset in offsets.items():
            self.pointers[index] = self.memory.address + offset
        self._own_places = {i: int(self.pointers[i]) for i in offsets if self.plan.storages[i].place != "arena"}
        self._fixed = {i: tuple(self._shape(self.plan.values[i])) for i in (*self.plan.inputs, *self.plan.outputs)
                       if self._known(self.plan.values[i])}  # fmt: skip
        self._borrowed: dict[int, dlpack.View] = {}
        self.scratch_address = 0
        self._staging = self._staged_values()

    def _check_sizes(self) -> None:
        for value in self.plan.values:
            if value.storage in self.executor.resident:
                continue  # of keys and values there may be more: their kernels count blocks of them
            known = all(symbols_of(d) <= self.symbols.keys() for d in value.shape)
            if known and np.prod([evaluate(d, self.symbols) for d in value.shape], dtype=object) >= _MOST_ELEMENTS:
                raise InputError(f"{value.name!r} has 2^31 elements or more at these shapes; give smaller ones")

    def _staged_values(self) -> dict[int, Array]:
        """Pinned arrays for inputs on the device of known size; those of outputs are made when they are asked for."""
        inputs = [i for i in self.plan.inputs if self._staged_at_all(i)]
        sizes = [align(self._extent_bytes(self.plan.values[i]), 64) for i in inputs]
        block = self.context.pinned(sum(sizes))
        starts = np.cumsum([0, *sizes])
        return {i: self._shaped(block[start:], self.plan.values[i]) for i, start in zip(inputs, starts, strict=False)}

    def _staged_at_all(self, index: int) -> bool:
        value = self.plan.values[index]
        return index in self._fixed and self._on_device(value) and value.storage not in self.executor.resident

    def _staged_output(self, index: int) -> Array:
        """Where an output's bytes come to."""
        value = self.plan.values[index]
        if index not in self._staging and self._staged_at_all(index):
            self._staging[index] = self._shaped(self.context.pinned(self._extent_bytes(value)), value)
        return self._staging[index] if index in self._staging else np.empty(self._shape(value), value.dtype)

    def _on_device(self, value: Value) -> bool:
        return self.plan.storages[value.storage].place != "host"

    def _known(self, value: Value) -> bool:
        return all(symbols_of(d) <= self.symbols.keys() - set(self.plan.derived) for d in value.shape)

    def _shape(self, value: Value) -> list[int]:
        return [evaluate(d, self.symbols) for d in value.shape]

    def elements(self, value: Value) -> int:
        """How many the value has at these sizes."""
        return int(np.prod(self._shape(value), dtype=np.int64))

    def _extent_bytes(self, value: Value) -> int:
        return self.elements(value) * numpy_dtype(value.dtype).itemsize

    def _shaped(self, memory: Array, value: Value) -> Array:
        return memory[: self._extent_bytes(value)].view(numpy_dtype(value.dtype)).reshape(self._shape(value))

    def _place_late(self) -> None:
        for index in self._late:
            storage = self.plan.storages[index]
            if storage.place == "arena" and symbols_of(storage.bytes) <= self.symbols.keys():
                self._own(index, evaluate(storage.bytes, self.symbols))

    def _own(self, index: int, size: int) -> int:
        """A buffer of its own for a storage whose size only a run tells; it grows as needed."""
        held = self._late_device.get(index)
        if held is None or held.size < size:
            self._late_device[index] = held = self.context.allocate(size, "a result whose size the data decide")
            self.context.clear(held, self.stream)
            self.pointers[index] = held.address
        return held.address

    # -- one run --
    def run(
        self, inputs: Sequence[Any], outputs: Mapping[int, Any] | None, actions: Sequence[Action] | None = None
    ) -> list[Any]:
        """Inputs to the device, every segment (or `actions`), results back. Tensors on the device are used as they lie
        from the second run with the same addresses on, and copied within the device in the first."""
        targets = outputs or {}
        self._execute(inputs, targets, actions)
        return self._finish([(p, self._ask(p, targets.get(p))) for p in range(len(self.plan.outputs))], targets)

    def begin(self, inputs: Sequence[Any], positions: Sequence[int], after: Frame | None = None,
              carried: Sequence[Carried] = ()) -> Callable[[], list[Any]]:  # fmt: skip
        """Put a run on the stream whose outputs at these positions are asked for: what waits for it when it is called.
        after: the frame of a run that ends before it begins; `carried` elements are taken from that one's outputs."""
        follow = partial(succession.follow, self, _cuda(after), carried) if after is not None else None
        self._execute(inputs, {}, None, follow)
        self.context.call("cuEventRecord", self.ended, self.stream)
        return partial(self._finish, [(position, self._ask(position, None)) for position in positions], {})

    def _finish(self, waiting: Sequence[tuple[int, Any]], targets: Mapping[int, Any]) -> list[Any]:
        """Results by position, once their bytes are there."""
        self.wait("the run")
        results = [self._result_into(position, found, targets.get(position)) for position, found in waiting]
        self._objects, self._borrowed = {}, {}
        return results

    def run_on_device(self, inputs: Sequence[Any]) -> list[Any]:
        """The same, with results that stay on the device: a DeviceArray each (objects stay what they are)."""
        self._execute(inputs, {}, None)
        results = [self._kept(index) for index in self.plan.outputs]
        self.wait("the run")
        self._objects, self._borrowed = {}, {}
        return results

    def _execute(self, inputs: Sequence[Any], targets: Mapping[int, Any], actions: Sequence[Action] | None,
                 between: Callable[[], None] | None = None) -> None:  # fmt: skip
        """`between` is done when the inputs are on their way."""
        self.context.activate()
        self._objects = {}
        with self.executor.marks.range("run"):
            self._borrow(inputs, targets)
            for index, x in zip(self.plan.inputs, inputs, strict=True):
                self._take_input(index, x)
            if between is not None:
                between()
            for action in actions or self.executor.together:
                action(self)

    def _borrow(self, inputs: Sequence[Any], targets: Mapping[int, Any]) -> None:
        """Whose memory is used in the place of the frame's own."""
        found = [*zip(self.plan.inputs, inputs, strict=True), *((self.plan.outputs[p], y) for p, y in targets.items())]
        lent = [(index, x) for index, x in found if type(x) is dlpack.Foreign and x.source is not None]
        if not lent and not self._addresses:
            return
        views = self._borrowed = {index: self._view_of(index, x) for index, x in lent}
        mine = {self.plan.values[index].storage: view for index, view in views.items()}
        replaced = {s: view.address for s, view in mine.items() if s in self._own_places and view.address % 16 == 0}
        addresses = tuple(sorted(replaced.items()))
        if addresses and not self._seen_before(addresses):
            addresses = ()
        if addresses != self._addresses:
            self.pointers[list(self._own_places)] = list(self._own_places.values())
            for storage, address in addresses:
                self.pointers[storage] = address
            self._addresses = addresses

    def _seen_before(self, addresses: Addresses) -> bool:
        known = addresses in self._recent
        self._recent[addresses] = None
        self._recent.move_to_end(addresses)
        if len(self._recent) > _GRAPHS_KEPT:
            self._recent.popitem(last=False)
        return known

    def _view_of(self, index: int, x: dlpack.Foreign) -> dlpack.View:
        """The user's tensor, checked; InputError names what does not fit."""
        value = self.plan.values[index]
        if x.device != self.context.device.ordinal:
            raise InputError(f"{value.name!r} is on cuda:{x.device}, the session on {self.context.device}; move one")
        view = dlpack.view(x, int(self.stream), value.name)
        if view.dtype != value.dtype:
            raise InputError(f"{value.name!r} is {view.dtype}, the model has {value.dtype}; convert it first")
        dlpack.check_shape(value.name, view, self._fixed.get(index, view.shape))
        return view

    def _take_input(self, index: int, x: Any) -> None:
        storage = self.plan.values[index].storage
        if index in self._borrowed:
            view = self._borrowed[index]
            if int(self.pointers[storage]) != view.address:
                self._copy(int(self.pointers[storage]), view.address, self._extent_bytes(self.plan.values[index]))
            return
        staged = self._staging.get(index)
        if storage in self.executor.resident:
            return
        if staged is None or not isinstance(x, np.ndarray):
            self._objects[index] = x
            return
        np.copyto(staged, x.reshape(staged.shape))
        self.context.upload(int(self.pointers[storage]), staged, self.stream)

    def _copy(self, target: int, source: int, size: int) -> None:
        """Within the device."""
        if size:
            self.context.call("cuMemcpyDtoDAsync", target, source, size, self.stream)

    def _kept(self, index: int) -> Any:
        """An output in memory of its own."""
        value = self.plan.values[index]
        if index in self._objects or not self._on_device(value):
            return self.argument(index)
        size = self._extent_bytes(value)
        memory = self.context.allocate(size, f"output {value.name!r}")
        self._copy(memory.address, int(self.pointers[value.storage]), size)
        view = dlpack.View(memory.address, tuple(self._shape(value)), value.dtype, memory)
        return dlpack.DeviceArray(view, self.context.device.ordinal, lambda view: _fetch(self.context, view))

    def _result_into(self, position: int, found: Any, target: Any) -> Any:
        if isinstance(target, dlpack.Foreign):
            return target.source
        if target is not None and target.shape != np.shape(found):
            name = self.plan.values[self.plan.outputs[position]].name
            raise InputError(f"the buffer for output {name!r} has shape {list(target.shape)}, this run gives "
                             f"{list(np.shape(found))}")  # fmt: skip
        if target is not None:
            np.copyto(target, found)
        return target if target is not None else np.copy(found) if isinstance(found, np.ndarray) else found

    def _ask(self, position: int, target: Any) -> Any:
        """The output's place in host memory; its bytes are there when the stream is done. One that is wanted on the
        device is copied there, unless that is where it was made."""
        index = self.plan.outputs[position]
        if isinstance(target, dlpack.Foreign):
            self._put_into(index, self._borrowed[index])
            return None
        if index in self._objects or not self._on_device(self.plan.values[index]):
            return self.argument(index)
        value = self.plan.values[index]
        target = self._staged_output(index)
        self.context.download(target, int(self.pointers[value.storage]), self.stream)
        return target

    def _put_into(self, index: int, view: dlpack.View) -> None:
        value = self.plan.values[index]
        if index not in self._fixed:
            dlpack.check_shape(value.name, view, tuple(self._shape(value)))
        if index in self._objects or not self._on_device(value):
            held = np.ascontiguousarray(self.argument(index))
            self.context.upload(view.address, held, self.stream)
            self.wait(f"the copy of {value.name!r} to the device")  # the array may be gone after this
        elif int(self.pointers[value.storage]) != view.address:
            self._copy(view.address, int(self.pointers[value.storage]), self._extent_bytes(value))

    def wait(self, what: str) -> None:
        """Until the stream's work is done. GroupLost where another rank, which it waited for, has ended."""
        try:
            self.context.wait(self.stream, what)
        finally:
            if self.executor.ranks is not None:
                self.executor.ranks.check()

    # -- values for host steps --
    def argument(self, index: int) -> Any:
        """One value as a host array: an object, a constant, or a copy from the device."""
        value = self.plan.values[index]
        place = self.plan.storages[value.storage].place
        if index in self._objects or place in ("host", "weight"):
            return super().argument(index)
        target = np.empty(self._shape(value), numpy_dtype(value.dtype))
        self.context.download(target, int(self.pointers[value.storage]), self.stream)
        self.wait(f"the steps before {value.name!r} was needed on the host")
        return target

    def set_results(self, indices: Sequence[int], results: Sequence[Any]) -> None:
        """Store what a host or control step computed, on the device too where a kernel may read it."""
        for index, result in zip(indices, results, strict=False):
            value = self.plan.values[index]
            if not isinstance(result, np.ndarray) and not np.isscalar(result):
                self._objects[index] = result
                continue
            array = np.ascontiguousarray(result).reshape(np.shape(result))
            self._bind(value, array)
            if not self._on_device(value):
                self._objects[index] = array
                if array.dtype != object and array.dtype.kind not in "US":
                    self.context.upload(self._own(value.storage, array.nbytes), array, self.stream)
                continue
            array = np.ascontiguousarray(array, numpy_dtype(value.dtype))
            self.context.upload(int(self.pointers[value.storage]), array, self.stream)
            self.wait(f"the copy of {value.name!r} to the device")  # the array may be gone after this

    # -- graphs --
    def launch(self, *numbers: int) -> None:
        """Run segments that follow each other: captured once per frame, eagerly where sizes come with the data."""
        if self.executor.eager:
            self._launches.alone(lambda: self._enqueue(numbers))
            return
        key = numbers, self._addresses
        if key not in self._graphs:
            for number in numbers:
                self._launches.load(number)
            self._graphs[key] = self.context.capture(self.stream, lambda: self._enqueue(numbers, capturing=True))
            self.forget_graphs()
        self._graphs.move_to_end(key)
        self._launches.alone(lambda: self.context.call("cuGraphLaunch", self._graphs[key], self.stream))

    def _enqueue(self, numbers: Sequence[int], capturing: bool = False) -> None:
        for number in numbers:
            (self._launches.put_beside if capturing else self._launches.put)(number)

    def forget_graphs(self, every: bool = False) -> None:
        """Those for tensors of others that were not used lately, or every one."""
        lent = [key for key in self._graphs if every or key[1]]
        for key in lent[: max(len(lent) - _GRAPHS_KEPT * (not every), 0)]:
            self.context.call("cuGraphExecDestroy", self._graphs.pop(key))

    def step_times(self, segment: GraphSegment, repeats: int = 1) -> list[float]:
        """Microseconds of each step, by events between the steps of one graph; the best of `repeats` runs."""
        return self._launches.times(self.plan.segments.index(segment), repeats)

    def forget(self) -> None:
        """Give memory and graphs back now: nobody runs it any more."""
        for memory in (self.memory, *self._late_device.values()):
            memory.release()
        self._destroyed()
        self.ended = None


def _fetch(context: cuda.Context, view: dlpack.View) -> Array:
    """A copy on the host."""
    context.activate()
    array = np.empty(view.shape, numpy_dtype(view.dtype))
    if array.nbytes:
        context.call("cuMemcpyDtoH", array.ctypes.data, view.address, array.nbytes)
    return array


def _destroy(context: cuda.Context, stream: Any, ended: Any, graphs: Mapping[Any, Any]) -> None:
    """A frame that is forgotten gives its graphs, its stream and its event back."""
    if context.fault:
        return
    context.activate()
    for graph in graphs.values():
        context.driver.raw("cuGraphExecDestroy")(graph)
    context.driver.raw("cuEventDestroy")(ended)
    context.driver.raw("cuStreamDestroy")(stream)

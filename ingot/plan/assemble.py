"""Works and their chosen candidates → a plan: reorders where layouts differ, kernels generated, storages placed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ingot.dtypes import size_of
from ingot.errors import BuildError
from ingot.ir.ops_group import COLLECTIVE
from ingot.ir.ops_paged import STATEFUL
from ingot.kernels import PLAIN, Candidate, Ports, candidates, with_layouts
from ingot.kernels.layout import physical_shape
from ingot.kernels.node import Node
from ingot.kernels.target import Backend, Build, Handle, Place
from ingot.kernels.work import bytes_of, flops_of
from ingot.plan.extent import Extent, product, symbols_of
from ingot.plan.lower import Module, Tensor, Work, host_node
from ingot.plan.packing import align
from ingot.plan.plan import CollectiveSegment, ControlSegment, HostSegment, Plan, Segment, Step, Storage, Value
from ingot.runtime.buffers import aligned_bytes

Array = np.ndarray[Any, Any]
Ref = tuple[Tensor, str]


@dataclass(eq=False)
class Code:
    """What all plans of a variant share: the backend that makes kernels and segments (None: the plan has host steps
    alone), and the weights section."""

    backend: Backend | None
    weights: list[Array] = field(default_factory=list)
    size: int = 0
    _offsets: dict[tuple[bytes, int], list[tuple[int, Array]]] = field(default_factory=dict)

    def add_weight(self, array: Array) -> int:
        """Offset of the array's bytes in the weights section; equal bytes are stored once."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        alike = self._offsets.setdefault((data[:64].tobytes(), data.size), [])
        for offset, known in alike:
            if np.array_equal(known, data):
                return offset
        alike.append((self.size, data))
        self.weights.append(data)
        self.size = align(self.size + data.nbytes + 64)
        return alike[-1][0]

    def weight_bytes(self) -> Array:
        """The section: every array at its offset, 64-byte aligned, at least 64 zero bytes after each. Called once."""
        section = aligned_bytes(self.size)
        offset = 0
        self._offsets.clear()
        waiting = self.weights[::-1]
        self.weights.clear()
        while waiting:  # each is let go when it has been copied: a model is not in memory twice
            data = waiting.pop()
            section[offset : offset + data.size] = data
            offset = align(offset + data.nbytes + 64)
        return section


@dataclass(eq=False)
class Item:
    """A work in its final place: refs say in which layout each operand is taken and given."""

    work: Work
    inputs: tuple[Ref | None, ...]
    outputs: tuple[Ref, ...]
    candidate: Candidate | None = None
    node: Node | None = None
    build: Build | None = None


def assemble(module: Module, choices: Mapping[Work, Candidate], code: Code) -> Plan:
    """The plan of a module and, recursively, of its bodies; kernels' texts and weights are added to `code`."""
    items = _items(module, choices, code)
    return _Assembly(module, items, choices, code).plan()


# -- items
# --------------------------------------------------------------------------------------------------------------


def _items(module: Module, choices: Mapping[Work, Candidate], code: Code) -> list[Item]:
    """Works with reorders inserted: each value exists in its producer's layout and in those its consumers ask for."""
    items: list[Item] = []
    homes: dict[Tensor, str] = {}
    made: set[Ref] = set()

    def want(tensor: Tensor | None, layout: str) -> Ref | None:
        if tensor is None or tensor.constant is not None:  # kernels pack constants in the layout they ask for
            return None if tensor is None else (tensor, layout)
        if tensor.alias is not None:  # a view: of the plain form, and blocked by its own shape, not by its source's
            want(tensor.root, "plain")
        home = homes.get(tensor, "plain")
        if layout != home and (tensor, layout) not in made:
            items.append(_reorder(tensor, home, layout, code))
            made.add((tensor, layout))
        return (tensor, layout)

    for work in module.works:
        ports = choices[work].ports if work.kind == "native" else PLAIN
        inputs = tuple(want(t, _layout(ports.inputs, i)) for i, t in enumerate(work.inputs))
        for captured in (t for group in work.captures for t in group):
            want(captured, "plain")
        outputs = tuple((t, _layout(ports.outputs, i)) for i, t in enumerate(work.outputs))
        homes.update(outputs)
        items.append(_item(work, inputs, outputs, choices.get(work), code))
    for tensor in module.outputs:
        want(tensor, "plain")
    return items


def _layout(layouts: Sequence[str], index: int) -> str:
    return layouts[index] if index < len(layouts) and layouts[index] else "plain"


def _item(
    work: Work, inputs: tuple[Ref | None, ...], outputs: tuple[Ref, ...], candidate: Candidate | None, code: Code
) -> Item:
    item = Item(work, inputs, outputs, candidate)
    if candidate is not None and work.node is not None and code.backend is not None:
        item.node = with_layouts(work.node, candidate.ports)
        item.build = code.backend.generate(item.node, candidate)
    return item


def _reorder(tensor: Tensor, source: str, target: str, code: Code) -> Item:
    port = tensor.port()
    node = Node(
        "Reorder", (replace(port, layout=source),), (replace(port, layout=target),),
        {"layout_from": source, "layout_to": target}, name=f"{tensor.name}:{target}",
    )  # fmt: skip
    ports = Ports((source,), (target,))
    platform = code.backend.target if code.backend else None
    found = next(candidates(node, platform.target, platform), None) if platform else None
    if found is None:
        raise BuildError(f"no kernel brings {tensor.name!r} from layout {source} to {target}; this is a bug in Ingot")
    work = Work("native", node.name, "Reorder", (), (tensor,), (tensor,), node)
    return _item(work, ((tensor, source),), ((tensor, target),), replace(found, ports=ports), code)


# -- assembly
# -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Assembly:
    module: Module
    items: list[Item]
    choices: Mapping[Work, Candidate]
    code: Code
    storages: list[Storage] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    _storage_of: dict[Ref, int] = field(default_factory=dict)
    _value_of: dict[Ref, int] = field(default_factory=dict)
    _last: dict[Ref, int] = field(default_factory=dict)
    _offsets: dict[int, int] = field(default_factory=dict)

    def plan(self) -> Plan:
        self._find_last_uses()
        inputs = tuple(self._input(t) for t in self.module.inputs)
        segments = self._segments()
        outputs = tuple(self._value((t, "plain")) for t in self.module.outputs)
        scratch = max((align(i.build.scratch_bytes) for i in self.items if i.build), default=0)
        scratch = max([scratch, *(p.scratch for s in segments if isinstance(s, ControlSegment) for p in s.plans)])
        return Plan(
            inputs, outputs, tuple(self.values), tuple(self.storages), tuple(segments), tuple(self.extents),
            (), self.module.derived, scratch, tuple(self.module.demands),
        )  # fmt: skip

    # -- lifetimes --
    def _find_last_uses(self) -> None:
        end = len(self.items)
        for position, item in enumerate(self.items):
            for ref in (*item.inputs, *item.outputs):
                if ref is not None:
                    self._last[_key(ref)] = position
            for tensor in (t for group in item.work.captures for t in group):
                self._last[_key((tensor, "plain"))] = position
        for tensor in self.module.outputs:
            self._last[_key((tensor, "plain"))] = end

    # -- storages and values --
    def _input(self, tensor: Tensor) -> int:
        place = "input" if tensor.native else "host"
        size = tensor.port().bytes if tensor.native else 0
        self._storage_of[(tensor, "plain")] = self._new_storage(Storage(place, size))  # type: ignore[arg-type]
        return self._value((tensor, "plain"))

    def _new_storage(self, storage: Storage) -> int:
        self.storages.append(storage)
        return len(self.storages) - 1

    def _weight(self, array: Array) -> int:
        offset = self.code.add_weight(array)
        if offset not in self._offsets:
            self._offsets[offset] = self._new_storage(Storage("weight", int(array.nbytes), offset))
        return self._offsets[offset]

    def _storage(self, ref: Ref) -> int:
        key = _key(ref)
        if key not in self._storage_of:
            constant = key[0].constant
            if constant is None:
                raise AssertionError(f"{key[0].name!r} has no storage")
            self._storage_of[key] = self._weight(constant)
        return self._storage_of[key]

    def _value(self, ref: Ref) -> int:
        if ref not in self._value_of:
            tensor, layout = ref
            self.values.append(Value(tensor.name, tensor.dtype, tensor.shape or (), self._storage(ref), layout))
            self._value_of[ref] = len(self.values) - 1
        return self._value_of[ref]

    def _place_output(self, item: Item, index: int, position: int) -> None:
        ref = item.outputs[index]
        tensor, layout = ref
        last = self._last.get(_key(ref), position)
        if not tensor.native:
            self._storage_of[ref] = self._new_storage(Storage("host", 0, 0, position, last))
            return
        size = self._bytes(ref)
        if item.work.kind == "native" and index == 0 and (taken := self._taken_over(item, size, position)) is not None:
            self.storages[taken] = replace(self.storages[taken], last=last)
            self._storage_of[ref] = taken
            return
        is_output = layout == "plain" and any(o.root is tensor for o in self.module.outputs)
        place = "output" if is_output else "arena"
        if self._unknown_size(size):  # no buffer can be there before the run: late ones are made as sizes become known
            place = "arena" if item.work.kind == "native" else "host"
        self._storage_of[ref] = self._new_storage(Storage(place, size, 0, position, last))  # type: ignore[arg-type]

    def _unknown_size(self, size: Extent) -> bool:
        return not symbols_of(size).isdisjoint(self.module.derived)

    def _bytes(self, ref: Ref) -> Extent:
        tensor, layout = ref
        assert tensor.shape is not None
        lanes = self.code.backend.target.lanes if self.code.backend else 1
        return product((*physical_shape(tensor.shape, layout, lanes), size_of(tensor.dtype)))

    def _taken_over(self, item: Item, size: Extent, position: int) -> int | None:
        """Storage of an input that dies here and may hold the output."""
        assert item.candidate is not None and item.node is not None
        if any(o.root is item.outputs[0][0] for o in self.module.outputs) and item.outputs[0][1] == "plain":
            return None
        allowed = item.candidate.kernel.in_place(item.node)
        read = {self._storage(ref) for i, ref in enumerate(item.inputs) if ref is not None and i not in allowed
                and ref[0].root.constant is None}  # fmt: skip
        for index in allowed:
            ref = item.inputs[index] if index < len(item.inputs) else None
            if ref is None or ref[0].root.constant is not None or self._last[_key(ref)] != position:
                continue
            storage, places = self._storage(ref), ("input",) if item.node.op in STATEFUL else ("arena",)
            if storage not in read and self.storages[storage].place in places and self.storages[storage].bytes == size:
                return storage
        if item.node.op in STATEFUL:
            raise BuildError(f"{item.work.name} updates a state that others read as it was; this is a bug in Ingot")
        return None

    # -- segments --
    def _segments(self) -> list[Segment]:
        segments: list[Segment] = []
        steps: list[Step] = []
        calls: list[Any] = []

        def flush() -> None:
            if steps:
                assert self.code.backend is not None
                segments.append(self.code.backend.segment(tuple(steps), calls))
                steps.clear()
                calls.clear()

        for position, item in enumerate(self.items):
            for index in range(len(item.outputs)):
                self._place_output(item, index, position)
            step = self._step(item)
            if item.work.kind == "native":
                calls.extend(self._calls(item, position, len(steps)))
                steps.append(step)
                continue
            flush()
            segments.append(self._other(item, step))
        flush()
        return segments

    def _step(self, item: Item) -> Step:
        work, candidate, node = item.work, item.candidate, item.node
        inputs = tuple(None if r is None else self._input_value(item, i) for i, r in enumerate(item.inputs))
        outputs = tuple(self._value(r) for r in item.outputs)
        return Step(
            work.name, work.op, work.origins, candidate.kernel.name if candidate else "host",
            dict(candidate.tactic) if candidate else {}, inputs, outputs,
            bytes_of(node) if node else 0, flops_of(node) if node else 0,
        )  # fmt: skip

    def _input_value(self, item: Item, index: int) -> int | None:
        """A constant that its kernel has packed is not stored a second time."""
        ref = item.inputs[index]
        assert ref is not None
        if item.build is not None and ref[0].root.constant is not None:
            return None
        return self._value(ref)

    def _other(self, item: Item, step: Step) -> Segment:
        if item.work.kind == "collective":
            return CollectiveSegment(step, COLLECTIVE[item.work.op])
        return self._host(item, step) if item.work.kind == "host" else self._control(item, step)

    def _host(self, item: Item, step: Step) -> HostSegment:
        return HostSegment(step, host_node(item.work), dict(self.module.opsets), item.work.reason, item.work.fused)

    def _control(self, item: Item, step: Step) -> ControlSegment:
        plans = tuple(assemble(body, self.choices, self.code) for body in item.work.bodies)
        captures = tuple(tuple(self._value((t, "plain")) for t in group) for group in item.work.captures)
        return ControlSegment(step, item.work.settings, plans, captures)

    # -- native calls --
    def _calls(self, item: Item, position: int, number: int) -> Sequence[Any]:
        build = item.build
        assert build is not None and self.code.backend is not None
        temporaries = [self._new_storage(Storage("arena", t, 0, position, position)) for t in build.temporaries]
        whole_run = 0, len(self.items)  # nothing else lies where a step counts, from run to run
        counters = [self._new_storage(Storage("arena", t, 0, *whole_run)) for t in build.counters]
        constants = [self._weight(c) for c in build.constants]
        places: dict[str, Callable[[int], int]] = {
            "input": lambda i: self._storage(_present(item.inputs[i])),
            "output": lambda i: self._storage(item.outputs[i]),
            "constant": lambda i: constants[i],
            "temporary": lambda i: temporaries[i],
            "counter": lambda i: counters[i],
        }

        def storage(handle: Handle) -> int:
            return places[handle.kind](handle.index)

        return self.code.backend.calls(build, Place(storage, self._extent, number))

    def _extent(self, extent: Extent) -> int:
        if extent not in self.extents:
            self.extents.append(extent)
        return self.extents.index(extent)


def _key(ref: Ref) -> Ref:
    """What a storage belongs to: views share the plain form of their source and nothing else."""
    tensor, layout = ref
    return (tensor.root, layout) if layout == "plain" else ref


def _present(ref: Ref | None) -> Ref:
    if ref is None:
        raise BuildError("a kernel reads an input its node does not have; this is a bug in Ingot")
    return ref

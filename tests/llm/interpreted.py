"""Engines for a GPU on a machine without one: their launches carried out by Triton's interpreter, on host memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from ingot import compiler
from ingot.dtypes import numpy_dtype
from ingot.engine import Engine
from ingot.kernels import Candidate
from ingot.kernels.cuda import cached_attention, paged_attention, sample
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.backend import CudaBackend
from ingot.kernels.cuda.build import CudaBuilder, Unit
from ingot.kernels.cuda.ladder import Rung
from ingot.kernels.node import Node
from ingot.llm import evidence, pools, runner
from ingot.plan.extent import evaluate
from ingot.plan.plan import GraphSegment, Plan
from ingot.runtime import cubins
from ingot.runtime.buffers import address_of, aligned_bytes
from ingot.runtime.session import Session

Array = np.ndarray[Any, Any]
UNITS: dict[str, Unit] = {}


class _Texts(CudaBackend):
    """Keeps what would be compiled."""

    def generate(self, node: Node, candidate: Candidate) -> CudaBuilder:
        build = CudaBuilder(node, self.target)
        candidate.kernel.generate(build, node, **candidate.tactic)
        UNITS.update((call.unit.symbol(self.target), call.unit) for call in build.checked())
        return build

    def image(self) -> tuple[bytes, dict[str, int]]:
        return cubins.pack({}), {}


@contextmanager
def _backend(target: Architecture, log: Any) -> Iterator[CudaBackend]:
    yield _Texts(target, None, log)  # type: ignore[arg-type]


class InterpretedSession:
    """As much of a session as a runner asks for; pools are arrays, updated in place."""

    on_device = goes_on = False

    def __init__(self, engine: Engine, device: str = "cuda", threads: int | None = None, group: None = None) -> None:
        self.variant, self.threads, self.engine = engine.variants[0], 1, engine
        self.plan: Plan = self.variant.plan
        self.weights = np.frombuffer(self.variant.weights, np.uint8).copy()
        self._counters: dict[int, Array] = {}

    def begin(self, feeds: Mapping[str, Any], names: Sequence[str], after: Any = None,
              carried: Mapping[str, tuple[str, Array]] | None = None) -> Any:  # fmt: skip
        """Computed at once, as a device's stream would: what is asked for later is what is there now."""
        for name, (output, pairs) in (carried or {}).items():
            feeds[name][pairs[:, 0]] = after.every[output][pairs[:, 1]]  # type: ignore[index]
        every = self._computed(feeds)
        found = {name: every[name].copy() for name in names}
        return SimpleNamespace(every=every, result=lambda: found)

    def _computed(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        plan = self.plan
        order = [feeds[spec.name] for spec in self.engine.inputs]
        symbols = {extent: x.shape[axis] for index, x in zip(plan.inputs, order, strict=True)
                   for axis, extent in enumerate(plan.values[index].shape) if isinstance(extent, str)}  # fmt: skip
        arena = aligned_bytes(max(s.offset + evaluate(s.bytes, symbols) for s in self._placed(symbols)))
        held = {plan.values[index].storage: x for index, x in zip(plan.inputs, order, strict=True)}
        made = [self._address(k, held, arena, symbols) for k in range(len(plan.storages))]
        extents = [evaluate(e, symbols) for e in plan.extents]
        for segment in plan.segments:
            assert isinstance(segment, GraphSegment)
            self._launch(segment, [address for address, _ in made], extents, symbols)
        found = {}
        for spec, index in zip(self.engine.outputs, plan.outputs, strict=True):
            value, memory = plan.values[index], made[plan.values[index].storage][1]
            shape = [evaluate(d, symbols) for d in value.shape]
            size = int(np.prod(shape)) * numpy_dtype(value.dtype).itemsize
            found[spec.name] = memory[:size].view(numpy_dtype(value.dtype)).reshape(shape)
        return found

    def _placed(self, symbols: Mapping[str, int]) -> list[Any]:
        return [s for s in self.plan.storages if s.place == "arena"]

    def _address(self, index: int, held: Mapping[int, Array], arena: Array, symbols: Mapping[str, int]) -> Any:
        storage = self.plan.storages[index]
        if index in held:
            return address_of(held[index]), held[index]
        if storage.place == "weight":
            return address_of(self.weights) + storage.offset, self.weights
        memory = aligned_bytes(max(evaluate(storage.bytes, symbols), 1))  # of its own: nothing may be left from before
        memory[:] = 0
        return address_of(memory), memory

    def _launch(self, segment: GraphSegment, addresses: Sequence[int], extents: Sequence[int],
                symbols: Mapping[str, int]) -> None:  # fmt: skip
        from tests.kernels.cuda import interpret

        for launch in segment.launches:
            grid = [evaluate(e, symbols) for e in launch.grid]
            if 0 not in grid:
                values = [*(addresses[p] for p in launch.pointers), *(extents[e] for e in launch.extents)]
                interpret.run(UNITS[launch.entry], grid, values)

    def close(self) -> None:
        """Nothing is held."""


def use(monkeypatch: Any) -> None:
    """From now on engines for a GPU are built without compiling, and run by the interpreter."""
    monkeypatch.setitem(compiler._BACKENDS, "cuda", _backend)
    monkeypatch.setattr(paged_attention, "_SPLITS", ((Rung(1, 2), 2), (Rung(3), 1)))  # blocks take their time here
    monkeypatch.setattr(cached_attention, "_PARTS", 2)
    monkeypatch.setattr(sample, "SHARES", ((Rung(1, 2), 2), (Rung(3), 1)))
    for module in (runner, pools):
        monkeypatch.setattr(module, "Session", InterpretedSession)
    monkeypatch.setattr(evidence, "EngineRunner", runner.EngineRunner)
    assert Session is not InterpretedSession

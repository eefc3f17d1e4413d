"""`Session`: an engine on a device, checked inputs in, arrays out."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from types import TracebackType
from typing import Any, Self

import numpy as np

from ingot.dtypes import HOST_ONLY, numpy_dtype
from ingot.engine import Engine, Variant
from ingot.errors import ConfigError, IngotError, InputError
from ingot.plan.extent import evaluate
from ingot.plan.plan import ControlSegment, NativeSegment, Plan, TensorSpec
from ingot.runtime import profiler
from ingot.runtime.buffers import Array, address_of, aligned_bytes
from ingot.runtime.cpu import NativeCode, Teams, usable_threads
from ingot.runtime.dlpack import Foreign, foreign
from ingot.runtime.executor import Executor, Frame, Shapes
from ingot.runtime.group import Group
from ingot.runtime.machine import cpu_features, describe

_TARGETS = {"cpu": ("cpu", "host"), "host": ("host",), "cuda": ("cuda",)}


@dataclass(frozen=True)
class _Loaded:
    """A variant's code and weights, shared by the sessions of an engine."""

    code: NativeCode | None
    weights: Array


_LOADED: weakref.WeakKeyDictionary[Variant, _Loaded] = weakref.WeakKeyDictionary()
_LOADING = threading.Lock()


def _loaded(variant: Variant) -> _Loaded:
    with _LOADING:
        if variant not in _LOADED:
            code = NativeCode(variant.code, variant.symbols) if variant.code else None
            _LOADED[variant] = _Loaded(code, _aligned(variant.weights))
        return _LOADED[variant]


def _aligned(data: bytes | memoryview) -> Array:
    """Weights as they are, or a copy where they do not begin at a cache line (a mapped file always does)."""
    weights = np.frombuffer(data, np.uint8) if len(data) else np.zeros(0, np.uint8)
    if weights.size and address_of(weights) % 64 == 0:
        return weights
    copy = aligned_bytes(weights.size)
    copy[:] = weights
    return copy


def features(target: str) -> frozenset[str]:
    """What this machine offers a variant for the target; nothing where there is no such device."""
    if target != "cuda":
        return cpu_features()
    from ingot.runtime import cuda

    try:
        return cuda.select("cuda").features
    except IngotError:
        return frozenset()


@dataclass(frozen=True, eq=False)
class Begun:
    """A run that was begun (`Session.begin`)."""

    session: Session
    frame: Frame
    finish: Callable[[], dict[str, Any]]

    def result(self) -> dict[str, Any]:
        """Its outputs by name, waited for; to be called once."""
        return self.session.end(self)


class Session:
    """Runs an engine. Thread-safe: concurrent runs each get their own arena; many sessions share one engine's weights.

    device: "cpu" (native code, host steps where the plan has them) or "host" (the engine's host variant, if it holds
    one), "cuda", "cuda:1" or "cuda:GPU-…" (an NVIDIA GPU or MIG instance).
    threads: of all runs together, their callers included; default: the cores this process may use. streams: throughput
    mode: so many runs go on side by side, each on its share of the threads, and further ones wait for their turn;
    default: one run has all the threads, those beside it run on their caller's thread alone. group: the ranks that
    compute the engine together, where it is one of several.
    """

    def __init__(
        self, engine: Engine, device: str = "cpu", threads: int | None = None, streams: int | None = None,
        group: Group | None = None,
    ) -> None:  # fmt: skip
        kind = device.partition(":")[0]
        if kind not in _TARGETS or (kind != "cuda" and kind != device):
            raise ConfigError(f"there is no device {device!r}; use one of {', '.join(_TARGETS)}, cuda:1, cuda:GPU-…")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        if streams is not None and streams < 1:
            raise ConfigError(f"streams must be at least 1, not {streams}")
        self.engine = engine
        self.threads, self.streams = threads or usable_threads(), streams
        self._turn = threading.BoundedSemaphore(streams) if streams else nullcontext()
        self._team: Teams | None = None
        self._group = group
        self._on_device = kind == "cuda"
        self._executor = self._on_gpu(device) if kind == "cuda" else self._on_cpu(kind)
        self.plan = self.variant.plan
        self._names = tuple(spec.name for spec in engine.inputs)
        self._dtypes = tuple(numpy_dtype(spec.dtype) for spec in engine.inputs)
        self._output_names = tuple(spec.name for spec in engine.outputs)
        self._accepted: set[Shapes] = set()
        self._kept: dict[str, Foreign] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self._verified = False

    def _on_cpu(self, kind: str) -> Executor:
        self.variant = self.engine.pick(_TARGETS[kind], cpu_features(), describe())
        loaded, plan = _loaded(self.variant), self.variant.plan
        self._team = Teams(loaded.code, self.threads, self.streams or 1, _phases(plan)) if loaded.code else None
        return Executor(plan, loaded.code, loaded.weights, self._team, self._group)

    def _on_gpu(self, device: str) -> Executor:
        from ingot.runtime import cuda, cuda_executor

        chosen = cuda.select(device)
        self.variant = self.engine.pick(_TARGETS["cuda"], chosen.features, f"with {chosen}")
        weights = _aligned(self.variant.weights)
        loaded = cuda_executor.load(self.variant, chosen, weights)
        return cuda_executor.CudaExecutor(self.variant.plan, loaded, self._group)

    def run(self, feeds: Mapping[str, Any], out: Mapping[str, Any] | None = None,
            on_device: bool = False) -> dict[str, Any]:  # fmt: skip
        """Outputs by name for inputs by name; `out` gives C-contiguous buffers to write outputs into. A session on a
        GPU takes tensors that are there, of anybody who speaks DLPack, among both; on_device: its outputs stay there.

        InputError names a wrong name, dtype, rank or extent; nothing is converted silently.
        """
        executor = self._executor
        arrays, shapes = self._checked(feeds)
        buffers = self._buffers(out) if out else None
        if on_device and (buffers or not self._on_device):
            raise InputError("on_device=True is for a session on a GPU, and without out=")
        with self._turn:
            frame = executor.take(shapes)
            try:
                results = frame.run_on_device(arrays) if on_device else frame.run(arrays, buffers)
            finally:
                executor.give(frame)
        self._verify()
        return dict(zip(self._output_names, results, strict=True))

    def warm_up(self) -> int:
        """Run the smallest, usual and largest shapes of the engine's profiles (where it has none, fixed shapes) once,
        with zeros: memory is taken, on a GPU kernels are loaded and graphs captured, and no run at them pays for it.
        How many they were."""
        points = {tuple(point.items()): None for point in self._points()}
        for point in points:
            self.run({name: np.full(shape, "" if dtype.hasobject else 0, dtype)
                      for (name, shape), dtype in zip(point, self._dtypes, strict=True)})  # fmt: skip
        return len(points)

    def _points(self) -> Iterator[dict[str, tuple[int, ...]]]:
        fixed = {x.name: x.shape for x in self.engine.inputs if all(isinstance(n, int) for n in x.shape)}
        profiles = self.engine.details.get("config", {}).get("profiles") or [{}]
        for profile, which in product(profiles, range(3)):
            shapes: dict[str, Any] = fixed | {name: tuple(triple[which]) for name, triple in profile.items()}
            if shapes.keys() >= set(self._names):
                yield {name: shapes[name] for name in self._names}

    @property
    def on_device(self) -> bool:
        """Whether it computes on a GPU."""
        return self._on_device

    @property
    def goes_on(self) -> bool:
        """Whether runs that were begun go on without the host: another may be begun behind one at once."""
        return self._executor.goes_on

    @property
    def context(self) -> Any:
        """The GPU's context (ingot/runtime/cuda.py)."""
        return self._executor.context

    def keep(self, places: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        """Inputs by name that lie on the GPU from now on, (address, shape) each: no run is given them, every run reads
        and writes them where they are. For what outlives runs, and for one run at a time."""
        self._executor.keep({self._names.index(name): address for name, (address, _) in places.items()})
        self._kept |= {name: Foreign(None, shape, 0) for name, (_, shape) in places.items()}

    def begin(self, feeds: Mapping[str, Any], names: Sequence[str], after: Begun | None = None,
              carried: Mapping[str, tuple[str, Array]] | None = None) -> Begun:  # fmt: skip
        """As `run`, with the named outputs alone, which are waited for later: on a GPU the run goes on meanwhile, on a
        CPU it is computed then. after: a run of this session that ends before this one begins, though nobody has waited
        for it; carried: for inputs by name an output of that one and [C, 2] places: element c, 0 of the input, as if
        flat, is the output's c, 1. Both of one dtype, and on a GPU alone."""
        arrays, shapes = self._checked(feeds)
        frame = self._executor.take(shapes)  # one that fails is forgotten
        positions = [self._output_names.index(name) for name in names]
        taken = [(self._names.index(name), self._output_names.index(output), pairs)
                 for name, (output, pairs) in (carried or {}).items()]  # fmt: skip
        finish = frame.begin(arrays, positions, after.frame if after is not None else None, taken)
        return Begun(self, frame, lambda: dict(zip(names, finish(), strict=True)))

    def end(self, begun: Begun) -> dict[str, Any]:
        """What `begun.result()` does."""
        try:
            results = begun.finish()
        finally:
            self._executor.give(begun.frame)
        self._verify()
        return results

    def _verify(self) -> None:
        """Weights are checked while the first run goes on."""
        if not self._verified:
            self.engine.verified()
            self._verified = True

    def run_async(self, feeds: Mapping[str, Any], out: Mapping[str, Array] | None = None) -> Future[dict[str, Any]]:
        """The same in the background."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.streams or self.threads, thread_name_prefix="ingot-run")
        return self._pool.submit(self.run, feeds, out)

    def profile(self, feeds: Mapping[str, Any]) -> list[profiler.StepTime]:
        """One run with the time of every step, in order."""
        self.engine.verified()
        arrays, shapes = self._checked(feeds)
        frame = self._executor.take(shapes)
        try:
            return profiler.profile(frame, arrays)
        finally:
            self._executor.give(frame)

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes held: weights (mapped) and arenas."""
        return {"weights": len(self.variant.weights), "arenas": self._executor.arena_bytes}

    def close(self) -> None:
        """Stop the session's threads; idempotent. A run after it raises."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown()
        if self._team is not None:
            self._team.close()
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- checks ---------------------------------------------------------------------------------------------------
    def _checked(self, feeds: Mapping[str, Any]) -> tuple[list[Any], Shapes]:
        """Inputs in order, and their shapes. The first run of each combination of shapes is checked thoroughly."""
        if self._closed:
            raise InputError("the session is closed; open a new one")
        if self._kept:
            feeds = {**feeds, **self._kept}
        try:
            arrays = [feeds[name] for name in self._names]
        except KeyError as error:
            raise InputError(f"input {error.args[0]!r} is missing; {self._expectation()}") from None
        if len(feeds) != len(arrays):
            extra = ", ".join(repr(n) for n in feeds if n not in self._names)
            raise InputError(f"there is no input {extra}; {self._expectation()}")
        shapes: Shapes = ()
        for position, dtype in enumerate(self._dtypes):
            x = arrays[position]
            if type(x) is not Foreign and (type(x) is not np.ndarray or x.dtype != dtype or not x.flags.c_contiguous):
                x = arrays[position] = self._adapted(position, x)
            shapes += (x.shape if type(x) is np.ndarray or type(x) is Foreign else (),)
        if shapes not in self._accepted:
            self._check_shapes(shapes)
            if len(self._accepted) < 4096:
                self._accepted.add(shapes)
        return arrays, shapes

    def _expectation(self) -> str:
        return "the model takes " + ", ".join(f"{s.name}: {s.dtype}{list(s.shape)}" for s in self.engine.inputs)

    def _adapted(self, position: int, x: Any) -> Any:
        spec = self.engine.inputs[position]
        if spec.dtype in HOST_ONLY:
            return x
        if not isinstance(x, np.ndarray) and (tensor := self._tensor(spec.name, x)) is not None:
            return tensor
        array = np.asarray(x)
        if array.dtype != self._dtypes[position]:
            raise InputError(
                f"input {spec.name!r} is {array.dtype}, the model takes {spec.dtype}; "
                f"convert it with .astype({spec.dtype!r})"
            )
        return np.ascontiguousarray(array).reshape(array.shape)

    def _tensor(self, name: str, x: Any) -> Foreign | None:
        """x if it is a tensor on a GPU, which this session must be on too."""
        tensor = foreign(x)
        if tensor is not None and not self._on_device:
            raise InputError(f"{name!r} is on a GPU, the session is not; give x.cpu().numpy(), or open the session "
                             "with device='cuda'")  # fmt: skip
        return tensor

    def _check_shapes(self, shapes: Shapes) -> None:
        symbols: dict[str, tuple[int, str]] = {}
        for spec, shape in zip(self.engine.inputs, shapes, strict=True):
            if spec.dtype in HOST_ONLY:
                continue
            if len(shape) != len(spec.shape):
                raise InputError(f"input {spec.name!r} has shape {list(shape)}, the model takes {list(spec.shape)}")
            for axis, (found, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
                _check_extent(spec, axis, found, wanted, symbols)
        bound = {symbol: n for symbol, (n, _) in symbols.items()}
        for spec, shape in zip(self.engine.inputs, shapes, strict=True):
            self._check_expressions(spec, shape, bound)

    @staticmethod
    def _check_expressions(spec: TensorSpec, shape: tuple[int, ...], bound: Mapping[str, int]) -> None:
        for axis, wanted in enumerate(spec.shape):
            if isinstance(wanted, str) and not wanted.isidentifier() and evaluate(wanted, bound) != shape[axis]:
                raise InputError(f"input {spec.name!r} has {shape[axis]} at axis {axis}, it must be {wanted}")

    def _buffers(self, out: Mapping[str, Any]) -> dict[int, Any]:
        buffers: dict[int, Any] = {}
        for name, buffer in out.items():
            if name not in self._output_names:
                raise InputError(f"there is no output {name!r}; the model has {', '.join(self._output_names)}")
            index = self._output_names.index(name)
            if not isinstance(buffer, np.ndarray) and (tensor := self._tensor(name, buffer)) is not None:
                buffers[index] = tensor
                continue
            dtype = numpy_dtype(self.engine.outputs[index].dtype)
            if buffer.dtype != dtype or not buffer.flags.c_contiguous or not buffer.flags.writeable:
                raise InputError(f"the buffer for output {name!r} must be a writable C-contiguous {dtype} array")
            buffers[index] = buffer
        return buffers


def _check_extent(
    spec: TensorSpec, axis: int, found: int, wanted: int | str, symbols: dict[str, tuple[int, str]]
) -> None:
    if isinstance(wanted, int):
        if found != wanted:
            raise InputError(f"input {spec.name!r} has {found} at axis {axis}, the model takes {list(spec.shape)}")
        return
    low, high = (spec.min[axis] if spec.min else None), (spec.max[axis] if spec.max else None)
    if (low is not None and found < low) or (high is not None and found > high):
        raise InputError(
            f"input {spec.name!r} has {wanted}={found} at axis {axis}, outside the engine's profile {low}..{high}; "
            "build with a wider profile"
        )
    known = symbols.setdefault(wanted, (found, spec.name)) if wanted.isidentifier() else (found, "")
    if known[0] != found:
        raise InputError(
            f"{wanted} is {known[0]} in input {known[1]!r} but {found} in {spec.name!r}; they must be equal"
        )


def _phases(plan: Plan) -> int:
    """Most work counters any segment of the plan or its nested plans needs."""
    own = (s.phases for s in plan.segments if isinstance(s, NativeSegment))
    nested = (_phases(p) for s in plan.segments if isinstance(s, ControlSegment) for p in s.plans)
    return max((*own, *nested), default=0)

"""One loaded version of a model: its configuration, ports, scheduler, statistics; loading measures and warms it up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.engine import Engine
from ingot.server.batcher import Batcher
from ingot.server.config import Config, completed, enum_name, rules_of
from ingot.server.drivers import Lines, OnLoop, Threads
from ingot.server.instances import Instance, SessionInstance
from ingot.server.latency import LatencyTable
from ingot.server.mailbox import Mailbox
from ingot.server.placement import Policies, places_of, targets_of, threads_of
from ingot.server.ports import Feeds, Ports, ports_of
from ingot.server.request import BY_CONFIG, BY_NAME, Done, Request, invalid
from ingot.server.scheduler import Cancel, Driver, Queue, Scheduler
from ingot.server.sequences import SequenceBatcher
from ingot.server.states import sequence_rules, states_of
from ingot.server.statistics import Statistics
from ingot.server.worker import ProcessInstance, Worker, engine_worker

log = logging.getLogger("ingot.server")
_MEASURED = 3
_MEASURING_SECONDS = 1.0
_LINGER = 0.05
_QUICK = 600_000  # nanoseconds of the largest batch up to which handing it to a thread would cost more than running it


class Servable(Protocol):
    """What the service asks of any loaded version, an ensemble's too."""

    @property
    def version(self) -> int: ...
    @property
    def config(self) -> Config: ...
    @property
    def ports(self) -> Ports: ...
    @property
    def statistics(self) -> Statistics: ...
    @property
    def pending(self) -> int: ...
    @property
    def digests(self) -> Mapping[str, str]:
        """Digests of what is served, by what they are of."""

    def submit(self, request: Request, done: Done) -> Cancel:
        """Answer through `done`; Closed if this version takes no more."""

    def close(self) -> None:
        """Answer what was accepted, then give everything back."""


@dataclass(frozen=True, eq=False)
class EngineModel:
    """A version that is an engine."""

    version: int
    config: Config
    ports: Ports
    scheduler: Scheduler
    statistics: Statistics = field(default_factory=Statistics)
    workers: tuple[Worker, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return self.scheduler.pending

    def submit(self, request: Request, done: Done) -> Cancel:
        """Queue the request."""
        return self.scheduler.submit(request, done)

    def close(self) -> None:
        """Drain, end the instances and their process."""
        self.scheduler.close()
        for worker in self.workers:
            worker.close()


@dataclass(frozen=True)
class Placing:
    """How models run: threads per instance (None: all cores, shared), the loop for quick models, or processes; cores of
    host policies.
    """

    threads: int | None = None
    loop: Mailbox | None = None
    processes: bool = False
    policies: Policies = field(default_factory=dict)


def load_engine_model(config: Config, version: int, engine: Engine, folder: Path, placing: Placing) -> EngineModel:
    """A version made ready: completed configuration, instances, warm-up, measured latencies."""
    stated = config.WhichOneof("scheduling_choice") is not None
    config = completed(config, engine.inputs, engine.outputs)
    ports, statistics, latency = ports_of(config, folder), Statistics(), LatencyTable()
    stateful = config.HasField("sequence_batching")
    states = states_of(config, folder) if stateful else None
    instances: list[Instance] = []
    makers, owned = _makers(config, engine, placing)
    try:
        for make in makers:
            instances.append(make())
            warm_up(config, ports, instances[-1], folder)
        slowest = None if stateful else measure(ports, instances[0], latency)
    except BaseException:
        for instance in instances:
            instance.close()
        for worker in owned:
            worker.close()
        raise
    quick = slowest is not None and slowest < _QUICK
    queue = _queue(config, len(instances), latency, stated)
    scheduler = Scheduler(
        ports, version, queue, _driver(instances, placing.loop if quick else None), statistics, latency,
        ordered=config.dynamic_batching.preserve_ordering, states=states,
    )  # fmt: skip
    return EngineModel(version, config, ports, scheduler, statistics, owned)


def _makers(
    config: Config, engine: Engine, placing: Placing
) -> tuple[Sequence[Callable[[], Instance]], tuple[Worker, ...]]:
    """What makes each instance, and the processes behind them, one for each device."""
    places = places_of(config, targets_of(engine), placing.policies)
    threads = {place: placing.threads or threads_of(place, places) for place in places}
    if not placing.processes:
        if any(place.apart for place in places):
            problem = "a MIG instance or a host policy needs a process of its own (--process-per-model)"
            raise invalid(f"model '{config.name}': {problem}")
        return [partial(SessionInstance, engine, place.device, threads[place]) for place in places], ()
    source = Path(engine.source)
    workers = {place: engine_worker(config.name, source, place, threads[place]) for place in threads}
    return [partial(ProcessInstance, workers[place]) for place in places], tuple(workers.values())


def _driver(instances: Sequence[Instance], loop: Mailbox | None) -> Callable[[Scheduler], Driver]:
    """Threads, unless a model is so quick that handing it over would cost more than running it."""
    if loop is None:
        return lambda scheduler: Threads(scheduler, instances)
    lines = [instance for instance in instances if isinstance(instance, ProcessInstance)]
    if lines:
        return lambda scheduler: Lines(scheduler, lines, loop)
    if len(instances) == 1:
        return lambda scheduler: OnLoop(scheduler, instances[0], loop)
    return lambda scheduler: Threads(scheduler, instances)


def _queue(config: Config, instances: int, latency: LatencyTable, stated: bool) -> Queue:
    """`stated`: the configuration says how to batch; then nothing waits unless it says so."""
    if config.HasField("sequence_batching"):
        return SequenceBatcher(sequence_rules(config, instances))
    rules = rules_of(config)
    return Batcher(rules if stated else replace(rules, linger=_LINGER), latency)


# -- warm-up and measuring --------------------------------------------------------------------------------------------
def warm_up(config: Config, ports: Ports, instance: Instance, folder: Path) -> None:
    """Run the configuration's warm-up requests; a failing one fails the load."""
    for request in config.model_warmup:
        feeds = {
            name: _warm_up_tensor(name, item, request.batch_size if ports.max_rows else 0, folder)
            for name, item in request.inputs.items()
        }
        for _ in range(max(request.count, 1)):
            instance.run(feeds)


def _warm_up_tensor(name: str, item: Any, rows: int, folder: Path) -> Any:
    kind = BY_CONFIG[enum_name(item, "data_type")]
    shape = (*((rows,) if rows else ()), *item.dims)
    if item.WhichOneof("input_data_type") == "input_data_file":
        return _file_tensor(name, item.input_data_file, kind.numpy, shape, folder)
    if kind.size is None:
        return np.full(shape, b"", object)
    if item.random_data:
        return (
            np.random.default_rng(0)
            .integers(0, 2 if kind.name == "BOOL" else 128, shape)
            .astype(numpy_dtype(kind.numpy))
        )
    return np.zeros(shape, numpy_dtype(kind.numpy))


def _file_tensor(name: str, file: str, dtype: str, shape: tuple[int, ...], folder: Path) -> Any:
    base = (folder / "warmup").resolve()
    path = (base / file).resolve()
    if not path.is_relative_to(base):
        raise invalid(f"warm-up of '{name}': input_data_file '{file}' leads out of the model's warmup folder")
    raw = path.read_bytes()
    data = np.frombuffer(raw, numpy_dtype(dtype))
    per_row = int(np.prod(shape[1:])) if shape else 1
    if data.size == per_row and shape:
        data = np.tile(data, shape[0])
    if data.size != np.prod(shape):
        raise invalid(f"warm-up of '{name}': '{file}' holds {len(raw)} bytes, {list(shape)} of {dtype} takes others")
    return data.reshape(shape)


def measure(ports: Ports, instance: Instance, latency: LatencyTable) -> int | None:
    """Time executions of 1, 2, 4, … rows on zeros; returns the nanoseconds of the largest batch.

    None for a model with free extents, which is measured by its requests instead, or for one too slow to measure all.
    """
    shapes = {port.name: port.dims if port.inner is None else port.inner for port in ports.inputs}
    if any(-1 in dims for dims in shapes.values()):
        return None
    key = tuple(port.dims for port in sorted(ports.inputs, key=lambda port: port.name))
    end = time.monotonic() + _MEASURING_SECONDS
    took = 0
    for rows in _sizes(max(ports.max_rows, 1)):
        batch = (rows,) if ports.max_rows else ()
        feeds = {port.name: _zeros(port.datatype, (*batch, *shapes[port.name])) for port in ports.inputs}
        took = min(_timed(instance, feeds) for _ in range(_MEASURED))
        for _ in ("cold", "warm"):  # the least of several is no first run's
            latency.observe(key, rows, took)
        if time.monotonic() > end:
            return None
    return took


def _sizes(most: int) -> list[int]:
    sizes = [1]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == most else [*sizes, most]


def _zeros(datatype: str, shape: tuple[int, ...]) -> Any:
    kind = BY_NAME[datatype]
    return np.full(shape, b"", object) if kind.size is None else np.zeros(shape, numpy_dtype(kind.numpy))


def _timed(instance: Instance, feeds: Mapping[str, Any] | Feeds) -> int:
    start = time.monotonic_ns()
    instance.run(feeds)
    return time.monotonic_ns() - start

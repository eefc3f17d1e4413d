"""A model that is a model.py: Triton's Python backend, a process for each instance, requests handed over one by one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ingot.server import logs
from ingot.server.batcher import Batcher
from ingot.server.builder import sha256
from ingot.server.config import Config, enum_name, read_override, rules_of
from ingot.server.conversations import Conversation, Submit
from ingot.server.drivers import Threads
from ingot.server.instances import Instance
from ingot.server.latency import LatencyTable
from ingot.server.model import EngineModel, warm_up
from ingot.server.placement import NO_POLICIES, Policies, places_of
from ingot.server.ports import Dims, Feeds, PartlyRefused, Port, Ports, answer, ports_of
from ingot.server.python_worker import ANSWERS, FACTS, tensor_name
from ingot.server.request import BY_NUMPY, Array, Code, Outcome, Request, ServerError, Tensor, invalid
from ingot.server.scheduler import Queue, Scheduler
from ingot.server.schema import as_plain
from ingot.server.sequences import SequenceBatcher
from ingot.server.states import sequence_rules, states_of
from ingot.server.statistics import Statistics
from ingot.server.worker import LONGEST_MESSAGE, ProcessInstance, Worker, spawned

BACKEND = "python"
_MODULE = "ingot.server.python_worker"
_STARTING_SECONDS = 600.0  # what a model does in `initialize` is its own business


@dataclass(frozen=True)
class PythonPorts(Ports):
    """Tensors of a batch stay apart: each is named after its request's place in the batch."""

    def check(self, request: Request) -> tuple[int, tuple[Dims, ...]]:
        """As of any model; a decoupled one answers only those who take several responses."""
        if self.decoupled and request.part is None:
            problem = "doesn't support models with decoupled transaction policy; use a gRPC stream or generate_stream"
            raise ServerError(Code.UNSUPPORTED, f"model '{self.model}': inference of one response {problem}")
        return super().check(request)

    def gather(self, requests: Sequence[Request]) -> Feeds:
        """Every request's tensors, and what else is known of it."""
        facts = np.empty(len(requests), object)
        every = [port.name for port in self.outputs]
        facts[:] = [json.dumps(_facts(request, every)).encode() for request in requests]
        feeds: Feeds = {FACTS: facts}
        for number, request in enumerate(requests):
            for tensor in request.inputs:
                feeds[tensor_name(number, tensor.name)] = self._inner(tensor.name, tensor.data)
        return feeds

    def split(
        self, results: Mapping[str, Array], requests: Sequence[Request], rows: Sequence[int]
    ) -> list[list[Tensor]]:
        """Each request's outputs; PartlyRefused where the model, or what it returned, refuses some."""
        answers = [json.loads(item) for item in results[ANSWERS]]
        parts: list[list[Tensor]] = []
        outcomes: list[list[Tensor] | ServerError] = []
        for number, (request, fact, count) in enumerate(zip(requests, answers, rows, strict=True)):
            outcome = self._part(results, number, request, fact, count)
            outcomes.append(outcome)
            parts += [] if isinstance(outcome, ServerError) else [outcome]
        if len(parts) < len(outcomes):
            raise PartlyRefused(outcomes)
        return parts

    def _part(
        self, results: Mapping[str, Array], number: int, request: Request, fact: Mapping[str, str], rows: int
    ) -> list[Tensor] | ServerError:
        if "error" in fact:
            return ServerError(_code(fact["code"]), fact["error"], "BACKEND")
        names = [output.name for output in request.outputs] or [port.name for port in self.outputs]
        try:
            return [
                self._made(self.output_of[name], results.get(tensor_name(number, name)), rows)
                for name in (() if self.decoupled else names)
            ]
        except ServerError as error:
            return error

    def respond(self, version: int, request: Request, fact: Mapping[str, Any], tensors: Mapping[str, Array]) -> Outcome:
        """One response of several; its rows are the model's choice."""
        if "error" in fact:
            return ServerError(_code(fact["code"]), fact["error"], "BACKEND")
        names = [output.name for output in request.outputs] or [port.name for port in self.outputs]
        rows = next((len(data) for data in tensors.values() if data.ndim), 1)
        try:
            return answer(
                request, version, [self._made(self.output_of[name], tensors.get(name), rows) for name in names], self
            )
        except ServerError as error:
            return error

    def _made(self, port: Port, data: Array | None, rows: int) -> Tensor:
        """An output that is as the configuration says; ServerError says what is not."""
        where = f"model '{self.model}', output '{port.name}'"
        if data is None:
            raise ServerError(Code.INTERNAL, f"{where}: execute did not return it", "BACKEND")
        datatype = "BYTES" if data.dtype == object else BY_NUMPY[data.dtype.name].name
        if datatype != port.datatype:
            raise ServerError(Code.INTERNAL, f"{where}: execute returned {datatype}, not {port.datatype}", "BACKEND")
        wanted = (rows, *port.dims) if self.max_rows else port.dims
        fits = len(wanted) == data.ndim and all(w in (-1, d) for w, d in zip(wanted, data.shape, strict=True))
        if not fits and port.inner is None:
            problem = f"execute returned shape {list(data.shape)}, the configuration says {list(wanted)}"
            raise ServerError(Code.INTERNAL, f"{where}: {problem}", "BACKEND")
        return Tensor(port.name, port.datatype, data if port.inner is None else data.reshape(wanted))


def _facts(request: Request, every: Sequence[str]) -> dict[str, Any]:
    place, wanted = request.sequence, [output.name for output in request.outputs]
    return {
        "id": request.id, "model": request.model, "outputs": wanted or every,
        "sequence": place.identity if place else 0, "flags": place.start + 2 * place.end if place else 0,
        "timeout": request.timeout_us, "parameters": dict(request.parameters),
    }  # fmt: skip


def _code(name: str) -> Code:
    return Code[name] if name in Code.__members__ else Code.INTERNAL


# -- loading ----------------------------------------------------------------------------------------------------------
def load_python_model(
    config: Config, version: int, folder: Path, submit: Submit, policies: Policies = NO_POLICIES
) -> EngineModel:
    """A version made ready: configuration completed by the model, a process for each instance, warm-up.

    `submit` asks other models of this server.
    """
    file = _model_file(config, folder / str(version))
    config = _completed(config, file, version)
    ports = _ports(config, folder)
    execute = partial(_executed, ports, version, submit)
    workers: list[Worker] = []
    instances: list[Instance] = []
    try:
        for number, place in enumerate(places_of(config, ["cpu"], policies)):
            workers.append(Worker(config.name, _command(config, file, version, number), _STARTING_SECONDS, place))
            instances.append(ProcessInstance(workers[-1]))
            warm_up(config, ports, _Alone(ports, partial(execute, instances[-1])), folder)
    except BaseException:
        for instance in instances:
            instance.close()
        for worker in workers:
            worker.close()
        raise
    statistics, latency = Statistics(), LatencyTable()
    scheduler = Scheduler(
        ports, version, _queue(config, len(instances), latency), lambda made: Threads(made, instances), statistics,
        latency, ordered=config.dynamic_batching.preserve_ordering,
        states=states_of(config, folder) if config.HasField("sequence_batching") else None, execute=execute,
    )  # fmt: skip
    digests = {"file_sha256": sha256(file)}
    return EngineModel(version, config, ports, scheduler, statistics, tuple(workers), digests)


def _executed(
    ports: PythonPorts, version: int, submit: Submit, instance: Instance, feeds: Feeds, requests: Sequence[Request]
) -> Mapping[str, Array]:
    """A run of a process that may say something meanwhile."""
    assert isinstance(instance, ProcessInstance)
    return instance.run(feeds, Conversation(requests, submit, partial(ports.respond, version)))


@dataclass(frozen=True)
class _Alone:
    """Runs feeds as a warm-up states them as one request; the responses of a decoupled model are dropped."""

    ports: Ports
    execute: Callable[[Feeds, Sequence[Request]], Mapping[str, Array]]

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """One request; an error fails the load."""
        tensors = tuple(Tensor(name, self.ports.input_of[name].datatype, data) for name, data in feeds.items())
        request = Request(self.ports.model, tensors, id="warm-up", part=lambda outcome, final: True)
        rows, _ = self.ports.check(request)
        results = self.execute(self.ports.gather([request]), [request])
        try:
            self.ports.split(results, [request], [rows])
        except PartlyRefused as refused:
            raise next(part for part in refused.parts if isinstance(part, ServerError)) from refused
        return results

    def close(self) -> None:
        """The instance is somebody else's."""


def _ports(config: Config, folder: Path) -> PythonPorts:
    plain = ports_of(config, folder)
    if not plain.inputs or not plain.outputs:
        problem = "config.pbtxt states no input or no output, and model.py has no auto_complete_config that does"
        raise invalid(f"model '{config.name}': {problem}")
    if config.sequence_batching.state:
        raise invalid(f"model '{config.name}': a model.py keeps its own state; sequence_batching.state is for engines")
    decoupled = config.model_transaction_policy.decoupled
    return PythonPorts(plain.model, plain.inputs, plain.outputs, plain.max_rows, decoupled)


def _queue(config: Config, instances: int, latency: LatencyTable) -> Queue:
    if config.HasField("sequence_batching"):
        return SequenceBatcher(sequence_rules(config, instances))
    return Batcher(rules_of(config), latency)


def _model_file(config: Config, folder: Path) -> Path:
    name = config.default_model_filename or "model.py"
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise invalid(f"model '{config.name}': default_model_filename '{name}' leads out of the version's folder")
    if "EXECUTION_ENV_PATH" in config.parameters:
        raise invalid(f"model '{config.name}': EXECUTION_ENV_PATH is not supported; install what model.py imports here")
    if not (folder / name).is_file():
        raise invalid(f"model '{config.name}': {folder.name}/ holds no {name}")
    return (folder / name).absolute()


def _arguments(config: Config, file: Path, version: int) -> dict[str, str]:
    """What `initialize` is given, and the file."""
    return {
        "file": str(file), "model_name": config.name, "model_version": str(version),
        "model_repository": str(file.parents[1]), "model_config": json.dumps(as_plain(config)),
        "log": " ".join(logs.chosen()),
    }  # fmt: skip


def _command(config: Config, file: Path, version: int, number: int) -> list[str]:
    instance = {
        "model_instance_kind": "CPU", "model_instance_device_id": "0", "model_instance_name": f"{config.name}_{number}"
    }  # fmt: skip
    return [_MODULE, json.dumps({**_arguments(config, file, version), **instance})]


def _completed(config: Config, file: Path, version: int) -> Config:
    """The configuration, completed by the model's `auto_complete_config` where it leaves inputs or outputs out."""
    full = config if config.input and config.output else _auto_completed(config, file, version)
    if not full.instance_group:
        full.instance_group.add(name=full.name, kind="KIND_CPU", count=1)
    if not full.HasField("version_policy"):
        full.version_policy.latest.num_versions = 1
    if any(enum_name(group, "kind") == "KIND_GPU" for group in full.instance_group):
        raise invalid(f"model '{full.name}': a model.py is given its tensors on the CPU; KIND_GPU is not supported")
    return full


def _auto_completed(config: Config, file: Path, version: int) -> Config:
    process, line = spawned([_MODULE, json.dumps({**_arguments(config, file, version), "complete": "yes"})])
    with line:
        line.settimeout(_STARTING_SECONDS)
        try:
            said = line.recv(LONGEST_MESSAGE)
        except (TimeoutError, ConnectionError):
            said = b""
    process.kill()
    process.wait()
    if not said.startswith(b"config "):
        reason = said.decode() or "its process ended or did not answer"
        raise invalid(f"model '{config.name}': {file.name} cannot complete its configuration: {reason}")
    return read_override(said.removeprefix(b"config ").decode(), config.name)


def has_python_backend(config: Config) -> bool:
    """Whether a configuration asks for this."""
    return bool(config.backend == BACKEND) or os.path.splitext(config.default_model_filename)[1] == ".py"

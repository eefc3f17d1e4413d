"""A model that is a graph of other models: each step is submitted as soon as its inputs are there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingot.server.config import Config
from ingot.server.ports import Ports, answer, ports_of
from ingot.server.request import Code, Done, Outcome, Request, RequestedOutput, ServerError, Tensor, invalid
from ingot.server.scheduler import Cancel, Closed, clock
from ingot.server.statistics import Statistics

Submit = Callable[[Request, Done], Cancel]


@dataclass(frozen=True)
class Step:
    """One model of an ensemble; maps are (the model's name of a tensor, the ensemble's)."""

    model: str
    version: int
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]


@dataclass(eq=False)
class EnsembleModel:
    """A loaded ensemble. Flows that have begun end before it closes."""

    version: int
    config: Config
    ports: Ports
    steps: tuple[Step, ...]
    submit_step: Submit
    statistics: Statistics = field(default_factory=Statistics)
    digests: Mapping[str, str] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _flows: int = 0
    _closing: bool = False

    @property
    def pending(self) -> int:
        """Nothing waits here; steps wait at their models."""
        return 0

    def submit(self, request: Request, done: Done) -> Cancel:
        """Begin the flow of a request."""
        rows, _ = self.ports.check(request)
        with self._changed:
            if self._closing:
                raise Closed
            self._flows += 1
        flow = _Flow(self, request, lambda outcome: self._finished(request, rows, begun, outcome, done))
        begun = clock()
        flow.start()
        return flow.cancel

    def close(self) -> None:
        """Take no more, wait for the flows."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._flows)

    def _finished(self, request: Request, rows: int, begun: int, outcome: Outcome, done: Done) -> None:
        if isinstance(outcome, ServerError):
            self.statistics.failed(clock() - begun, outcome.reason)
        else:
            self.statistics.succeeded(clock() - begun, rows)
        with self._changed:
            self._flows -= 1
            self._changed.notify_all()
        done(outcome)


class _Flow:
    """One request on its way through the steps; ends once, with an answer or the first error."""

    def __init__(self, ensemble: EnsembleModel, request: Request, done: Done) -> None:
        self._ensemble, self._request, self._done = ensemble, request, done
        self._tensors = {tensor.name: tensor for tensor in request.inputs}
        self._waiting = list(ensemble.steps)
        self._running = 0
        self._cancels: list[Cancel] = []
        self._over = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Submit every step whose inputs are there."""
        with self._lock:
            if self._over:
                return
            ready = [step for step in self._waiting if all(name in self._tensors for _, name in step.inputs)]
            self._waiting = [step for step in self._waiting if step not in ready]
            self._running += len(ready)
            self._over = finished = not ready and not self._running
        if finished:
            self._done(self._answer())
        for step in ready:
            self._submit(step)

    def cancel(self) -> bool:
        """Cancel the steps that wait at their models."""
        with self._lock:
            cancels = tuple(self._cancels)
        cancelled = [cancel() for cancel in cancels]
        return any(cancelled)

    def _submit(self, step: Step) -> None:
        request = self._request
        inputs = tuple(Tensor(own, x.datatype, x.data) for own, x in ((o, self._tensors[n]) for o, n in step.inputs))
        outputs = tuple(RequestedOutput(own, binary=True) for own, _ in step.outputs)
        asked = Request(
            step.model, inputs, step.version, request.id, outputs, request.sequence, request.priority,
            request.timeout_us, request.parameters, request.arrived, request.origin, caller=request.caller,
        )  # fmt: skip
        try:
            cancel = self._ensemble.submit_step(asked, lambda outcome: self._stepped(step, outcome))
        except ServerError as error:
            self._fail(error)
            return
        with self._lock:
            self._cancels.append(cancel)

    def _stepped(self, step: Step, outcome: Outcome) -> None:
        if isinstance(outcome, ServerError):
            self._fail(outcome)
            return
        names = dict(step.outputs)
        with self._lock:
            self._running -= 1
            for tensor in outcome.outputs:
                self._tensors[names[tensor.name]] = Tensor(names[tensor.name], tensor.datatype, tensor.data)
        self.start()

    def _fail(self, error: ServerError) -> None:
        with self._lock:
            self._running -= 1
            first, self._over = not self._over, True
        if first:
            self._done(error)

    def _answer(self) -> Outcome:
        ensemble, names = self._ensemble, [output.name for output in self._request.outputs]
        wanted = names or [port.name for port in ensemble.ports.outputs]
        missing = [name for name in wanted if name not in self._tensors]
        if missing:
            return ServerError(Code.INTERNAL, f"ensemble '{ensemble.config.name}': no step made {missing}", "BACKEND")
        outputs = [self._tensors[name] for name in wanted]
        return answer(self._request, ensemble.version, outputs, ensemble.ports)


def load_ensemble(
    config: Config, version: int, folder: Path, known: Callable[[str, int], Any], submit_step: Submit
) -> EnsembleModel:
    """An ensemble whose steps name loaded models and whose tensors all come from somewhere."""
    steps = tuple(
        Step(item.model_name, max(item.model_version, 0), tuple(item.input_map.items()), tuple(item.output_map.items()))
        for item in config.ensemble_scheduling.step
    )
    config.platform = "ensemble"
    ports = ports_of(config, folder)
    check_steps(config.name, steps, ports)
    for step in steps:
        try:
            found = known(step.model, step.version)
        except ServerError as error:
            raise invalid(f"ensemble '{config.name}' uses '{step.model}', which is not loaded: {error}") from error
        _check_maps(config.name, step, found.ports)
    return EnsembleModel(version, config, ports, steps, submit_step)


def check_steps(name: str, steps: Sequence[Step], ports: Ports) -> None:
    """Every tensor a step or the ensemble needs is made exactly once, without a circle."""
    if not steps:
        raise invalid(f"ensemble '{name}' has no steps")
    made = [port.name for port in ports.inputs] + [tensor for step in steps for _, tensor in step.outputs]
    twice = {tensor for tensor in made if made.count(tensor) > 1}
    needed = {tensor for step in steps for _, tensor in step.inputs} | {port.name for port in ports.outputs}
    if twice or needed - set(made):
        problem = f"make {sorted(twice)} more than once" if twice else f"never make {sorted(needed - set(made))}"
        raise invalid(f"the steps of ensemble '{name}' {problem}")
    there, waiting = {port.name for port in ports.inputs}, list(steps)
    while waiting:
        ready = [step for step in waiting if all(tensor in there for _, tensor in step.inputs)]
        if not ready:
            raise invalid(f"the steps of ensemble '{name}' form a circle: {', '.join(step.model for step in waiting)}")
        there |= {tensor for step in ready for _, tensor in step.outputs}
        waiting = [step for step in waiting if step not in ready]


def _check_maps(name: str, step: Step, ports: Ports) -> None:
    known: tuple[tuple[str, Sequence[tuple[str, str]], Mapping[str, Any]], ...] = (
        ("input", step.inputs, ports.input_of),
        ("output", step.outputs, ports.output_of),
    )
    for kind, pairs, there in known:
        for own, _ in pairs:
            if own not in there:
                raise invalid(f"ensemble '{name}': model '{step.model}' has no {kind} '{own}'")
    given = {own for own, _ in step.inputs}
    missing = [port.name for port in ports.inputs if port.name not in given and not port.optional]
    if missing:
        raise invalid(f"ensemble '{name}': nothing is mapped to {missing} of model '{step.model}'")

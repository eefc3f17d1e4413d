"""Engines of a model in different precisions: built once each, asked, timed side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir

from ingot.build import build
from ingot.config import BuildConfig
from ingot.engine import Engine
from ingot.precision import metric as metrics
from ingot.precision.metric import Answer, Metric
from ingot.runtime.session import Session

Transform = Callable[[Mapping[str, str]], onnx_ir.Model]
_GROUPS = 20  # of samples, that are left out in turn
_ROUNDS, _SHORTEST, _PAUSE = 15, 2e-3, 1e-3  # rounds; seconds that one measurement takes at least; between two engines


@dataclass(frozen=True)
class Choice:
    """What the nodes are computed in: `nodes` by name, the rest in `rest`, a precision of BuildConfig."""

    nodes: Mapping[str, str] = field(default_factory=dict)
    rest: str = "fp32"

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal choices."""
        return (self.rest, *sorted(self.nodes.items()))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and self.key == other.key


FLOAT32 = Choice()


@dataclass(frozen=True, eq=False)
class Trials:
    """`transform` makes the model of an assignment; `samples` are asked, the float32 engine's answers the reference."""

    transform: Transform
    config: BuildConfig
    metric: Metric
    samples: Sequence[Answer]
    _answers: dict[Choice, list[Answer]] = field(default_factory=dict)
    _engines: dict[Choice, Engine] = field(default_factory=dict)
    _times: dict[Choice, float] = field(default_factory=dict)
    _scores: dict[Choice, tuple[float, float]] = field(default_factory=dict)

    def answers(self, choice: Choice) -> list[Answer]:
        """What an engine of this choice says to the samples; built with nothing timed."""
        if choice not in self._answers:
            _keep(self._answers, choice, self.ask(self._built(choice, level=0), self.samples))
        return self._answers[choice]

    def score(self, choice: Choice) -> float:
        """By the metric."""
        return self._judged(choice)[0]

    def uncertainty(self, choice: Choice) -> float:
        """Standard error of what the score loses against float32, for so many samples."""
        return self._judged(choice)[1]

    def _judged(self, choice: Choice) -> tuple[float, float]:
        if choice not in self._scores:
            wanted = self.answers(FLOAT32)
            self._scores[choice] = self.metric(self.answers(choice), self.samples, wanted), self._jackknife(choice)
        return self._scores[choice]

    def _jackknife(self, choice: Choice) -> float:
        """Over groups of samples; 0 for a single sample, of which nothing can be said."""
        count = min(_GROUPS, len(self.samples))
        if choice == FLOAT32 or count < 2:
            return 0.0
        lost = [self._lost_without(choice, group, count) for group in range(count)]
        mean = statistics.fmean(lost)
        return math.sqrt((count - 1) / count * sum((x - mean) ** 2 for x in lost))

    def _lost_without(self, choice: Choice, group: int, count: int) -> float:
        def rest(values: Sequence[Answer]) -> list[Answer]:
            return [value for i, value in enumerate(values) if i % count != group]

        samples, wanted = rest(self.samples), rest(self.answers(FLOAT32))
        return self.metric(wanted, samples, wanted) - self.metric(rest(self.answers(choice)), samples, wanted)

    def decibels(self, choice: Choice) -> float:
        """Signal to noise of the worst output, beside float32."""
        return metrics.decibels(self.answers(choice), self.answers(FLOAT32))

    def fewer(self, count: int) -> Trials:
        """The same for the first samples only."""
        few = list(self.samples[:count])
        known = {choice: answers[:count] for choice, answers in self._answers.items()}
        return replace(self, samples=few, _answers=known, _scores={})

    def engine(self, choice: Choice) -> Engine:
        """An engine as the user gets it, not verified yet."""
        if choice not in self._engines:
            _keep(self._engines, choice, self._built(choice, self.config.level))
        return self._engines[choice]

    def verified(self, choice: Choice) -> Engine:
        """The same, compared with the reference meaning of the model it was built from."""
        return build(self.transform(choice.nodes), replace(self.config, precision=choice.rest))

    def ask(self, engine: Engine, samples: Sequence[Answer]) -> list[Answer]:
        """The engine's answers."""
        with self.session(engine) as session:
            return [*metrics.answers(session.run, samples, [spec.name for spec in engine.inputs])]

    @contextmanager
    def session(self, engine: Engine) -> Iterator[Session]:
        """The engine on the device it was built for."""
        with Session(engine, device=engine.variants[0].target, threads=self.config.threads) as session:
            yield session

    def microseconds(self, choice: Choice) -> float:
        """A run's median; measured in turns with the float32 engine, and scaled by how that one fares meanwhile."""
        if FLOAT32 not in self._times:
            self._times[FLOAT32] = self._in_turns([FLOAT32])[0]
        if choice not in self._times:
            reference, mine = self._in_turns([FLOAT32, choice])
            self._times[choice] = self._times[FLOAT32] * mine / reference
        return self._times[choice]

    def ratio(self, choice: Choice, other: Choice) -> float:
        """Time of the one over that of the other, measured in turns anew."""
        mine, theirs = self._in_turns([choice, other])
        return mine / theirs

    def step_times(self, choice: Choice) -> dict[tuple[str, ...], float]:
        """Microseconds of each step, by the user's nodes it computes."""
        engine = self.engine(choice)
        with self.session(engine) as session:
            feeds = self.timing_feeds(engine)
            session.run(feeds)
            runs = [session.profile(feeds) for _ in range(_ROUNDS)]
        columns = list(zip(*runs, strict=True))
        return {column[0].nodes: statistics.median(step.microseconds for step in column) for column in columns}

    def timing_feeds(self, engine: Engine) -> dict[str, Any]:
        """A sample, repeated or cut to the profile's typical shape."""
        sample = self.samples[0]
        shapes = {spec.name: spec.opt or np.shape(sample[spec.name]) for spec in engine.inputs}
        return {name: _resized(sample[name], shape) for name, shape in shapes.items()}

    def _in_turns(self, choices: Sequence[Choice]) -> list[float]:
        engines = [self.engine(choice) for choice in choices]
        with ExitStack() as stack:
            runs = [_repeated(stack.enter_context(self.session(e)), self.timing_feeds(e)) for e in engines]
            rounds = [[_after_a_pause(run) for run in runs] for _ in range(_ROUNDS)]
        return [statistics.median(column) * 1e6 for column in zip(*rounds, strict=True)]

    def _built(self, choice: Choice, level: int) -> Engine:
        config = replace(self.config, precision=choice.rest, level=level, verify=False)
        return build(self.transform(choice.nodes), config)


def _keep(known: dict[Choice, Any], choice: Choice, value: Any) -> None:
    """Float32's and the last one: what many choices hold together may be larger than the machine."""
    for other in [c for c in known if c not in (FLOAT32, choice)]:
        del known[other]
    known[choice] = value


def _resized(value: Any, shape: Sequence[int]) -> Any:
    array = np.asarray(value)
    return array if array.shape == tuple(shape) else np.ascontiguousarray(np.resize(array, shape))


def _repeated(session: Session, feeds: Mapping[str, Any]) -> Callable[[], float]:
    """A function that gives the seconds of one run, taken over as many as last long enough."""
    session.run(feeds)
    start = time.perf_counter()
    session.run(feeds)
    count = max(1, round(_SHORTEST / max(time.perf_counter() - start, 1e-7)))

    def seconds() -> float:
        begin = time.perf_counter()
        for _ in range(count):
            session.run(feeds)
        return (time.perf_counter() - begin) / count

    return seconds


def _after_a_pause(run: Callable[[], float]) -> float:
    """The workers of the engine before are asleep by then: two that spin disturb each other."""
    time.sleep(_PAUSE)
    return run()

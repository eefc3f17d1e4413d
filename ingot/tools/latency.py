"""The timing loop of trtexec: streams, warm-up, duration, and what is said of the samples."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Run = Callable[[], Any]
UNSTABLE = 0.01


@dataclass(frozen=True)
class Sample:
    """One inference, in milliseconds since the start of the measurement."""

    start: float
    end: float
    enqueue: float

    @property
    def latency(self) -> float:
        """Milliseconds from call to result."""
        return self.end - self.start


@dataclass(frozen=True)
class Settings:
    """When to stop: after `duration` seconds and at least `iterations` runs, following `warm_up` ms that do not
    count."""

    iterations: int = 10
    warm_up: float = 200.0
    duration: float = 3.0
    sleep: float = 0.0
    idle: float = 0.0


@dataclass(frozen=True)
class Summary:
    """Statistics of a series in milliseconds."""

    minimum: float
    maximum: float
    mean: float
    median: float
    percentiles: Mapping[float, float] = field(default_factory=dict)
    variation: float = 0.0


def measure(runs: Sequence[Run], settings: Settings, clock: Callable[[], float] = time.perf_counter) -> list[Sample]:
    """Samples of all streams (one thread per entry of `runs`), in order of their start."""
    samples: list[list[Sample]] = [[] for _ in runs]
    failures: list[BaseException] = []
    for run in runs:
        _warm_up(run, settings, clock)
    begin = clock()

    def stream(number: int) -> None:
        try:
            _stream(runs[number], settings, clock, begin, samples[number])
        except BaseException as error:  # noqa: BLE001  handed to the caller's thread below
            failures.append(error)

    if len(runs) == 1:
        _stream(runs[0], settings, clock, begin, samples[0])
    else:
        threads = [threading.Thread(target=stream, args=(i,)) for i in range(len(runs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return sorted((s for stream_ in samples for s in stream_), key=lambda s: s.start)


def _warm_up(run: Run, settings: Settings, clock: Callable[[], float]) -> None:
    start = clock()
    run()
    while (clock() - start) * 1e3 < settings.warm_up:
        run()


def _stream(run: Run, settings: Settings, clock: Callable[[], float], begin: float, samples: list[Sample]) -> None:
    while len(samples) < max(settings.iterations, 1) or clock() - begin < settings.duration:
        if settings.sleep or settings.idle:
            time.sleep((settings.sleep + settings.idle) / 1e3)
        start = clock()
        run()
        end = clock()
        samples.append(Sample((start - begin) * 1e3, (end - begin) * 1e3, 0.0))


def summarise(values: Sequence[float], percentiles: Sequence[float] = (90, 95, 99)) -> Summary:
    """Statistics of a series."""
    array = np.asarray(values, np.float64)
    ranks = {p: float(np.percentile(array, p, method="inverted_cdf")) for p in percentiles}
    mean = float(array.mean())
    variation = float(array.std() / mean) if mean else 0.0
    return Summary(float(array.min()), float(array.max()), mean, float(np.median(array)), ranks, variation)

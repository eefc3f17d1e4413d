"""Models without engines: instances that tests hold, fail or count."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ingot.server.batcher import Batcher, Rules
from ingot.server.drivers import OnLoop, Threads
from ingot.server.latency import LatencyTable
from ingot.server.mailbox import Mailbox
from ingot.server.ports import Port, Ports
from ingot.server.request import Outcome, Request, Response, Tensor
from ingot.server.scheduler import Driver, Scheduler
from ingot.server.statistics import Statistics

PORTS = Ports("m", (Port("x", "FP32", (2,)),), (Port("y", "FP32", (2,)),), 8)


@dataclass
class HeldInstance:
    """y = 2 x, once the gate is open; says when it has begun; fails on negative numbers."""

    gate: threading.Event = field(default_factory=threading.Event)
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    rows: list[int] = field(default_factory=list)
    closed: bool = False

    def run(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        self.rows.append(len(feeds["x"]))
        self.begun.release()
        assert self.gate.wait(60)
        if (feeds["x"] < 0).any():
            raise ValueError("negative")
        return {"y": feeds["x"] * 2}

    def close(self) -> None:
        self.closed = True


def opened() -> HeldInstance:
    instance = HeldInstance()
    instance.gate.set()
    return instance


@dataclass
class Answers:
    """Collects outcomes; `wait` until so many are there."""

    outcomes: list[Outcome] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, outcome: Outcome) -> None:
        with self._changed:
            self.outcomes.append(outcome)
            self._changed.notify_all()

    def wait(self, count: int) -> list[Outcome]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.outcomes) >= count, 20), f"{len(self.outcomes)} of {count}"
            return list(self.outcomes)


def request(value: float, rows: int = 1, **fields: Any) -> Request:
    return Request("m", (Tensor("x", "FP32", np.full((rows, 2), value, np.float32)),), **fields)


def value_of(outcome: Outcome) -> float:
    assert isinstance(outcome, Response), outcome
    return float(outcome.outputs[0].data[0, 0])


def scheduler(
    *instances: Any, rules: Rules | None = None, loop: Mailbox | None = None, ports: Ports = PORTS, **options: Any
) -> Scheduler:
    latency = LatencyTable()

    def drive(made: Scheduler) -> Driver:
        return Threads(made, instances) if loop is None else OnLoop(made, instances[0], loop)

    queue = Batcher(rules or Rules(max_rows=8), latency)
    return Scheduler(ports, 1, queue, drive, Statistics(), latency, **options)

"""Traffic as the gateways would count it, drawn: what the judge is calibrated on. No clock, no network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ingot.release import events, judge
from ingot.release.rollout import State, advance
from ingot.release.spec import Rollout, parse
from ingot.release.windows import Counters, Observation, bucket_of

SPEC = """
model: simulated
stable: v1
candidates: [v2]
versions:
  v1: {endpoints: [{url: 'http://localhost:1'}]}
  v2: {endpoints: [{url: 'http://localhost:2'}]}
metrics:
  errors: {kind: errorRate}
  slow: {kind: latency}
  shift: {kind: latencyShift}
steps:
- {setWeight: 5}
- {analysis: {metrics: [errors, slow, shift], duration: 120s}}
- {setWeight: 25}
- {analysis: {metrics: [errors, slow, shift], duration: 120s}}
- {setWeight: 50}
- {analysis: {metrics: [errors, slow, shift], duration: 120s}}
"""


@dataclass(frozen=True)
class Behaviour:
    """A version: share of errors; lognormal latency by its median in seconds and sigma."""

    errors: float = 0.01
    median: float = 0.010
    sigma: float = 0.4


@dataclass
class Traffic:
    """So many requests a second, counted by one gateway, second by second."""

    rate: float
    versions: dict[str, Behaviour]
    random: np.random.Generator
    now: float = 0.0

    def __post_init__(self) -> None:
        self.counters = {name: Counters(histogram={}) for name in self.versions}

    def seconds(self, count: int, weights: dict[str, float]) -> Iterator[Observation]:
        """One observation a second; weights in percent."""
        for _ in range(count):
            self.now += 1.0
            for name, weight in weights.items():
                self._serve(name, int(self.random.poisson(self.rate * weight / 100)))
            snapshot = {name: copied(counters) for name, counters in self.counters.items()}
            yield Observation("simulated", self.now, snapshot)

    def _serve(self, name: str, requests: int) -> None:
        behaviour, counters = self.versions[name], self.counters[name]
        errors = int(self.random.binomial(requests, behaviour.errors))
        counters.requests += requests
        counters.errors += errors
        drawn = behaviour.median * np.exp(behaviour.sigma * self.random.standard_normal(requests - errors))
        for latency in drawn:
            bucket = bucket_of(float(latency))
            counters.histogram[bucket] = counters.histogram.get(bucket, 0) + 1


def copied(counters: Counters) -> Counters:
    return Counters(requests=counters.requests, errors=counters.errors, histogram=dict(counters.histogram))


@dataclass(frozen=True)
class Course:
    """How a simulated rollout ended: promoted, or failed after so many seconds of its first analysis."""

    failed: bool
    seconds: float
    reason: str
    canary_requests: int


def simulate(traffic: Traffic, spec: Rollout, every: int = 1) -> Course:
    """One rollout through the real state machine and the real judge, looking every so many seconds."""
    observations: list[Observation] = list(traffic.seconds(60, {"v1": 100.0}))
    state, _ = advance(None, events.Applied(spec), traffic.now)
    state, _ = advance(state, events.Ready("v2"), traffic.now)
    begun = traffic.now
    while state.stage == "steps":
        observations += traffic.seconds(every, percents(state))
        observations = observations[-400:]
        state = looked(state, observations, traffic.now)
    failed = state.stage == "aborted"
    return Course(failed, traffic.now - begun, state.message, traffic.counters["v2"].requests)


def percents(state: State) -> dict[str, float]:
    from ingot.release.slots import weights

    return {version: count / 100 for version, count in weights(state.assignment).items()}


def looked(state: State, observations: Sequence[Observation], now: float) -> State:
    """Every running metric judged once."""
    for analysis in state.analyses:
        for metric in analysis.metrics:
            verdict = judge.judge(judge.Question(state, analysis, metric, "v2", observations, now))
            if verdict.outcome is not None:
                found = events.Judged(analysis.run, metric, "v2", verdict.outcome, verdict.reason)
                state, _ = advance(state, found, now)
    return advance(state, events.Tick(), now)[0]


def rollouts(count: int, canary: Behaviour, seed: int, every: int = 1, text: str = SPEC) -> list[Course]:
    """Independent rollouts at 200 requests a second; the canary behaves like this, stable as usual."""
    spec, courses = parse(text), []
    for index in range(count):
        versions = {"v1": Behaviour(), "v2": canary}
        courses.append(simulate(Traffic(200.0, versions, np.random.default_rng([seed, index])), spec, every))
    return courses


SAME = Behaviour()
SLOWER = replace(SAME, median=SAME.median * 2.37)  # every quantile, P95 too, +137 %
WORSE = replace(SAME, errors=0.03)

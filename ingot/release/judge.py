"""Verdicts: (metric, what was counted, when) -> Successful, Failed, Inconclusive, Error, or not yet. Pure.

The error probability α of a rollout is split evenly over its tests: each metric of each analysis, for each
candidate. Looks
cost nothing: the tests of rates hold at every one, and Mann-Whitney looks once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ingot.release import latency, rates, srm, windows
from ingot.release.events import Outcome
from ingot.release.rollout import Analysis, State
from ingot.release.slots import weights
from ingot.release.spec import (
    WHOLE,
    Agreement,
    ErrorRate,
    Feedback,
    LatencyExceedance,
    LatencyShift,
    Metric,
    Rollout,
    SampleRatio,
    seconds,
)  # fmt: skip
from ingot.release.windows import Counters, Observation

BASELINE = 60.0  # seconds before an analysis that tell stable's own P95
_ENOUGH_FOR_P95 = 200


@dataclass(frozen=True)
class Verdict:
    """What a metric says of a version; no outcome: it goes on."""

    outcome: Outcome | None
    reason: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A metric of an analysis, about a candidate, at a moment."""

    state: State
    analysis: Analysis
    metric: str
    version: str
    observations: Sequence[Observation]
    now: float

    @property
    def config(self) -> Any:
        """The metric as configured."""
        return self.state.spec.metrics[self.metric]

    @property
    def begin(self) -> float:
        """When its samples begin."""
        return self.analysis.since + seconds(self.config.initial_delay)

    @property
    def ended(self) -> bool:
        """Whether the analysis' time is over."""
        return self.analysis.until is not None and self.now >= self.analysis.until

    @property
    def given_up(self) -> bool:
        """Whether waiting for traffic is over too."""
        return self.analysis.give_up is not None and self.now >= self.analysis.give_up

    def window(self, version: str) -> Counters:
        """What was counted for a version since the beginning."""
        return windows.between(self.observations, version, self.begin, self.now)


def tests(spec: Rollout) -> int:
    """Among how many tests α is split."""
    analyses = [spec.analysis.metrics] if spec.analysis is not None else []
    analyses += [step.analysis.metrics for step in spec.steps if step.analysis is not None]
    counted = [name for metrics in analyses for name in metrics if not spec.metrics[name].dry_run]
    return max(1, len(counted) * len(spec.candidates))


def threshold(spec: Rollout) -> float:
    """log 1/α of one test."""
    return math.log(tests(spec) / spec.alpha)


def judge(question: Question) -> Verdict:
    """The verdict of one of the gateway's own metrics."""
    return _JUDGES[type(question.config)](question)


# -- rates ------------------------------------------------------------------------------------------------------------
Count = Callable[[Counters], tuple[int, int]]


def _looks(question: Question, count: Count) -> Iterator[rates.Look]:
    """Intervals between observations, canary and stable over the same ones."""
    before = {}
    for version in (question.version, question.state.stable):
        before[version] = count(windows.at(question.observations, version, question.begin))
    latest: dict[tuple[str, str], Counters] = {}
    for observation in question.observations:
        for version in before:
            if version in observation.counters:
                latest[observation.boot, version] = observation.counters[version]
        if not question.begin < observation.time <= question.now:
            continue
        now = {v: _summed(count, [c for (_, name), c in latest.items() if name == v]) for v in before}
        steps = [
            (now[v][0] - before[v][0], now[v][1] - before[v][1]) for v in (question.version, question.state.stable)
        ]
        if not all(requests > 0 for _, requests in steps):
            continue  # an interval lasts until both have had requests
        before = now
        yield rates.Look(*steps[0], *steps[1])


def _summed(count: Count, counters: Sequence[Counters]) -> tuple[int, int]:
    pairs = [count(one) for one in counters]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def _rate(question: Question, count: Count, ratios: Sequence[float], what: str) -> Verdict:
    """Failed when the evidence crosses its threshold; Successful at the end with enough samples."""
    looks = list(_looks(question, count))
    canary, stable = sum(k.canary for k in looks), sum(k.stable for k in looks)
    events = sum(k.canary_events for k in looks), sum(k.stable_events for k in looks)
    values = [event / number if number else None for event, number in zip(events, (canary, stable), strict=True)]
    found = float(max(rates.log_evidence(looks, ratios), default=-math.inf)) if looks else -math.inf
    limit = threshold(question.state.spec)
    evidence = {
        "canary": values[0], "stable": values[1], "canary_samples": canary, "stable_samples": stable,
        "log_evidence": round(found, 3) if math.isfinite(found) else None, "needed": round(limit, 3),
    }  # fmt: skip
    said = f"{what} {_percent(values[0])} of {canary}, stable {_percent(values[1])} of {stable}"
    return _concluded(question, min(canary, stable), found >= limit, said, evidence)


def _concluded(question: Question, samples: int, failed: bool, said: str, evidence: Mapping[str, Any]) -> Verdict:
    """The ladder all metrics share: too little traffic, failed, still running, successful."""
    least = question.config.minimum_samples
    if samples < least:
        waiting = f"{samples} samples, {least} needed: {said}"
        return Verdict("Inconclusive" if question.given_up else None, f"too little traffic: {waiting}", evidence)
    if failed:
        return Verdict("Failed", said, evidence)
    return Verdict("Successful" if question.ended else None, said, evidence)


def _percent(value: float | None) -> str:
    return "nothing" if value is None else f"{100 * value:.3g} %"


def _errors(question: Question) -> Verdict:
    return _rate(question, lambda c: (c.errors, c.requests), rates.HIGHER, "errors")


def _exceedance(question: Question) -> Verdict:
    limit = p95_of_stable(question) if question.config.threshold is None else seconds(question.config.threshold)
    if limit is None:
        return _concluded(question, 0, False, "stable's own P95 is not known yet", {})

    def slow(counters: Counters) -> tuple[int, int]:
        return windows.slower_than(counters.histogram, limit), counters.requests - counters.errors

    found = _rate(question, slow, rates.HIGHER, f"slower than {1e3 * limit:.3g} ms:")
    canary = windows.quantile(question.window(question.version).histogram, 0.95)
    stable = windows.quantile(question.window(question.state.stable).histogram, 0.95)
    return Verdict(found.outcome, found.reason, {**found.evidence, "p95": canary, "stable_p95": stable, "limit": limit})


def p95_of_stable(question: Question) -> float | None:
    """A threshold fixed before the analysis, or by its first answers where there were none before."""
    stable, begin = question.state.stable, question.begin
    earlier = windows.between(question.observations, stable, begin - BASELINE, begin)
    if sum(earlier.histogram.values()) >= _ENOUGH_FOR_P95:
        return windows.quantile(earlier.histogram, 0.95)
    for moment in sorted({o.time for o in question.observations if begin < o.time <= question.now}):
        first = windows.between(question.observations, stable, begin, moment)
        if sum(first.histogram.values()) >= _ENOUGH_FOR_P95:
            return windows.quantile(first.histogram, 0.95)
    return None


def _feedback(question: Question) -> Verdict:
    name = question.config.event
    return _rate(question, lambda c: c.feedback.get(name, (0, 0)), rates.LOWER, f"good {name}")


# -- the others -------------------------------------------------------------------------------------------------------
def _shift(question: Question) -> Verdict:
    canary, stable = (question.window(v).histogram for v in (question.version, question.state.stable))
    samples = min(sum(canary.values()), sum(stable.values()))
    if not question.ended or samples < question.config.minimum_samples:
        return _concluded(question, samples, False, "Mann-Whitney looks once, at the end", {})
    found = latency.shift(canary, stable)
    alpha = min(1 - question.config.confidence, math.exp(-threshold(question.state.spec)))
    failed = found.p_value <= alpha and found.factor >= 1 + question.config.effect
    said = f"{found.factor:.2f} times as slow at the median pair, p = {found.p_value:.2g}"
    evidence = {"factor": found.factor, "p_value": found.p_value, "alpha": alpha, "samples": samples}
    return _concluded(question, samples, failed, said, evidence)


def _agreement(question: Question) -> Verdict:
    seen = question.window(question.version)
    share = seen.agreed / seen.mirrored if seen.mirrored else None
    limit = threshold(question.state.spec)
    found = rates.log_evidence_against(1 - question.config.minimum, seen.mirrored - seen.agreed, seen.mirrored)
    said = f"{_percent(share)} of {seen.mirrored} mirrored requests answered alike"
    evidence = {"agreement": share, "mirrored": seen.mirrored, "log_evidence": round(found, 3), "needed": limit}
    return _concluded(question, seen.mirrored, found >= limit, said, evidence)


def _sample_ratio(question: Question) -> Verdict:
    latest: dict[str, Mapping[str, int]] = {o.boot: o.users for o in question.observations if o.time <= question.now}
    share = weights(question.state.assignment).get(question.version, 0) / WHOLE
    users = [sum(users.get(v, 0) for users in latest.values()) for v in (question.version, question.state.stable)]
    if not 0 < share < 1:
        return _concluded(question, 0, False, "one version has all traffic", {})
    rest = weights(question.state.assignment).get(question.state.stable, 0) / WHOLE
    found = srm.log_evidence(users[0], sum(users), share / (share + rest))
    limit = threshold(question.state.spec)
    said = f"{users[0]} of {sum(users)} users, {_percent(share / (share + rest))} expected"
    evidence = {"users": users[0], "everyone": sum(users), "log_evidence": round(found, 3), "needed": limit}
    if sum(users) >= question.config.minimum_samples and found >= limit:
        return Verdict("Inconclusive", f"sample ratio: {said}", evidence)
    return _concluded(question, sum(users), False, said, evidence)


_JUDGES: Mapping[type, Callable[[Question], Verdict]] = {
    ErrorRate: _errors, LatencyExceedance: _exceedance, LatencyShift: _shift, Agreement: _agreement,
    Feedback: _feedback, SampleRatio: _sample_ratio,
}  # fmt: skip


def own(metric: Metric) -> bool:
    """Whether the gateways' counters answer it."""
    return type(metric) in _JUDGES

"""Verdicts on drawn and on made-up counts: what is found, what is not, and how sure one can be."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.release_simulation import SAME, SLOWER, SPEC, WORSE, Behaviour, rollouts
from ingot.release import events, guards, judge, latency, rates, srm, windows
from ingot.release.rollout import State, advance
from ingot.release.spec import parse
from ingot.release.windows import Counters, Observation

METRICS = """
model: digits
stable: v1
candidates: [v2]
versions: {v1: {endpoints: [{url: 'http://h:1'}]}, v2: {endpoints: [{url: 'http://h:2'}]}}
metrics:
  errors: {kind: errorRate}
  slow: {kind: latency, threshold: 100ms}
  shift: {kind: latencyShift}
  alike: {kind: agreement, minimum: 0.95}
  liked: {kind: feedback, event: click}
  ratio: {kind: sampleRatio}
guards: {p99: 200ms, errorRate: 0.2, gpuMemory: 1000}
steps:
- {setWeight: 10}
- {analysis: {metrics: [errors, slow, shift, alike, liked, ratio], duration: 60s, giveUp: 60s}}
"""


def state() -> State:
    begun, _ = advance(None, events.Applied(parse(METRICS)), 0.0)
    return advance(begun, events.Ready("v2"), 0.0)[0]


def counted(requests: int, errors: int = 0, seconds: float = 0.01, **others: Any) -> Counters:
    return Counters(
        requests=requests, errors=errors, histogram={windows.bucket_of(seconds): requests - errors}, **others
    )


def verdict(metric: str, canary: Counters, stable: Counters, now: float = 30.0, **others: Any) -> judge.Verdict:
    begun = state()
    observations = [Observation("g", now - 1, {"v2": canary, "v1": stable}, **others)]
    return judge.judge(judge.Question(begun, begun.analyses[0], metric, "v2", observations, now))


# -- verdicts ---------------------------------------------------------------------------------------------------------
def test_significance_between_versions() -> None:
    """kserve #335: worse by chance goes on, worse beyond chance fails, with the figures."""
    assert verdict("errors", counted(300, 4), counted(3000, 30)).outcome is None
    failed = verdict("errors", counted(300, 30), counted(3000, 30))
    assert failed.outcome == "Failed" and "errors 10 % of 300, stable 1 % of 3000" in failed.reason
    assert failed.evidence["log_evidence"] >= failed.evidence["needed"]
    assert verdict("errors", counted(300, 3), counted(3000, 30), now=61.0).outcome == "Successful"


def test_low_traffic_waits_and_then_says_so() -> None:
    """argo #1905, flagger #1501: no verdict on a handful of requests, neither good nor bad."""
    for now, outcome in ((30.0, None), (61.0, None), (121.0, "Inconclusive")):
        found = verdict("errors", counted(7, 7), counted(3000), now)
        assert found.outcome == outcome and "too little traffic" in found.reason


def test_the_canarys_own_counts_are_judged() -> None:
    """argo #1700: a bad canary beside a large, good stable; and a bad stable beside a good canary."""
    assert verdict("errors", counted(200, 100), counted(100_000)).outcome == "Failed"
    assert verdict("errors", counted(200), counted(100_000, 50_000)).outcome is None


def test_a_slower_canary_fails_and_a_faster_one_does_not() -> None:
    slow, fast = counted(200, seconds=0.2), counted(2000, seconds=0.01)
    assert verdict("slow", slow, fast).outcome == "Failed"
    assert verdict("slow", counted(200), counted(2000, seconds=0.2)).outcome is None
    assert verdict("shift", slow, fast).outcome is None, "Mann-Whitney looks at the end alone"
    assert verdict("shift", slow, fast, now=61.0).outcome == "Failed"
    assert verdict("shift", counted(200, seconds=0.011), fast, now=61.0).outcome == "Successful", "a small effect"


def test_agreement_on_mirrored_traffic() -> None:
    assert verdict("alike", Counters(mirrored=200, agreed=120), Counters()).outcome == "Failed"
    assert verdict("alike", Counters(mirrored=200, agreed=197), Counters(), now=61.0).outcome == "Successful"


def test_feedback_of_users() -> None:
    good = Counters(feedback={"click": (500, 1000)})
    assert verdict("liked", Counters(feedback={"click": (30, 300)}), good).outcome == "Failed"
    assert verdict("liked", Counters(feedback={"click": (150, 300)}), good, now=61.0).outcome == "Successful"


def test_sample_ratio_mismatch_is_inconclusive() -> None:
    mismatch = verdict("ratio", Counters(), Counters(), users={"v2": 50, "v1": 9950})
    assert mismatch.outcome == "Inconclusive" and "50 of 10000 users" in mismatch.reason
    assert verdict("ratio", Counters(), Counters(), users={"v2": 990, "v1": 9010}).outcome is None


def test_a_restarted_gateway_loses_no_counts() -> None:
    """Another boot counts from zero; what the first one counted stays."""
    rows = [
        Observation("a", 1.0, {"v2": counted(100, 10)}), Observation("a", 2.0, {"v2": counted(150, 15)}),
        Observation("b", 3.0, {"v2": counted(20, 2)}), Observation("b", 4.0, {"v2": counted(50, 5)}),
    ]  # fmt: skip
    assert windows.at(rows, "v2", 4.0).requests == 200
    assert windows.between(rows, "v2", 1.5, 4.0).requests == 100
    assert windows.between(rows, "v2", 2.0, 4.0).errors == 5


def test_guards_hold_absolute_limits() -> None:
    begun = state()
    counters = {"v2": counted(100, seconds=0.5), "v1": counted(900)}
    rows = [Observation("g", 5.0, counters, gauges={"v2": {"gpuMemory": 2e3}})]
    found = {breach.guard: breach.reason for breach in guards.breaches(begun, rows, 6.0)}
    assert set(found) == {"p99", "gpuMemory"} and "limit 200ms" in found["p99"]
    assert list(guards.breaches(begun, [Observation("g", 5.0, {"v2": counted(10, 10)})], 6.0)) == [], "too few"
    assert next(guards.breaches(begun, [Observation("g", 5.0, {"v2": counted(60, 30)})], 6.0)).guard == "errorRate"


def test_alpha_is_split_over_the_tests_of_a_rollout() -> None:
    assert judge.tests(parse(METRICS)) == 6
    assert judge.threshold(parse(METRICS)) == pytest.approx(math.log(600))
    assert judge.tests(parse(METRICS.replace("latencyShift}", "latencyShift, dryRun: true}"))) == 5


# -- the tests themselves ---------------------------------------------------------------------------------------------
def false_alarms(rate: float, share: float, alpha: float, runs: int = 400, looks: int = 300) -> float:
    random = np.random.default_rng(7)
    found = 0
    for _ in range(runs):
        canary, stable = random.poisson(200 * share, looks), random.poisson(200 * (1 - share), looks)
        bad = random.binomial(canary, rate), random.binomial(stable, rate)
        drawn = [rates.Look(*map(int, row)) for row in zip(bad[0], canary, bad[1], stable, strict=True)]
        found += rates.log_evidence(drawn).max() >= -math.log(alpha)
    return found / runs


@pytest.mark.parametrize(("rate", "share"), [(0.002, 0.05), (0.05, 0.5), (0.4, 0.1)])
def test_rates_keep_their_promise_at_every_look(rate: float, share: float) -> None:
    assert false_alarms(rate, share, alpha=0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_the_normal_form_does_not_keep_it() -> None:
    """Why it is not used: pooled variance, errors of 0.2 %, asked for 1 %."""
    random = np.random.default_rng(7)
    canary, stable = random.poisson(10, (1000, 600)), random.poisson(190, (1000, 600))
    bad_c, bad_s = random.binomial(canary, 0.002).cumsum(1), random.binomial(stable, 0.002).cumsum(1)
    n_c, n_s = canary.cumsum(1), stable.cumsum(1)
    pooled = (bad_c + bad_s) / (n_c + n_s)
    variance = np.maximum(pooled * (1 - pooled) * (1 / n_c + 1 / n_s), 1e-12)
    difference, tau2 = bad_c / n_c - bad_s / n_s, 0.01**2
    log_lambda = 0.5 * np.log(variance / (variance + tau2)) + tau2 * difference**2 / (2 * variance * (variance + tau2))
    alarms = ((log_lambda >= math.log(100)) & (difference > 0) & (n_c >= 50)).any(1).mean()
    assert alarms > 0.02


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.integers(100, 300), st.integers(1, 9), min_size=1, max_size=20), st.integers(-20, 40))
def test_the_median_pair_is_the_median_of_all_pairs(stable: dict[int, int], moved: int) -> None:
    canary = {bucket + moved: count for bucket, count in stable.items()}
    ours, theirs = (np.repeat(list(h), list(h.values())) for h in (canary, stable))
    pairs = np.sort((ours[:, None] - theirs).ravel())
    wanted = 2.0 ** (pairs[(len(pairs) + 1) // 2 - 1] / windows.PER_OCTAVE)
    assert latency.shift(canary, stable).factor == pytest.approx(wanted)


def test_sample_ratio_keeps_its_promise_at_every_look() -> None:
    random, found = np.random.default_rng(3), 0
    for _ in range(300):
        users = random.binomial(20, 0.1, 100).cumsum()
        found += any(srm.log_evidence(int(u), 20 * (i + 1), 0.1) >= math.log(100) for i, u in enumerate(users))
    assert found / 300 <= 0.03


@given(st.lists(st.floats(1e-6, 100), min_size=1, max_size=50), st.floats(0.01, 0.99))
def test_quantiles_are_within_a_bucket(latencies: list[float], share: float) -> None:
    counters = Counters(histogram={})
    for value in latencies:
        counters.answered(value)
    exact = sorted(latencies)[max(0, math.ceil(share * len(latencies)) - 1)]
    found = windows.quantile(counters.histogram, share)
    assert found is not None and exact <= found * 1.0001 and found <= max(exact * 1.046, 1.1e-6)


# -- whole rollouts, drawn --------------------------------------------------------------------------------------------
def test_equal_versions_are_promoted() -> None:
    courses = rollouts(12, SAME, seed=1, every=30)
    assert sum(course.failed for course in courses) == 0, [course.reason for course in courses]


@pytest.mark.parametrize(("canary", "within", "metric"), [(SLOWER, 30, "slow"), (WORSE, 150, "errors")])
def test_worse_versions_are_found_early(canary: Behaviour, within: float, metric: str) -> None:
    courses = rollouts(6, canary, seed=2)
    assert all(course.failed and metric in course.reason for course in courses)
    assert sorted(course.seconds for course in courses)[4] <= within


def test_the_simulation_is_a_rollout_of_the_file() -> None:
    assert [step.analysis is not None for step in parse(SPEC).steps] == [False, True] * 3

"""Metrics from elsewhere: a Prometheus query, a Python function; and Argo's counting of what they say."""

from __future__ import annotations

import importlib
import json
import math
import urllib.parse
from dataclasses import dataclass, field, replace
from typing import Any

from ingot.release.client import CallFailed, call
from ingot.release.conditions import holds
from ingot.release.events import Outcome
from ingot.release.judge import Verdict
from ingot.release.spec import Prometheus, Sampled, seconds


class SourceDown(Exception):
    """The number cannot be had: an error, not a failure of the version."""


@dataclass(frozen=True)
class Context:
    """What a Python metric is told."""

    model: str
    version: str
    stable: str
    since: float
    now: float


def measure(metric: Any, context: Context) -> float:
    """One number; SourceDown says why there is none."""
    value = _query(metric, context) if isinstance(metric, Prometheus) else _function(metric.function, context)
    if math.isnan(value):
        raise SourceDown("the result is not a number")
    return value


def _query(metric: Prometheus, context: Context) -> float:
    names = {"model": context.model, "version": context.version, "stable": context.stable}
    text = metric.query
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    url = f"{metric.address.rstrip('/')}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
    try:
        status, body = call("GET", url, timeout=seconds(metric.timeout))
    except CallFailed as error:
        raise SourceDown(str(error)) from error
    if status != 200:
        raise SourceDown(f"{metric.address} answers {status}: {body[:200].decode(errors='replace')}")
    return _single(body, text)


def _single(body: bytes, query: str) -> float:
    try:
        data = json.loads(body)["data"]
        result = data["result"]
        pair = result if data["resultType"] == "scalar" else result[0]["value"] if len(result) == 1 else None
        if pair is None:
            raise SourceDown(f"{query!r} gives {len(result)} series, one is needed")
        return float(pair[1])
    except (ValueError, KeyError, TypeError) as error:
        raise SourceDown(f"{query!r}: Prometheus' answer is not understood: {error}") from error


def _function(place: str, context: Context) -> float:
    module, _, name = place.partition(":")
    try:
        return float(getattr(importlib.import_module(module), name)(context))
    except Exception as error:
        raise SourceDown(f"{place}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Tally:
    """Measurements so far."""

    measured: int = 0
    failed: int = 0
    inconclusive: int = 0
    errors_in_a_row: int = 0
    last: str = "not measured yet"
    values: tuple[float, ...] = field(default=())


def counted(tally: Tally, metric: Sampled, value: float | SourceDown) -> Tally:
    """With one more measurement."""
    if isinstance(value, SourceDown):
        return replace(tally, errors_in_a_row=tally.errors_in_a_row + 1, last=str(value))
    outcome = of_one(metric, value)
    return replace(
        tally, measured=tally.measured + 1, failed=tally.failed + (outcome == "Failed"), errors_in_a_row=0,
        inconclusive=tally.inconclusive + (outcome == "Inconclusive"), last=f"result {value:.6g}",
        values=(*tally.values, value)[-20:],
    )  # fmt: skip


def of_one(metric: Sampled, value: float) -> Outcome:
    """Argo: failed if failureCondition holds, or successCondition alone does not; neither of both is inconclusive."""
    if metric.failure_condition is not None and holds(metric.failure_condition, value):
        return "Failed"
    if metric.success_condition is None or holds(metric.success_condition, value):
        return "Successful"
    return "Failed" if metric.failure_condition is None else "Inconclusive"


def verdict(tally: Tally, metric: Sampled, ended: bool) -> Verdict:
    """Limits are exceeded, not reached; without `count` it goes on to the analysis' end."""
    evidence = {"measured": tally.measured, "failed": tally.failed, "inconclusive": tally.inconclusive,
                "errors in a row": tally.errors_in_a_row, "values": list(tally.values)}  # fmt: skip
    enough = metric.count is not None and tally.measured >= metric.count
    if tally.failed > metric.failure_limit:
        return Verdict("Failed", f"{tally.last}, {tally.failed} of {tally.measured} failed", evidence)
    if tally.inconclusive > metric.inconclusive_limit:
        return Verdict("Inconclusive", f"{tally.last}, {tally.inconclusive} were neither good nor bad", evidence)
    if tally.errors_in_a_row > metric.consecutive_error_limit:
        return Verdict("Error", f"the source is down: {tally.last}", evidence)
    if tally.measured and (enough or (ended and metric.count is None)):
        return Verdict("Successful", tally.last, evidence)
    return Verdict(None, tally.last, evidence)

"""The gateway's Prometheus text, per model and version: the server's own writer, other families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ingot.release import rollout
from ingot.release.slots import weights
from ingot.release.spec import WHOLE
from ingot.release.windows import Counters, Observation, upper_bound
from ingot.server.metrics import CONTENT_TYPE, head, sample

__all__ = ["CONTENT_TYPE", "NAMES", "page"]
_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_COUNTERS = {
    "requests": "Requests whose attempt at this version is over",
    "errors": "Attempts that failed or were answered with 5xx",
    "retried": "Failed attempts repeated on stable",
    "diverted": "Requests kept on stable because this version's breaker was open",
    "mirrored": "Mirrored requests compared",
    "agreed": "Mirrored requests answered alike",
}
NAMES = {
    **{f"ingot_release_{name}_total": ("counter", text) for name, text in _COUNTERS.items()},
    "ingot_release_feedback_total": ("counter", "Feedback events by event and whether they were good"),
    "ingot_release_latency_seconds": (
        "histogram",
        "From the attempt's start to the whole answer, or a stream's first byte",
    ),
    "ingot_release_weight_percent": ("gauge", "Share of the users that this version has"),
    "ingot_release_users": ("gauge", "Distinct users served since the weights last changed"),
    "ingot_release_breaker_open": ("gauge", "1 while a worker keeps requests away from this version"),
    "ingot_release_phase": ("gauge", "1 for the phase the model's rollout is in"),
    "ingot_release_workers": ("gauge", "Worker processes"),
    "ingot_release_store_up": ("gauge", "1 while the store answers"),
}
PHASES = ("Healthy", "Progressing", "Paused", "Degraded")
Row = tuple[str, dict[str, str], float]


def page(
    observations: Mapping[str, Observation], routes: Mapping[str, tuple[int, str]], workers: int, store: bool
) -> str:
    """The whole text; every name is in NAMES."""
    rows: dict[str, list[str]] = {name: [] for name in NAMES}
    for model, observation in observations.items():
        for family, labels, value in _rows(model, observation, rollout.decode(routes[model][1])):
            rows[_family(family)].append(sample(family, labels, value))
    rows["ingot_release_workers"].append(sample("ingot_release_workers", {}, workers))
    rows["ingot_release_store_up"].append(sample("ingot_release_store_up", {}, float(store)))
    lines: list[str] = []
    for name, (kind, text) in NAMES.items():
        lines += [*head(name, kind, text), *rows[name]]
    return "\n".join(lines) + "\n"


def _family(name: str) -> str:
    for ending in ("_bucket", "_sum", "_count"):
        if name.removesuffix(ending) in NAMES:
            return name.removesuffix(ending)
    return name


def _rows(model: str, observation: Observation, state: rollout.State) -> Iterator[Row]:
    shares = weights(state.assignment)
    for version in state.spec.versions:
        labels = {"model": model, "version": version}
        counters = observation.counters.get(version, Counters())
        yield from _counted(labels, counters)
        yield "ingot_release_weight_percent", labels, 100 * shares.get(version, 0) / WHOLE
        yield "ingot_release_users", labels, observation.users.get(version, 0)
        yield "ingot_release_breaker_open", labels, float(version in observation.open_breakers)
    for phase in PHASES:
        yield "ingot_release_phase", {"model": model, "phase": phase}, float(rollout.phase(state) == phase)


def _counted(labels: dict[str, str], counters: Counters) -> Iterator[Row]:
    for name in _COUNTERS:
        yield f"ingot_release_{name}_total", labels, getattr(counters, name)
    for event, (good, total) in counters.feedback.items():
        yield "ingot_release_feedback_total", {**labels, "event": event, "good": "true"}, good
        yield "ingot_release_feedback_total", {**labels, "event": event, "good": "false"}, total - good
    name = "ingot_release_latency_seconds"
    for bound in _BOUNDS:
        within = sum(count for bucket, count in counters.histogram.items() if upper_bound(bucket) <= bound)
        yield f"{name}_bucket", {**labels, "le": f"{bound:g}"}, within
    answered = sum(counters.histogram.values())
    yield f"{name}_bucket", {**labels, "le": "+Inf"}, answered
    yield f"{name}_sum", labels, counters.latency_sum
    yield f"{name}_count", labels, answered

"""Prometheus text: Triton's names for what Triton counts, `ingot_*` for our own; read from statistics at a scrape."""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ingot import __version__
from ingot.server import gpus
from ingot.server.access import Access
from ingot.server.cache import CachedModel, ResponseCache
from ingot.server.model import EngineModel, Servable
from ingot.server.request import ServerError
from ingot.server.service import Service
from ingot.server.statistics import LATENCY_BOUNDS, Statistics
from ingot.server.wire import Exchange
from ingot.server.worker import Worker

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
Labels = Mapping[str, str]
Sample = tuple[Labels, float]


@dataclass(frozen=True)
class Family:
    """One metric: how each loaded version's samples are read."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    samples: Callable[[Servable], Iterable[Sample]]


def _plain(read: Callable[[Servable], float]) -> Callable[[Servable], Iterable[Sample]]:
    return lambda servable: [({}, read(servable))]


def _microseconds(stage: str) -> Callable[[Servable], Iterable[Sample]]:
    return _plain(lambda servable: servable.statistics.counts.durations[stage].ns // 1000)


def _request_microseconds(servable: Servable) -> float:
    durations = servable.statistics.counts.durations
    return (durations["success"].ns + durations["fail"].ns) // 1000


def _failures(servable: Servable) -> Iterable[Sample]:
    return [({"reason": reason}, servable.statistics.counts.failures[reason]) for reason in REASONS]


def _by_rows(servable: Servable) -> Iterable[Sample]:
    batches = servable.statistics.counts.batches.copy()
    return [({"rows": str(rows)}, stages["compute_infer"].count) for rows, stages in sorted(batches.items())]


def workers_of(servable: Servable) -> Sequence[Worker]:
    """The processes of a model; none of an ensemble, or of a model in this process."""
    inner = servable.inner if isinstance(servable, CachedModel) else servable
    return inner.workers if isinstance(inner, EngineModel) else ()


FAMILIES = (
    Family("nv_inference_request_success", "counter", "Successful inference requests",
           _plain(lambda s: s.statistics.counts.durations["success"].count)),
    Family("nv_inference_request_failure", "counter", "Failed inference requests by reason", _failures),
    Family("nv_inference_count", "counter", "Inferences performed, a batch of n counted as n",
           _plain(lambda s: s.statistics.counts.inferences)),
    Family("nv_inference_exec_count", "counter", "Executions of the model",
           _plain(lambda s: s.statistics.counts.executions)),
    Family("nv_inference_pending_request_count", "gauge", "Requests that wait to be executed",
           _plain(lambda s: s.pending)),
    Family("nv_inference_request_duration_us", "counter", "Request durations, summed", _plain(_request_microseconds)),
    Family("nv_inference_queue_duration_us", "counter", "Time in the queue, summed", _microseconds("queue")),
    Family("nv_inference_compute_input_duration_us", "counter", "Time to gather inputs, summed",
           _microseconds("compute_input")),
    Family("nv_inference_compute_infer_duration_us", "counter", "Time in the model, summed",
           _microseconds("compute_infer")),
    Family("nv_inference_compute_output_duration_us", "counter", "Time to split outputs, summed",
           _microseconds("compute_output")),
    Family("nv_cache_num_hits_per_model", "counter", "Responses from the cache",
           _plain(lambda s: s.statistics.counts.durations["cache_hit"].count)),
    Family("nv_cache_num_misses_per_model", "counter", "Look-ups in the cache that found nothing",
           _plain(lambda s: s.statistics.counts.durations["cache_miss"].count)),
    Family("nv_cache_hit_duration_per_model", "counter", "Time of look-ups that found a response, in microseconds",
           _microseconds("cache_hit")),
    Family("nv_cache_miss_duration_per_model", "counter", "Time of look-ups that found nothing, in microseconds",
           _microseconds("cache_miss")),
    Family("ingot_executions_by_rows_total", "counter", "Executions by the rows of their batch", _by_rows),
    Family("ingot_process_restarts_total", "counter", "Processes of the model that died and were started again",
           _plain(lambda s: sum(worker.restarts for worker in workers_of(s)))),
)  # fmt: skip


def exposition(service: Service, cache: ResponseCache) -> str:
    """The whole page."""
    lines: list[str] = []
    servables = service.repository.serving()
    for family in FAMILIES:
        lines += head(family.name, family.kind, family.help)
        for servable in servables:
            labels = labels_of(servable)
            lines += [sample(family.name, {**labels, **own}, value) for own, value in family.samples(servable)]
    lines += _histograms(servables)
    for name, kind, text, value in _machine(service, cache):
        lines += [*head(name, kind, text), sample(name, {}, value)]
    for gauge in gpus.GAUGES:
        lines += head(gauge.name, gauge.kind, gauge.help)
        lines += [sample(gauge.name, {"gpu_uuid": uuid}, value) for uuid, value in gpus.samples(gauge)]
    lines += _states(service)
    return "\n".join(lines) + "\n"


def labels_of(servable: Servable) -> dict[str, str]:
    """model, version, and the metric tags of the configuration."""
    return {**servable.config.metric_tags, "model": servable.config.name, "version": str(servable.version)}


def _histograms(servables: Iterable[Servable]) -> list[str]:
    name = "ingot_request_latency_seconds"
    lines = head(name, "histogram", "Latency of successful requests, from arrival to answer")
    for servable in servables:
        lines += _histogram(name, labels_of(servable), servable.statistics)
    return lines


def _histogram(name: str, labels: Labels, statistics: Statistics) -> Iterator[str]:
    counts, total = statistics.counts, 0
    for bound, count in zip((*map(str, LATENCY_BOUNDS), "+Inf"), counts.histogram, strict=True):
        total += count
        yield sample(f"{name}_bucket", {**labels, "le": bound}, total)
    yield sample(f"{name}_sum", labels, counts.durations["success"].ns / 1e9)
    yield sample(f"{name}_count", labels, total)


def _machine(service: Service, cache: ResponseCache) -> Iterator[tuple[str, str, str, float]]:
    memory = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    total, available = (float(memory[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    yield "nv_cpu_utilization", "gauge", "CPU utilisation of the machine, 0 to 1", _utilization()
    yield "nv_cpu_memory_total_bytes", "gauge", "Memory of the machine", total
    yield "nv_cpu_memory_used_bytes", "gauge", "Memory in use", total - available
    yield "ingot_front_cpu_seconds_total", "counter", "CPU time of the front process", usage.ru_utime + usage.ru_stime
    yield "ingot_requests_in_flight", "gauge", "Requests accepted and not yet answered", service.inflight
    yield "ingot_ready", "gauge", "1 while requests should be sent here", service.ready()
    yield "ingot_traces_dropped_total", "counter", "Traces that could not be delivered", service.tracer.dropped
    yield "ingot_cache_bytes", "gauge", "Bytes of the response cache in use", cache.bytes


def _states(service: Service) -> Iterator[str]:
    """Versions by state, and what this server is."""
    counts = Counter(state.state or "UNLOADED" for state in service.repository.index())
    yield from head("ingot_model_versions", "gauge", "Versions in the repository by state")
    for state in ("READY", "UNAVAILABLE", "UNLOADED"):
        yield sample("ingot_model_versions", {"state": state}, counts[state])
    yield from head("ingot_build_info", "gauge", "1, labelled with the version")
    yield sample("ingot_build_info", {"version": __version__}, 1)


def _utilization() -> float:
    """The load of the last minute as a share of the cores: no state is kept between scrapes."""
    return min(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0)


def head(name: str, kind: str, text: str) -> list[str]:
    """The two lines above a metric's samples."""
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def sample(name: str, labels: Labels, value: float) -> str:
    """One line: name{labels} value"""
    inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    number = f"{int(value)}" if float(value).is_integer() else repr(float(value))
    return f"{name}{{{inner}}} {number}" if inner else f"{name} {number}"


def _escaped(text: Any) -> str:
    return str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@dataclass(frozen=True)
class MetricsApi:
    """Answers GET /metrics."""

    service: Service
    cache: ResponseCache
    access: Access = field(default_factory=Access)

    def __call__(self, exchange: Exchange) -> None:
        """Handle an exchange of the metrics port."""
        if exchange.target.partition(b"?")[0].rstrip(b"/") != b"/metrics" or exchange.method not in (b"GET", b"HEAD"):
            exchange.respond(404, [b"there is only GET /metrics\n"], {b"content-type": b"text/plain"})
            return
        try:
            self.access.check_headers("metrics", exchange.headers)
        except ServerError as error:
            exchange.respond(error.code.status, [str(error).encode()], {b"www-authenticate": b"Bearer"})
            return
        page = exposition(self.service, self.cache)
        exchange.respond(200, [page.encode()], {b"content-type": CONTENT_TYPE})

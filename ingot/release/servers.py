"""What the controller asks of the versions' servers: load, unload, readiness, warm-up, what they say of themselves."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ingot.release.client import CallFailed, call
from ingot.release.spec import Endpoint, Rollout, Version, WarmUp, seconds

_LOAD_SECONDS = 600.0
_BLOCK = 10
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class NotServing(Exception):
    """A server cannot take traffic of a version; says why."""


def name_of(model: str, version: Version, endpoint: Endpoint) -> str:
    """What the version is called on a server: its device's engine, its own name, or the model's."""
    return version.engines.get(endpoint.device) or version.model or model


def prepare(spec: Rollout, name: str) -> dict[str, Any]:
    """Load where the rollout manages that, see that every server is ready, warm up; the latencies as evidence."""
    version = spec.versions[name]
    evidence: dict[str, Any] = {}
    for endpoint in version.endpoints:
        called = name_of(spec.model, version, endpoint)
        if version.managed:
            repository(endpoint, called, "load")
        require_ready(endpoint)
        if version.warm_up is not None:
            evidence[endpoint.url] = warm(endpoint, called, version.model_version, version.warm_up)
    return evidence


def unload(spec: Rollout, name: str) -> None:
    """Give the servers' memory back."""
    version = spec.versions[name]
    for endpoint in version.endpoints:
        repository(endpoint, name_of(spec.model, version, endpoint), "unload")


def repository(endpoint: Endpoint, name: str, action: str) -> None:
    """The repository API's load or unload."""
    url = f"{endpoint.url}/v2/repository/models/{name}/{action}"
    status, body = _called("POST", url, b"{}", _LOAD_SECONDS)
    if status != 200:
        raise NotServing(f"{endpoint.url} does not {action} {name!r}: {status} {body[:200].decode(errors='replace')}")


def require_ready(endpoint: Endpoint) -> None:
    """A server without KServe's readiness answers 404, and that it answers is enough."""
    status, _ = _called("GET", f"{endpoint.url}/v2/health/ready", b"", 5.0)
    if status not in (200, 404):
        raise NotServing(f"{endpoint.url} is not ready: {status}")


def _called(method: str, url: str, body: bytes, timeout: float, kind: str = "application/json") -> tuple[int, bytes]:
    try:
        return call(method, url, body, {"content-type": kind}, timeout)
    except CallFailed as error:
        raise NotServing(str(error)) from error


# -- warm-up ----------------------------------------------------------------------------------------------------------
def settled(latencies: Sequence[float], tolerance: float) -> bool:
    """Whether the median of the last ten is within `tolerance` of that of the ten before."""
    if len(latencies) < 2 * _BLOCK:
        return False
    last, before = (statistics.median(latencies[-end - _BLOCK : len(latencies) - end]) for end in (0, _BLOCK))
    return abs(last - before) <= tolerance * before


def warm(endpoint: Endpoint, name: str, version: str | None, config: WarmUp) -> dict[str, Any]:
    """Dummy requests until their latency settles; NotServing if one fails or the time is over."""
    base = f"/v2/models/{name}" + (f"/versions/{version}" if version else "")
    body = config.body.encode() if config.body is not None else dummy(endpoint, base)
    url, end = endpoint.url + (config.path or f"{base}/infer"), time.monotonic() + seconds(config.timeout)
    latencies: list[float] = []
    while len(latencies) < config.maximum:
        left = end - time.monotonic()
        if left <= 0:
            raise NotServing(f"{endpoint.url}: latency has not settled within {config.timeout}")
        begun = time.perf_counter()
        status, answer = _called("POST", url, body, left, config.content_type)
        if status >= 400:
            raise NotServing(f"{url} answers a warm-up request with {status}: {answer[:200].decode(errors='replace')}")
        latencies.append(time.perf_counter() - begun)
        if len(latencies) >= config.minimum and settled(latencies, config.tolerance):
            break
    return {"requests": len(latencies), "first": latencies[0], "settled": statistics.median(latencies[-_BLOCK:])}


def dummy(endpoint: Endpoint, base: str) -> bytes:
    """Zeros of the shapes and types that the model's metadata states; 1 where an extent is free."""
    status, text = _called("GET", endpoint.url + base, b"", 5.0)
    if status != 200:
        raise NotServing(f"{endpoint.url}{base} has no metadata ({status}): give warmUp.path and warmUp.body")
    inputs = []
    for one in json.loads(text)["inputs"]:
        shape = [max(1, int(extent)) for extent in one["shape"]]
        zero: Any = {"BYTES": "", "BOOL": False}.get(one["datatype"], 0)
        inputs.append({**one, "shape": shape, "data": [zero] * math.prod(shape)})
    return json.dumps({"inputs": inputs}).encode()


# -- what servers say of themselves -----------------------------------------------------------------------------------
Samples = list[tuple[str, dict[str, str], float]]
_GAUGES = {"gpuMemory": "nv_gpu_memory_used_bytes", "cpuMemory": "nv_cpu_memory_used_bytes"}


def samples_of(text: str) -> Samples:
    """Prometheus text as (name, labels, value)."""
    found = []
    for name, labels, value in _SAMPLE.findall(text):
        found.append((name, dict(_LABEL.findall(labels)), float(value)))
    return found


@dataclass(frozen=True)
class Scrape:
    """Queue time counters of a server at a moment, and its memory."""

    queue_us: float
    requests: float
    gauges: Mapping[str, float]


def scrape(endpoint: Endpoint, name: str) -> Scrape:
    """CallFailed if the server does not answer."""
    assert endpoint.metrics is not None
    _, body = call("GET", endpoint.metrics, timeout=2.0)
    samples = samples_of(body.decode(errors="replace"))

    def total(metric: str) -> float:
        return sum(value for found, labels, value in samples if found == metric and labels.get("model", name) == name)

    gauges = {}
    for gauge, metric in _GAUGES.items():
        values = [value for found, _, value in samples if found == metric]
        if values:
            gauges[gauge] = max(values)
    return Scrape(total("nv_inference_queue_duration_us"), total("nv_inference_request_success"), gauges)


def gauges_between(before: Scrape | None, now: Scrape) -> dict[str, float]:
    """Memory as it is, and the mean queue time of the requests since the last look, in seconds."""
    if before is None or now.requests <= before.requests:
        return dict(now.gauges)
    queue = (now.queue_us - before.queue_us) / (now.requests - before.requests) / 1e6
    return {**now.gauges, "queueTime": queue}

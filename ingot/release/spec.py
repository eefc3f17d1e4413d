"""rollout.yaml: typed, unknown keys refused with their path, JSON schema published as rollout.schema.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from ingot.errors import IngotError

WHOLE = 10_000  # slots; a hundredth of a percent each
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

Name = Annotated[str, Meta(pattern=NAME)]
Duration = Annotated[str, Meta(pattern=r"^\d+(\.\d+)?(ms|s|m|h|d)$", examples=["500ms", "30s", "5m", "1h"])]
Percent = Annotated[float, Meta(ge=0, le=100)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1)]
Url = Annotated[str, Meta(pattern=r"^https?://[^/\s]+")]


class ReleaseError(IngotError):
    """A rollout cannot be read, is not legal now, or the store refused."""


class SpecError(ReleaseError):
    """rollout.yaml is wrong; names the key's path."""


def seconds(text: str) -> float:
    """'500ms' => 0.5"""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no duration: write 500ms, 30s, 5m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def slots(percent: float) -> int:
    """Percent as slots of 10,000; ValueError below a hundredth of a percent."""
    exact = percent * 100
    if abs(exact - round(exact)) > 1e-6:
        raise ValueError(f"weight {percent} is finer than a hundredth of a percent")
    return round(exact)


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", omit_defaults=True):
    """A piece of rollout.yaml."""


# -- versions ---------------------------------------------------------------------------------------------------------
class Endpoint(Part, frozen=True):
    """One server; `device` chooses among the version's engines."""

    url: Url
    device: str = "cpu"
    metrics: Url | None = None


class WarmUp(Part, frozen=True):
    """Requests before a version gets traffic, until their latency settles. Without a body a KServe v2 one is
    made up."""

    path: str | None = None
    body: str | None = None
    content_type: str = "application/json"
    minimum: Count = 20
    maximum: Count = 500
    tolerance: Share = 0.25
    timeout: Duration = "60s"


class Version(Part, frozen=True):
    """Where a version runs and what it is called there."""

    endpoints: Annotated[tuple[Endpoint, ...], Meta(min_length=1)]
    model: str | None = None
    model_version: str | None = None
    engines: dict[str, str] = {}
    managed: bool = False
    warm_up: WarmUp | None = None
    timeout: Duration = "30s"
    requests_per_second: float | None = None


# -- routing ----------------------------------------------------------------------------------------------------------
class Match(Part, frozen=True):
    """What a request must show; every stated field must hold."""

    header: str | None = None
    label: str | None = None
    equals: str | None = None
    regex: str | None = None
    segment: str | None = None
    allow_list: tuple[str, ...] | None = None
    percentage: Percent | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        subjects = [self.header, self.label, self.segment, self.allow_list, self.percentage, self.model]
        if all(subject is None for subject in subjects):
            raise ValueError("say header, label, segment, allowList, percentage or model")
        if (self.equals is not None or self.regex is not None) and not (self.header or self.label):
            raise ValueError("equals and regex need header or label")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ValueError(f"regex {self.regex!r}: {error}") from error


class Rule(Part, frozen=True):
    """Requests that match go to a version, whatever the weights."""

    name: Name
    match: Match
    version: Name


class Key(Part, frozen=True):
    """Whom a request belongs to; without the header: its address, or a new one each time."""

    header: str = "x-user-id"
    fallback: Literal["address", "random"] = "random"


class Retry(Part, frozen=True):
    """When a failed attempt is repeated on stable: never once a byte of the answer has gone out."""

    inference: bool = True
    statuses: tuple[int, ...] = (502, 503, 504)


class Breaker(Part, frozen=True):
    """So many failures in a row keep a version's requests on stable; after `cooldown` one request tries again."""

    failures: Count = 5
    cooldown: Duration = "5s"


class Routing(Part, frozen=True):
    """How requests are assigned."""

    key: Key = Key()
    salt: str = ""
    paths: tuple[str, ...] = ()
    segments: dict[str, tuple[Match, ...]] = {}
    rules: tuple[Rule, ...] = ()
    retry: Retry = Retry()
    breaker: Breaker = Breaker()


# -- metrics ----------------------------------------------------------------------------------------------------------
class Measured(Part, frozen=True):
    """What every metric has."""

    interval: Duration = "1s"
    initial_delay: Duration = "0s"
    minimum_samples: Count = 50
    dry_run: bool = False


class ErrorRate(Measured, frozen=True, tag="errorRate", tag_field="kind"):
    """Share of failed requests against stable's over the same time: mSPRT, valid at every look."""


class LatencyExceedance(Measured, frozen=True, tag="latency", tag_field="kind"):
    """Share of requests slower than a threshold (default: stable's own P95), against stable's: mSPRT."""

    threshold: Duration | None = None


class LatencyShift(Measured, frozen=True, tag="latencyShift", tag_field="kind"):
    """Mann-Whitney with an effect size, once at the analysis' end."""

    confidence: Annotated[float, Meta(gt=0.5, lt=1)] = 0.98
    effect: Share = 0.25


class Agreement(Measured, frozen=True, tag="agreement", tag_field="kind"):
    """Share of mirrored requests that both versions answered alike."""

    minimum: Share = 0.98


class Feedback(Measured, frozen=True, tag="feedback", tag_field="kind", kw_only=True):
    """Share of posted events that were good, against stable's: mSPRT."""

    event: str


class SampleRatio(Measured, frozen=True, tag="sampleRatio", tag_field="kind"):
    """Whether as many users were served by each version as its weight says."""


class Sampled(Measured, frozen=True):
    """A number from elsewhere, judged by conditions on `result`; Argo's counting."""

    success_condition: str | None = None
    failure_condition: str | None = None
    count: Count | None = None
    failure_limit: Annotated[int, Meta(ge=0)] = 0
    inconclusive_limit: Annotated[int, Meta(ge=0)] = 0
    consecutive_error_limit: Annotated[int, Meta(ge=0)] = 4
    timeout: Duration = "5s"

    def __post_init__(self) -> None:
        from ingot.release.conditions import parse

        for text in (self.success_condition, self.failure_condition):
            if text is not None:
                parse(text)
        if self.success_condition is None and self.failure_condition is None:
            raise ValueError("say successCondition, failureCondition or both")


class Prometheus(Sampled, frozen=True, tag="prometheus", tag_field="kind", kw_only=True):
    """A query; {model}, {version} and {stable} are filled in."""

    address: Url
    query: str


class Python(Sampled, frozen=True, tag="python", tag_field="kind", kw_only=True):
    """`module:function(context) -> float`, in the controller's process."""

    function: Annotated[str, Meta(pattern=r"^[\w.]+:\w+$")]


Metric = ErrorRate | LatencyExceedance | LatencyShift | Agreement | Feedback | SampleRatio | Prometheus | Python


class Guards(Part, frozen=True):
    """Absolute limits over the last `window`; they hold at every moment, also while paused and after promotion."""

    p99: Duration | None = None
    error_rate: Share | None = None
    queue_time: Duration | None = None
    gpu_memory: Annotated[float, Meta(gt=0)] | None = None
    cpu_memory: Annotated[float, Meta(gt=0)] | None = None
    window: Duration = "30s"
    minimum_samples: Count = 50


# -- steps ------------------------------------------------------------------------------------------------------------
class Pause(Part, frozen=True):
    """For a while, or until somebody resumes."""

    duration: Duration | None = None


class AnalysisStep(Part, frozen=True):
    """Metrics over a while; the step ends when every one has its verdict."""

    metrics: Annotated[tuple[Name, ...], Meta(min_length=1)]
    duration: Duration = "60s"
    give_up: Duration | None = None


class HeaderRoute(Part, frozen=True):
    """Requests with a header go to a version while the route stands; without a version it is removed."""

    name: Name
    header: str
    equals: str | None = None
    version: Name | None = None


class MirrorRoute(Part, frozen=True):
    """A share of requests is sent to a version as well; its answers are compared and dropped."""

    percentage: Percent
    version: Name | None = None


class Step(Part, frozen=True):
    """One of Argo's steps."""

    set_weight: Percent | None = None
    set_weights: dict[str, Percent] | None = None
    pause: Pause | None = None
    analysis: AnalysisStep | None = None
    set_header_route: HeaderRoute | None = None
    set_mirror_route: MirrorRoute | None = None

    def __post_init__(self) -> None:
        if len([name for name in self.__struct_fields__ if getattr(self, name) is not None]) != 1:
            raise ValueError(
                "a step is exactly one of setWeight, setWeights, pause, analysis, setHeaderRoute, setMirrorRoute"
            )
        if self.set_weight is not None:
            slots(self.set_weight)
        if self.set_weights is not None and sum(map(slots, self.set_weights.values())) > WHOLE:
            raise ValueError(f"weights sum to {sum(self.set_weights.values()):g}, over 100")


class Background(Part, frozen=True):
    """Metrics over several steps, from one on."""

    metrics: Annotated[tuple[Name, ...], Meta(min_length=1)]
    starting_step: Annotated[int, Meta(ge=0)] = 0


class Capacity(Part, frozen=True):
    """Before more traffic: what a version would get stays under `headroom` of its requestsPerSecond, endpoints
    ready."""

    headroom: Annotated[float, Meta(gt=0, le=1)] = 0.8


class Webhook(Part, frozen=True):
    """Where changes are told, at least once each."""

    url: Url
    on: tuple[str, ...] = ()
    secret_file: str | None = None


class Rollout(Part, frozen=True):
    """The file."""

    model: Name
    versions: Annotated[dict[str, Version], Meta(min_length=2)]
    stable: Name
    candidates: Annotated[tuple[Name, ...], Meta(min_length=1)]
    steps: tuple[Step, ...] = ()
    routing: Routing = Routing()
    metrics: dict[str, Metric] = {}
    analysis: Background | None = None
    guards: Guards | None = None
    capacity: Capacity | None = None
    alpha: Annotated[float, Meta(gt=0, lt=0.5)] = 0.01
    watch: Duration = "0s"
    notifications: tuple[Webhook, ...] = ()

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def candidate(self) -> str:
        """The first, and usually the only one."""
        return self.candidates[0]


def _problems(spec: Rollout) -> Iterator[str]:
    """What types cannot say."""
    known = set(spec.versions)
    for place, name in _named_versions(spec):
        if name not in known:
            yield f"{place} names the version {name!r}, there are only {', '.join(sorted(known))}"
    if spec.stable in spec.candidates:
        yield f"stable {spec.stable!r} cannot be a candidate too"
    if len(set(spec.candidates)) != len(spec.candidates):
        yield "candidates has a version twice"
    for place, metrics in _named_metrics(spec):
        yield from (f"{place} names the metric {name!r}, there is none" for name in metrics if name not in spec.metrics)
    for rule in spec.routing.rules:
        yield from _segment_problems(f"routing.rules {rule.name!r}", rule.match, spec.routing)
    for index, step in enumerate(spec.steps):
        if step.set_weight is not None and len(spec.candidates) > 1:
            yield f"steps[{index}]: with several candidates say setWeights"
        if step.set_weights is not None and spec.stable in step.set_weights:
            yield f"steps[{index}].setWeights: stable gets what the candidates leave"
    names = [rule.name for rule in spec.routing.rules]
    yield from (f"routing.rules has {name!r} twice" for name in sorted({n for n in names if names.count(n) > 1}))


def _segment_problems(place: str, match: Match, routing: Routing) -> Iterator[str]:
    if match.segment is not None and match.segment not in routing.segments:
        yield f"{place} names the segment {match.segment!r}, there is none"


def _named_versions(spec: Rollout) -> Iterator[tuple[str, str]]:
    yield "stable", spec.stable
    yield from (("candidates", name) for name in spec.candidates)
    yield from ((f"routing.rules {rule.name!r}", rule.version) for rule in spec.routing.rules)
    for index, step in enumerate(spec.steps):
        for name in step.set_weights or ():
            yield f"steps[{index}].setWeights", name
        for part in (step.set_header_route, step.set_mirror_route):
            if part is not None and part.version is not None:
                yield f"steps[{index}]", part.version


def _named_metrics(spec: Rollout) -> Iterator[tuple[str, tuple[str, ...]]]:
    if spec.analysis is not None:
        yield "analysis", spec.analysis.metrics
    for index, step in enumerate(spec.steps):
        if step.analysis is not None:
            yield f"steps[{index}].analysis", step.analysis.metrics


# -- reading ----------------------------------------------------------------------------------------------------------
class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, which YAML would let overwrite the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping without repeated keys."""
        seen = set[str]()
        for key, _ in node.value:
            if key.value in seen:
                raise SpecError(f"line {key.start_mark.line + 1}: the key {key.value!r} stands twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(text: str, place: str = "rollout.yaml") -> Rollout:
    """The rollout a YAML (or JSON) text describes; SpecError names the key's path."""
    try:
        plain = yaml.load(text, _Loader)
        return msgspec.convert(plain, Rollout)
    except SpecError as error:
        raise SpecError(f"{place}: {error}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{place} is no YAML: {' '.join(str(error).split())}") from error
    except msgspec.ValidationError as error:
        raise SpecError(f"{place}: {error}") from error


def read(path: Path) -> Rollout:
    """The rollout in a file."""
    return parse(path.read_text(), str(path))


def plain(part: Any) -> Any:
    """A piece as JSON would have it."""
    return msgspec.to_builtins(part)


def schema() -> Mapping[str, Any]:
    """JSON schema of the file; descriptions are the docstrings, in one line each."""
    made = _in_one_line(msgspec.json.schema(Rollout))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def _in_one_line(part: Any) -> Any:
    if isinstance(part, dict):
        flat = {name: _in_one_line(value) for name, value in part.items()}
        if isinstance(flat.get("description"), str):
            flat["description"] = " ".join(flat["description"].split())
        return flat
    return [_in_one_line(value) for value in part] if isinstance(part, list) else part


def schema_text() -> str:
    """What rollout.schema.json holds."""
    return json.dumps(schema(), indent=1, sort_keys=True) + "\n"

"""Traces of requests: sampled, or asked for by a W3C traceparent; written to a file as Triton does, or sent as
OpenTelemetry spans (OTLP over HTTP, in its JSON form). Nothing of this runs where a request waits for it.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingot import __version__
from ingot.server.request import Outcome, Request, ServerError, invalid
from ingot.server.statistics import Timing

log = logging.getLogger("ingot.server")
SETTINGS: Mapping[str, Any] = {
    "trace_level": ["OFF"], "trace_rate": "1000", "trace_count": "-1", "log_frequency": "0", "trace_file": "",
    "trace_mode": "triton",
}  # fmt: skip
COLLECTOR = "http://localhost:4318/v1/traces"
_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_KEPT, _SENT_TOGETHER, _SECONDS = 4096, 512, 1.0
_SERVER, _INTERNAL = 2, 1  # OTLP's kinds of spans


@dataclass(frozen=True, slots=True)
class Execution:
    """One execution that was part of a request; an ensemble's request has several."""

    model: str
    version: int
    arrived: int
    timing: Timing


@dataclass(slots=True)
class Origin:
    """Where a watched request came from, and what became of it; travels with the request."""

    protocol: str
    request_id: str
    trace_id: str = ""
    parent: str = ""
    executions: list[Execution] = field(default_factory=list)

    def executed(self, model: str, version: int, arrived: int, timing: Timing) -> None:
        """An execution has answered this request."""
        self.executions.append(Execution(model, version, arrived, timing))


@dataclass
class Tracer:
    """Decides what is traced. Settings of a model override the server's, each by each."""

    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))
    of_models: dict[str, dict[str, Any]] = field(default_factory=dict)
    url: str = COLLECTOR
    resource: Mapping[str, str] = field(default_factory=dict)
    _seen: itertools.count[int] = field(default_factory=lambda: itertools.count())
    _left: dict[str, int] = field(default_factory=dict)
    _sink: Sink | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def on(self) -> bool:
        """Whether any request may be traced."""
        every = (self.settings, *self.of_models.values())
        return any(settings.get("trace_level", ["OFF"]) != ["OFF"] for settings in every)

    @property
    def dropped(self) -> int:
        """Traces that could not be delivered."""
        return self._sink.dropped if self._sink else 0

    def updated(self, changes: Mapping[str, Any], model: str = "") -> dict[str, Any]:
        """Change settings of the server or of a model, and return all; null resets one to what it would be without."""
        with self._lock:
            fallback = {**SETTINGS, **(self.settings if model else {})}
            chosen = dict(self.of_models.get(model, {})) if model else dict(self.settings)
            for name, value in changes.items():
                chosen[name] = fallback[name] if value is None else checked(name, value)
                if value is None and model:
                    del chosen[name]
                if name == "trace_count":
                    self._left.pop(model, None)
            if model:
                self.of_models[model] = chosen
            else:
                self.settings = chosen
            return {**self.settings, **chosen}

    def sampled(self, model: str, parent: str) -> tuple[str, str] | None:
        """(trace id, parent span) of a request that is to be traced: the traceparent's, or new for one in `rate`."""
        settings = {**self.settings, **self.of_models.get(model, {})}
        if settings["trace_level"] == ["OFF"]:
            return None
        match = _PARENT.fullmatch(parent) if parent else None
        wanted = int(match[3], 16) & 1 if match else next(self._seen) % max(int(settings["trace_rate"]), 1) == 0
        if not wanted or not self._counted(model if model in self.of_models else "", int(settings["trace_count"])):
            return None
        return (match[1], match[2]) if match else (os.urandom(16).hex(), "")

    def _counted(self, scope: str, most: int) -> bool:
        if most < 0:
            return True
        with self._lock:
            left = self._left.get(scope, most)
            self._left[scope] = max(left - 1, 0)
            return left > 0

    def ended(self, request: Request, outcome: Outcome, now: int) -> None:
        """Hand a traced request over to whoever writes or sends."""
        settings = {**self.settings, **self.of_models.get(request.model, {})}
        with self._lock:
            if self._sink is None:
                self._sink = Sink()
        offset = time.time_ns() - time.monotonic_ns()
        if settings["trace_mode"] == "opentelemetry":
            spans = spans_of(request, outcome, now, offset)
            self._sink.put(_Sender(self.url, dict(self.resource)), spans)
        elif settings["trace_file"]:
            self._sink.put(_Writer(Path(settings["trace_file"])), [timestamps_of(request, now)])

    def close(self) -> None:
        """Deliver what is left."""
        if self._sink is not None:
            self._sink.close()


def checked(name: str, value: Any) -> Any:
    """A setting's value in Triton's form; ServerError for what makes no sense."""
    if name not in SETTINGS:
        raise invalid(f"there is no trace setting '{name}'; there are {', '.join(SETTINGS)}")
    if name == "trace_level":
        levels = [value] if isinstance(value, str) else list(value)
        if not set(levels) <= {"OFF", "TIMESTAMPS"} or not levels:
            raise invalid(f"the trace setting 'trace_level' must be OFF or TIMESTAMPS, not {value!r}")
        return levels[-1:]
    text = str(value)
    if name in ("trace_rate", "trace_count", "log_frequency") and not re.fullmatch(r"-1|\d{1,18}", text):
        raise invalid(f"the trace setting '{name}' must be a number, not {text!r}")
    if name == "trace_mode" and text not in ("triton", "opentelemetry"):
        raise invalid(f"the trace setting 'trace_mode' must be triton or opentelemetry, not {text!r}")
    return text


# -- forms ------------------------------------------------------------------------------------------------------------
def spans_of(request: Request, outcome: Outcome, now: int, offset: int) -> list[dict[str, Any]]:
    """The request's span, and below it one for the queue and one for the computation of each execution."""
    origin = request.origin
    root = os.urandom(8).hex()
    failed = isinstance(outcome, ServerError)
    facts = {"model": request.model, "request_id": origin.request_id, "protocol": origin.protocol}
    facts |= {"error": str(outcome), "code": outcome.code.name} if isinstance(outcome, ServerError) else {}
    status = {"code": 2, "message": str(outcome)} if failed else {"code": 0}
    made = {"parentSpanId": origin.parent, "status": status}
    spans = [_span("InferRequest", _SERVER, origin.trace_id, root, request.arrived, now, offset, facts) | made]
    for execution in origin.executions:
        spans += _below(execution, origin.trace_id, root, offset)
    return spans


def _below(execution: Execution, trace: str, root: str, offset: int) -> list[dict[str, Any]]:
    """Spans of an execution, below the request's."""
    timing, spans = execution.timing, []
    stages = (("queue", execution.arrived, timing.start), ("compute", timing.start, timing.answered))
    for name, start, end in stages:
        facts = {"model": execution.model, "version": execution.version}
        span = _span(name, _INTERNAL, trace, os.urandom(8).hex(), start, end, offset, facts)
        spans.append(span | {"parentSpanId": root})
    events = (("COMPUTE_INPUT_END", timing.gathered), ("COMPUTE_OUTPUT_START", timing.computed))
    spans[1]["events"] = [{"name": name, "timeUnixNano": str(ns + offset)} for name, ns in events]
    return spans


def _span(
    name: str, kind: int, trace: str, span: str, start: int, end: int, offset: int, facts: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "traceId": trace, "spanId": span, "name": name, "kind": kind, "startTimeUnixNano": str(start + offset),
        "endTimeUnixNano": str(end + offset), "attributes": _attributes(facts),
    }  # fmt: skip


def _attributes(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"key": key, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": str(value)}}
        for key, value in facts.items()
    ]


_numbers = itertools.count(1)


def timestamps_of(request: Request, now: int) -> dict[str, Any]:
    """A request as Triton's trace files have it."""
    stamps: list[tuple[str, int]] = [("REQUEST_START", request.arrived)]
    for execution in request.origin.executions:
        timing = execution.timing
        stamps += [
            ("QUEUE_START", execution.arrived), ("COMPUTE_START", timing.start),
            ("COMPUTE_INPUT_END", timing.gathered), ("COMPUTE_OUTPUT_START", timing.computed),
            ("COMPUTE_END", timing.answered),
        ]  # fmt: skip
    stamps.append(("REQUEST_END", now))
    version = request.origin.executions[-1].version if request.origin.executions else request.version
    return {
        "id": next(_numbers), "model_name": request.model, "model_version": version,
        "request_id": request.origin.request_id, "timestamps": [{"name": name, "ns": ns} for name, ns in stamps],
    }  # fmt: skip


# -- delivery ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Sender:
    """Sends spans to a collector."""

    url: str
    resource: dict[str, str] = field(hash=False)

    def __call__(self, spans: Sequence[Mapping[str, Any]]) -> None:
        resource = {"service.name": "ingot", "service.version": __version__, **self.resource}
        content = {
            "resource": {"attributes": _attributes(resource)},
            "scopeSpans": [{"scope": {"name": "ingot.server", "version": __version__}, "spans": spans}],
        }
        body = json.dumps({"resourceSpans": [content]}).encode()
        asked = urllib.request.Request(self.url, body, {"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=5) as answer:
            answer.read()


@dataclass(frozen=True)
class _Writer:
    """Adds to a file that is one JSON list after every call."""

    file: Path

    def __call__(self, traces: Sequence[Mapping[str, Any]]) -> None:
        text = ",\n".join(json.dumps(trace) for trace in traces)
        empty = not self.file.exists() or self.file.stat().st_size < 4
        with self.file.open("w+b" if empty else "r+b") as stream:
            if empty:
                stream.write(b"[\n")
            else:
                stream.seek(-2, os.SEEK_END)
                stream.write(b",\n")
            stream.write(text.encode() + b"\n]")


class Sink:
    """A thread that delivers; what it cannot take or deliver is dropped and counted."""

    def __init__(self) -> None:
        self.dropped = 0
        self._queue: queue.Queue[tuple[Callable[..., None], Sequence[Any]] | None] = queue.Queue(_KEPT)
        self._thread = threading.Thread(target=self._run, name="ingot-traces", daemon=True)
        self._complained = 0.0
        self._thread.start()

    def put(self, deliver: Callable[..., None], items: Sequence[Any]) -> None:
        """Never waits."""
        try:
            self._queue.put_nowait((deliver, items))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Deliver what waits, for a few seconds at most."""
        self._queue.put(None)
        self._thread.join(10)

    def _run(self) -> None:
        ended = False
        while not ended:
            waiting, ended = self._collected()
            for deliver, items in waiting.items():
                self._deliver(deliver, items)

    def _collected(self) -> tuple[dict[Callable[..., None], list[Any]], bool]:
        """(what came within a second, or enough for one delivery; whether no more will come)."""
        waiting: dict[Callable[..., None], list[Any]] = {}
        until, count = time.monotonic() + _SECONDS, 0
        while count < _SENT_TOGETHER:
            try:
                item = self._queue.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                break
            if item is None:
                return waiting, True
            waiting.setdefault(item[0], []).extend(item[1])
            count += len(item[1])
        return waiting, False

    def _deliver(self, deliver: Callable[..., None], items: Sequence[Any]) -> None:
        try:
            deliver(items)
        except (OSError, urllib.error.URLError) as error:
            self.dropped += len(items)
            if time.monotonic() - self._complained > 60 or not self._complained:
                self._complained = time.monotonic()
                log.warning("traces cannot be delivered: %s (%d dropped so far)", error, self.dropped)

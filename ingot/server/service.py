"""Everything a client may ask, independent of the protocol it asks with."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ingot import __version__
from ingot.server import logs
from ingot.server.config import Config, read_override
from ingot.server.conversations import Waits
from ingot.server.model import Servable
from ingot.server.overrides import given_files
from ingot.server.ports import Ports
from ingot.server.repository import Repository
from ingot.server.request import Code, Done, Outcome, Request, ServerError, invalid
from ingot.server.scheduler import Cancel, Closed, as_server_error, clock
from ingot.server.shm import Regions
from ingot.server.tracing import Origin, Tracer

EXTENSIONS = (
    "classification", "sequence", "model_repository", "model_repository(unload_dependents)", "schedule_policy",
    "model_configuration", "system_shared_memory", "cuda_shared_memory", "binary_tensor_data", "parameters",
    "statistics", "trace", "logging",
)  # fmt: skip
log = logging.getLogger("ingot.server.requests")
_REPLACED_TRIES = 8
_LOG_SETTINGS = {
    "log_file": "", "log_info": True, "log_warning": True, "log_error": True, "log_verbose_level": 0,
    "log_format": "default",
}  # fmt: skip


@dataclass
class Service:
    """The server without its sockets."""

    repository: Repository
    name: str = "ingot"
    regions: Regions = field(default_factory=Regions)
    exiting: bool = False  # takes no more requests
    exiting_soon: bool = False  # lame duck: not ready, but still takes requests
    strict_readiness: bool = True
    log_settings: dict[str, Any] = field(default_factory=lambda: dict(_LOG_SETTINGS))
    tracer: Tracer = field(default_factory=Tracer)
    log_requests: bool = False
    limit: int = 0  # requests in flight at once; 0: any number
    watching: bool = field(init=False, default=False)
    _waits: Waits = field(default_factory=Waits)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    inflight: int = 0

    def __post_init__(self) -> None:
        self.watching = self.log_requests or self.tracer.on

    # -- inference ----------------------------------------------------------------------------------------------------
    def infer(self, request: Request, done: Done) -> Cancel:
        """Answer through `done`, exactly once; where ServerError is raised at once, `done` is not called."""
        if self.exiting:
            raise ServerError(Code.UNAVAILABLE, "the server is shutting down, it takes no more requests", "REJECTED")
        if self.limit and self.inflight >= self.limit:
            raise ServerError(Code.UNAVAILABLE, f"{self.limit} requests are being answered; try again", "REJECTED")
        if request.origin is not None:
            done = partial(self._watched, request, done)
        with self._lock:
            self.inflight += 1
        try:
            return (self.submit if request.caller else self._submit)(request, partial(self._done, done))
        except BaseException as error:
            with self._lock:
                self.inflight -= 1
            if request.origin is not None:
                self._ended(request, as_server_error(error) if isinstance(error, Exception) else invalid("ended"))
            raise

    def submit(self, request: Request, done: Done) -> Cancel:
        """The same for requests of the server's own, an ensemble's steps, a model's calls: also while it drains."""
        if not request.caller:
            return self._submit(request, done)
        leave = self._waits.enter(request.caller, request.model)

        def answered(outcome: Outcome) -> None:
            leave()
            done(outcome)

        try:
            return self._submit(request, answered)
        except BaseException:
            leave()
            raise

    def _submit(self, request: Request, done: Done) -> Cancel:
        for _ in range(_REPLACED_TRIES):
            servable = self.repository.find(request.model, request.version)
            try:
                return servable.submit(request, done)
            except Closed:  # replaced between the look-up and now: look again
                continue
            except ServerError as error:
                servable.statistics.failed(clock() - request.arrived if request.arrived else 0, error.reason)
                raise
        raise ServerError(Code.UNAVAILABLE, f"model '{request.model}' is being replaced; try again")

    def watch(self, request: Request, protocol: str, identity: str, parent: str) -> Request:
        """The request, marked if it is to be traced or logged; `identity` and `parent`: X-Request-Id, traceparent."""
        sampled = self.tracer.sampled(request.model, parent)
        if sampled is None and not self.log_requests:
            return request
        identity = identity or request.id or os.urandom(8).hex()
        return replace(request, origin=Origin(protocol, identity, *(sampled or ())))

    def refused(self, protocol: str, identity: str, target: str, error: Exception) -> None:
        """Log what was refused before it became a request: no key, no tensors."""
        if self.log_requests:
            failure = as_server_error(error)
            facts = {"request_id": identity, "protocol": protocol, "target": target}
            facts |= {"status": failure.code.name, "error": str(failure)}
            log.warning("refused", extra={"facts": facts})

    def _watched(self, request: Request, done: Done, outcome: Outcome) -> None:
        done(outcome)
        self._ended(request, outcome)

    def _ended(self, request: Request, outcome: Outcome) -> None:
        """Trace and log a request."""
        now = clock()
        if request.origin.trace_id:
            self.tracer.ended(request, outcome, now)
        if self.log_requests:
            failed = isinstance(outcome, ServerError)
            log.log(
                logging.WARNING if failed else logging.INFO, "%s", "refused" if failed else "answered",
                extra={"facts": facts_of(request, outcome, now)},
            )  # fmt: skip

    def _done(self, done: Done, outcome: Outcome) -> None:
        with self._lock:
            self.inflight -= 1
        done(outcome)

    # -- health and metadata ------------------------------------------------------------------------------------------
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return not self.exiting_soon and (not self.strict_readiness or self.repository.ready())

    def model_ready(self, name: str, version: int = 0) -> bool:
        """Whether a version serves."""
        try:
            self.repository.find(name, version)
        except ServerError:
            return False
        return not self.exiting_soon

    def metadata(self) -> dict[str, Any]:
        """The server's name, version, extensions."""
        return {"name": self.name, "version": __version__, "extensions": list(EXTENSIONS)}

    def model_metadata(self, name: str, version: int = 0) -> dict[str, Any]:
        """A model's versions, inputs and outputs."""
        servable = self.repository.find(name, version)
        ports = servable.ports
        versions = [version] if version else self.repository.versions(name)
        return {
            "name": name,
            "versions": [str(number) for number in versions],
            "platform": servable.config.platform or servable.config.backend,
            "inputs": [_tensor_metadata(ports, port) for port in ports.inputs],
            "outputs": [_tensor_metadata(ports, port) for port in ports.outputs],
        }

    def config(self, name: str, version: int = 0) -> Config:
        """The complete configuration."""
        return self.repository.find(name, version).config

    def statistics(self, name: str = "", version: int = 0) -> list[dict[str, Any]]:
        """Statistics of one version, of all of a model, or of everything."""
        chosen: list[Servable] = self.repository.serving()
        if name:
            self.repository.find(name, version)
            chosen = [s for s in chosen if s.config.name == name and version in (0, s.version)]
        return [s.statistics.as_plain(s.config.name, s.version) for s in chosen]

    # -- settings -----------------------------------------------------------------------------------------------------
    def log_settings_updated(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change log settings and return all; the level of the server's log follows them."""
        settings = _updated(self.log_settings, changes, "log")
        if settings["log_format"] not in logs.FORMATS:
            raise invalid(f"the log setting 'log_format' must be one of {', '.join(logs.FORMATS)}")
        if settings["log_file"] != self.log_settings["log_file"]:
            raise invalid("the log setting 'log_file' cannot be changed while the server runs: --log-file")
        self.log_settings = settings
        logs.change_form(settings["log_format"])
        shown = (("log_info", logging.INFO), ("log_warning", logging.WARNING), ("log_error", logging.ERROR))
        level = next((level for name, level in shown if self.log_settings[name]), logging.CRITICAL)
        logging.getLogger("ingot.server").setLevel(logging.DEBUG if self.log_settings["log_verbose_level"] else level)
        return self.log_settings

    def trace_settings_updated(self, changes: Mapping[str, Any], model: str = "") -> dict[str, Any]:
        """Change trace settings, of all or of one model, and return all; null resets one."""
        if model:
            self.repository.find(model)
        settings = self.tracer.updated(changes, model)
        self.watching = self.log_requests or self.tracer.on
        return settings

    # -- repository ---------------------------------------------------------------------------------------------------
    def index(self, ready_only: bool = False) -> list[dict[str, str]]:
        """Models and their states."""
        states = [state for state in self.repository.index() if not ready_only or state.state == "READY"]
        return [{key: text for key, text in vars(state).items() if text or key == "name"} for state in states]

    def detailed_index(self, ready_only: bool = False) -> list[dict[str, str]]:
        """The same with digests of what serves."""
        digests = {(s.config.name, str(s.version)): s.digests for s in self.repository.serving()}
        return [{**item, **digests.get((item["name"], item.get("version", "")), {})} for item in self.index(ready_only)]

    def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load or reload; `config` (JSON) stands in for config.pbtxt, `file:PATH` contents for the model's folder."""
        self._explicit("load")
        text = parameters.get("config")
        if text is not None and not isinstance(text, str):
            raise invalid(f"failed to load '{name}', parameter 'config' must be a JSON text")
        override = read_override(text, name) if text else None
        files = given_files(name, parameters)
        if not files:
            self.repository.load(name, override)
        elif override is None:
            raise invalid(f"failed to load '{name}', files are given without the parameter 'config'")
        else:
            self.repository.load_given(name, override, files)

    def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Unload; with `unload_dependents` an ensemble's models too."""
        self._explicit("unload")
        dependents: list[str] = []
        if parameters.get("unload_dependents"):
            steps = self.repository.find(name).config.ensemble_scheduling.step
            dependents = [step.model_name for step in steps]
        for each in (name, *dict.fromkeys(dependents)):
            self.repository.unload(each)

    def _explicit(self, verb: str) -> None:
        if self.repository.mode != "explicit":
            raise ServerError(
                Code.UNAVAILABLE, f"explicit model load / unload is not allowed if polling is enabled ({verb}); "
                "start the server with --model-control-mode=explicit",
            )  # fmt: skip


def _tensor_metadata(ports: Ports, port: Any) -> dict[str, Any]:
    return {"name": port.name, "datatype": port.datatype, "shape": list(ports.shape_of(port))}


def _updated(settings: Mapping[str, Any], changes: Mapping[str, Any], what: str) -> dict[str, Any]:
    for name, value in changes.items():
        if name not in settings:
            raise invalid(f"there is no {what} setting '{name}'; there are {', '.join(settings)}")
        if type(value) is not type(settings[name]):
            raise invalid(f"the {what} setting '{name}' must be like {settings[name]!r}, not {value!r}")
    return {**settings, **changes}


def facts_of(request: Request, outcome: Outcome, now: int) -> dict[str, Any]:
    """What a log line says of a request; times in microseconds."""
    origin, facts = request.origin, dict[str, Any]()
    if isinstance(outcome, ServerError):
        facts = {"status": outcome.code.name, "error": str(outcome)}
    else:
        facts = {"version": outcome.version, "status": "OK"}
    if origin.executions:
        timings = [(item.arrived, item.timing) for item in origin.executions]
        facts["queue_us"] = sum(timing.start - arrived for arrived, timing in timings) // 1000
        facts["compute_us"] = sum(timing.answered - timing.start for _, timing in timings) // 1000
    if origin.trace_id:
        facts["trace_id"] = origin.trace_id
    known = {"request_id": origin.request_id, "protocol": origin.protocol, "model": request.model}
    return {**known, **facts, "latency_us": (now - request.arrived) // 1000}


def version_number(text: str) -> int:
    """A version as clients write it; empty is 0, the policy's choice."""
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) == 0:
        raise invalid(
            f"failed to get model version from specified version string '{text}', version should be an integer > 0"
        )
    return int(text)

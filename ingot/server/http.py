"""Routes of the v2 HTTP protocol and its Triton extensions."""

from __future__ import annotations

import logging
import re
import urllib.parse
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import orjson

from ingot.errors import IngotError
from ingot.server import generate, http_codec, openapi
from ingot.server.access import Access
from ingot.server.conversations import Parts
from ingot.server.heads import header_lines
from ingot.server.request import Code, Outcome, Request, ServerError, invalid
from ingot.server.scheduler import Cancel, as_server_error, clock
from ingot.server.schema import as_plain
from ingot.server.service import Service, version_number
from ingot.server.shm import CUDA_REFUSAL
from ingot.server.wire import Exchange, Part

log = logging.getLogger("ingot.server.http")
_JSON = {b"content-type": b"application/json"}
_CHALLENGE = {**_JSON, b"www-authenticate": b"Bearer"}
_MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
_ANSWERS_KEPT = 4096
_JSON_LENGTH = b"inference-header-content-length"


@dataclass(frozen=True)
class Route:
    """One path; `slow` ones run outside the event loop. The function returns JSON, or a status alone.

    `group`: whose API keys it takes (access.GROUPS); empty: everybody may ask.
    """

    methods: tuple[bytes, ...]
    pattern: re.Pattern[str]
    action: Callable[..., Any]
    slow: bool = False
    group: str = "inference"


@dataclass(frozen=True, slots=True)
class _Plain:
    """What a head says of an inference without compression: the next one with the same head is not looked at again."""

    model: str
    version: int
    json_length: int | None


@dataclass
class HttpApi:
    """Handles exchanges of `wire.Front`."""

    service: Service
    body_limit: int = 1 << 30
    access: Access = field(default_factory=Access)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, thread_name_prefix="ingot-http"))
    _known: dict[bytes, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._decoder = http_codec.Decoder(self.service.regions)

    def __call__(self, exchange: Exchange) -> None:
        """Answer an exchange, now or later."""
        try:
            plain: _Plain | None = exchange.notes.get("plain") if exchange.notes else None
            if plain is not None:
                if self.access.keys:
                    self._admit(exchange, "inference")
                self._submit(exchange, plain, exchange.body, b"")
                return
            infer = self._known.get(exchange.target) or self._infer_target(exchange.target)
            if infer is not None:
                self._admit(exchange, "inference")
                self._infer(exchange, *infer)
            elif (match := _GENERATE.fullmatch(exchange.target.partition(b"?")[0].decode("latin-1"))) is not None:
                self._admit(exchange, "inference")
                self._generate(exchange, match)
            else:
                self._dispatch(exchange)
        except Exception as error:  # noqa: BLE001 - a client always gets an answer
            self._error(exchange, error)

    def _admit(self, exchange: Exchange, group: str) -> None:
        """UNAUTHORIZED unless the group's keys, if it has any, allow this."""
        if group in self.access.keys:
            try:
                self.access.check_headers(group, exchange.headers)
            except ServerError as error:
                self._refused(exchange, error)
                raise

    def _refused(self, exchange: Exchange, error: ServerError) -> None:
        self.service.refused("http", _text(exchange.headers, b"x-request-id"), exchange.target.decode("latin-1"), error)

    def close(self) -> None:
        """End the threads of slow routes."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    # -- inference ----------------------------------------------------------------------------------------------------
    def _infer_target(self, target: bytes) -> tuple[str, int] | None:
        match = _INFER.fullmatch(target.partition(b"?")[0].decode("latin-1"))
        if match is None:
            return None
        found = urllib.parse.unquote(match["model"]), version_number(match["version"] or "")
        if len(self._known) < _ANSWERS_KEPT and self.service.model_ready(*found):
            self._known[target] = found
        return found

    def _infer(self, exchange: Exchange, model: str, version: int) -> None:
        if exchange.method != b"POST":
            raise ServerError(Code.UNSUPPORTED, "inference takes POST")
        accepted = _accepted_encoding(exchange)
        if accepted or b"content-encoding" in exchange.headers:
            action = partial(self._decode_and_submit, exchange, model, version, accepted)
            self.pool.submit(self._guarded, exchange, action)
            return
        plain = _Plain(model, version, _header_length(exchange.headers.get(_JSON_LENGTH)))
        if exchange.notes is not None:
            exchange.notes["plain"] = plain
        self._submit(exchange, plain, exchange.body, b"")

    def _guarded(self, exchange: Exchange, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - becomes the answer
            exchange.post(partial(self._error, exchange, error))

    def _decode_and_submit(self, exchange: Exchange, model: str, version: int, encoding: bytes) -> None:
        headers, body = exchange.headers, exchange.body
        if b"content-encoding" in headers:
            body = http_codec.decompressed(body, headers[b"content-encoding"].lower(), self.body_limit)
        self._submit(exchange, _Plain(model, version, _header_length(headers.get(_JSON_LENGTH))), body, encoding)

    def _submit(self, exchange: Exchange, plain: _Plain, body: bytes | bytearray, encoding: bytes) -> None:
        try:
            request = self._decoder(body, plain.json_length, plain.model, plain.version, clock())
            if self.service.watching:
                request = self._watched(exchange, request)
        except ServerError as error:
            self._refused(exchange, error)
            self.service.repository.find(plain.model, plain.version)  # an unknown model is the better answer
            raise
        exchange.cancel = self.service.infer(request, lambda outcome: self._done(exchange, request, outcome, encoding))

    def _watched(self, exchange: Exchange, request: Request) -> Request:
        """The request, marked where it is to be traced or logged."""
        if not self.service.watching:
            return request
        identity, parent = (_text(exchange.headers, name) for name in (b"x-request-id", b"traceparent"))
        return self.service.watch(request, "http", identity, parent)

    def _done(self, exchange: Exchange, request: Request, outcome: Outcome, encoding: bytes) -> None:
        """On an instance's thread: compression there would hold it up, so that goes to the pool."""
        if encoding:
            self.pool.submit(self._guarded, exchange, lambda: self._send(exchange, request, outcome, encoding))
        elif exchange.here:
            self._send_now(exchange, request, outcome)
        else:
            exchange.post(lambda: self._send_now(exchange, request, outcome))

    def _send_now(self, exchange: Exchange, request: Request, outcome: Outcome) -> None:
        try:
            exchange.respond(200, *self._encoded(request, outcome, b""))
        except Exception as error:  # noqa: BLE001 - becomes the answer
            self._error(exchange, error)

    def _send(self, exchange: Exchange, request: Request, outcome: Outcome, encoding: bytes) -> None:
        parts, headers = self._encoded(request, outcome, encoding)
        exchange.post(lambda: exchange.respond(200, parts, headers))

    def _encoded(self, request: Request, outcome: Outcome, encoding: bytes) -> tuple[list[Part], bytes]:
        if isinstance(outcome, ServerError):
            raise outcome
        parts, length = http_codec.encode(request, outcome, self.service.regions)
        if encoding:
            parts = [http_codec.compressed(parts, encoding)]
        return parts, _headers_of(length, encoding)

    def _generate(self, exchange: Exchange, match: re.Match[str]) -> None:
        if exchange.method != b"POST":
            raise ServerError(Code.UNSUPPORTED, "generate takes POST")
        model, version = urllib.parse.unquote(match["model"]), version_number(match["version"] or "")
        body: bytes | bytearray = exchange.body
        if b"content-encoding" in exchange.headers:
            body = http_codec.decompressed(body, exchange.headers[b"content-encoding"].lower(), self.body_limit)
        document, ports = http_codec.parse_json(bytes(body)), self.service.repository.find(model, version).ports
        request = self._watched(exchange, generate.decode(document, model, version, ports, clock()))
        if match["stream"]:
            events = EventStream(exchange)
            request = replace(request, part=events.parts)
            events.cancel = self.service.infer(request, lambda outcome: exchange.post(partial(events.end, outcome)))
        else:
            send = partial(self._send_generated, exchange)
            exchange.cancel = self.service.infer(request, lambda outcome: exchange.post(partial(send, outcome)))

    def _send_generated(self, exchange: Exchange, outcome: Outcome) -> None:
        if isinstance(outcome, ServerError):
            _refuse(exchange, outcome)
        else:
            exchange.respond(200, [generate.encode(outcome)], _JSON)

    # -- everything else ----------------------------------------------------------------------------------------------
    def _dispatch(self, exchange: Exchange) -> None:
        path, _, _ = exchange.target.decode("latin-1").partition("?")
        wrong_method = False
        for route in ROUTES:
            match = route.pattern.fullmatch(path.rstrip("/") or "/")
            if match is None:
                continue
            if exchange.method not in route.methods:
                wrong_method = True
                continue
            if route.group:
                self._admit(exchange, route.group)
            names = {key: urllib.parse.unquote(value or "") for key, value in match.groupdict().items()}
            if route.slow:
                self.pool.submit(self._guarded, exchange, partial(self._answer_slow, exchange, route, names))
            else:
                self._answer(exchange, route.action(self.service, _body(exchange, route), **names))
            return
        if wrong_method:
            exchange.respond(405, [_message(f"{exchange.method.decode('latin-1')} is not allowed for {path}")], _JSON)
        else:
            exchange.respond(404, [_message(f"there is no route {path}")], _JSON)

    def _answer_slow(self, exchange: Exchange, route: Route, names: Mapping[str, str]) -> None:
        result = route.action(self.service, _body(exchange, route), **names)
        exchange.post(lambda: self._answer(exchange, result))

    def _answer(self, exchange: Exchange, result: Any) -> None:
        if isinstance(result, str):
            exchange.respond(200, [result.encode()], {b"content-type": b"text/html; charset=utf-8"})
        elif isinstance(result, bool):
            exchange.respond(200 if result else 400)
        else:
            exchange.respond(200, [orjson.dumps(result)] if result is not None else [], _JSON)

    def _error(self, exchange: Exchange, error: Exception) -> None:
        if not isinstance(error, IngotError):
            log.error("a request failed", exc_info=error)
        _refuse(exchange, as_server_error(error))


class EventStream:
    """An answer of server-sent events, one for each response; on the event loop's thread but for what `parts` takes."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange, self._begun, self._unread, self._flowing = exchange, False, 0, True
        self.parts = Parts(lambda parts, outcome, final: exchange.post(partial(self._part, outcome)))
        self.cancel: Cancel | None = None
        exchange.cancel, exchange.flow = self._leave, self._flow

    def end(self, outcome: Outcome) -> None:
        """The last event, or what went wrong; a decoupled model has said everything before."""
        if self.parts.too_slow:
            self._exchange.abandon()
        elif isinstance(outcome, ServerError) and not self._begun:
            _refuse(self._exchange, outcome)
        else:
            if isinstance(outcome, ServerError) or not outcome.ports.decoupled:
                self._write(outcome)
            self._begin()
            self._exchange.piece(b"")

    def _part(self, outcome: Outcome) -> None:
        self._write(outcome)
        self._unread += 1
        self._flow(self._flowing)

    def _write(self, outcome: Outcome) -> None:
        text = _message(str(outcome)) if isinstance(outcome, ServerError) else generate.encode(outcome)
        self._begin()
        self._exchange.piece(generate.event(text))

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._exchange.begin(200, generate.EVENT_STREAM)

    def _flow(self, flowing: bool) -> None:
        """More is taken from the model while the client reads."""
        self._flowing = flowing
        while flowing and self._unread:
            self._unread -= 1
            self.parts.taken()

    def _leave(self) -> None:
        self.parts.leave()
        if self.cancel is not None:
            self.cancel()


def _refuse(exchange: Exchange, failure: ServerError) -> None:
    headers = _CHALLENGE if failure.code is Code.UNAUTHORIZED else _JSON
    exchange.respond(failure.code.status, [_message(str(failure))], headers)


@lru_cache(1024)
def _headers_of(json_length: int | None, encoding: bytes) -> bytes:
    """An answer's headers: of JSON alone, or so much of it before binary tensors."""
    headers = _JSON
    if json_length is not None:
        headers = {b"content-type": b"application/octet-stream", _JSON_LENGTH: b"%d" % json_length}
    return header_lines(headers | {b"content-encoding": encoding} if encoding else headers)


def _text(headers: Mapping[bytes, bytes], name: bytes) -> str:
    return headers.get(name, b"").decode("latin-1")


def _accepted_encoding(exchange: Exchange) -> bytes:
    accepted = exchange.headers.get(b"accept-encoding")
    return http_codec.chosen_compression(accepted) if accepted else b""


def _message(text: str) -> bytes:
    return orjson.dumps({"error": text.encode(errors="replace").decode()})


def _header_length(value: bytes | None) -> int | None:
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise invalid(f"Inference-Header-Content-Length must be a number, it is '{value.decode('latin-1')}'")
    return int(value)


def _body(exchange: Exchange, route: Route) -> dict[str, Any]:
    return http_codec.parse_json(bytes(exchange.body)) if exchange.body and exchange.method == b"POST" else {}


# -- actions: (service, JSON body, names in the path) -> JSON, a bool for a bare status, a text for a page -------------
def _live(service: Service, body: Any) -> bool:
    return True


def _ready(service: Service, body: Any) -> bool:
    return service.ready()


def _server_metadata(service: Service, body: Any) -> Any:
    return service.metadata()


def _model_ready(service: Service, body: Any, model: str, version: str) -> bool:
    return service.model_ready(model, version_number(version))


def _model_metadata(service: Service, body: Any, model: str, version: str) -> Any:
    return service.model_metadata(model, version_number(version))


def _model_config(service: Service, body: Any, model: str, version: str) -> Any:
    return as_plain(service.config(model, version_number(version)))


def _model_stats(service: Service, body: Any, model: str = "", version: str = "") -> Any:
    return {"model_stats": service.statistics(model, version_number(version))}


def _index(service: Service, body: Any) -> Any:
    return service.detailed_index(body.get("ready") is True)


def _load(service: Service, body: Any, model: str) -> None:
    service.load(model, _parameters(body))


def _unload(service: Service, body: Any, model: str) -> None:
    service.unload(model, _parameters(body))


def _parameters(body: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise invalid("Unable to parse 'parameters': must be an object")
    return parameters


def _system_status(service: Service, body: Any, region: str = "") -> Any:
    return service.regions.status(region)


def _system_register(service: Service, body: Any, region: str) -> None:
    numbers = [body.get("offset", 0), body.get("byte_size")]
    if not isinstance(body.get("key"), str) or any(type(number) is not int for number in numbers):
        raise invalid("registering shared memory takes 'key' (a string), 'offset' and 'byte_size' (integers)")
    service.regions.register(region, body["key"], *numbers)


def _system_unregister(service: Service, body: Any, region: str = "") -> None:
    service.regions.unregister(region)


def _cuda_status(service: Service, body: Any, region: str = "") -> Any:
    if region:
        raise ServerError(Code.NOT_FOUND, f"Unable to find cuda shared memory region: '{region}'")
    return []


def _cuda_register(service: Service, body: Any, region: str) -> None:
    raise ServerError(Code.UNSUPPORTED, CUDA_REFUSAL)


def _cuda_unregister(service: Service, body: Any, region: str = "") -> None:
    return


def _logging(service: Service, body: Any) -> Any:
    return service.log_settings_updated(body)


def _trace(service: Service, body: Any, model: str = "", version: str = "") -> Any:
    return service.trace_settings_updated(body, model)


_INFER = re.compile(_MODEL + "/infer")
_GENERATE = re.compile(_MODEL + "/generate(?P<stream>_stream)?")
_GET, _POST, _BOTH = (b"GET", b"HEAD"), (b"POST",), (b"GET", b"POST")


def _route(
    methods: tuple[bytes, ...], path: str, action: Callable[..., Any], slow: bool = False, group: str = "inference"
) -> Route:
    return Route(methods, re.compile(path), action, slow, group)


ROUTES = (
    _route(_GET, "/v2/health/live", _live, group=""),
    _route(_GET, "/v2/health/ready", _ready, group=""),
    _route(_GET, "/v2", _server_metadata),
    _route(_GET, "/v2/models/stats", _model_stats),
    _route(_GET, _MODEL, _model_metadata),
    _route(_GET, _MODEL + "/ready", _model_ready),
    _route(_GET, _MODEL + "/config", _model_config),
    _route(_GET, _MODEL + "/stats", _model_stats),
    _route(_BOTH, _MODEL + "/trace/setting", _trace, group="management"),
    _route(_POST, "/v2/repository/index", _index, slow=True, group="management"),
    _route(_POST, "/v2/repository/models/(?P<model>[^/]+)/load", _load, slow=True, group="management"),
    _route(_POST, "/v2/repository/models/(?P<model>[^/]+)/unload", _unload, slow=True, group="management"),
    _route(_GET, "/v2/systemsharedmemory(?:/region/(?P<region>[^/]+))?/status", _system_status),
    _route(_POST, "/v2/systemsharedmemory/region/(?P<region>[^/]+)/register", _system_register),
    _route(_POST, "/v2/systemsharedmemory(?:/region/(?P<region>[^/]+))?/unregister", _system_unregister),
    _route(_GET, "/v2/cudasharedmemory(?:/region/(?P<region>[^/]+))?/status", _cuda_status),
    _route(_POST, "/v2/cudasharedmemory/region/(?P<region>[^/]+)/register", _cuda_register),
    _route(_POST, "/v2/cudasharedmemory(?:/region/(?P<region>[^/]+))?/unregister", _cuda_unregister),
    _route(_BOTH, "/v2/logging", _logging, group="management"),
    _route(_GET, "/openapi.json", lambda service, body: openapi.document(), group=""),
    _route(_GET, "/docs", lambda service, body: openapi.page(), group=""),
    _route(_BOTH, "/v2/trace/setting", _trace, group="management"),
)

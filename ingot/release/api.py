"""The HTTP API and the console's files, over the server's own front. Roles: a viewer reads, an operator commands.

Without any key made, only this machine's own programs are served, under a host name that is this machine's, so that
no page of somebody else's in a browser here can command (it also cannot send the content type that commands need).
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import msgspec

from ingot.release import events, view
from ingot.release.spec import ReleaseError, SpecError, parse
from ingot.release.store import Store, Unavailable
from ingot.server.wire import Exchange

log = logging.getLogger("ingot.release")
CONSOLE = Path(__file__).parent / "console"
_JSON = {b"content-type": b"application/json", b"cache-control": b"no-store"}
_FILES = {"/": "index.html", "/console.js": "console.js", "/console.css": "console.css"}
_TYPES = {".html": b"text/html; charset=utf-8", ".js": b"text/javascript", ".css": b"text/css"}
_POLICY = b"default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
_OWN_HOSTS = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
_CHART_SECONDS = 180.0


class Denied(Exception):
    """The answer is this status and sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Asked:
    """A request, its path's names, who asks."""

    store: Store
    body: bytes
    query: Mapping[str, list[str]]
    actor: str
    model: str = ""
    verb: str = ""


@dataclass(frozen=True)
class Route:
    """A path; `command` ones need an operator."""

    method: bytes
    pattern: re.Pattern[str]
    action: Callable[[Asked], Any]
    command: bool = False


class Api:
    """Handles exchanges of `wire.Front`; the store is asked in threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.pool = ThreadPoolExecutor(8, thread_name_prefix="ingot-api")

    def __call__(self, exchange: Exchange) -> None:
        """Answer an exchange, soon."""
        path = exchange.target.partition(b"?")[0].decode("latin-1")
        if path in _FILES and exchange.method in (b"GET", b"HEAD"):
            file = CONSOLE / _FILES[path]
            headers = {b"content-type": _TYPES[file.suffix], b"content-security-policy": _POLICY}
            exchange.respond(200, [file.read_bytes()], headers)
        else:
            self.pool.submit(self._answer, exchange, path)

    def _answer(self, exchange: Exchange, path: str) -> None:
        try:
            status, result = 200, self._result(exchange, path)
        except Denied as error:
            status, result = error.status, {"error": str(error)}
        except Unavailable as error:
            status, result = 503, {"error": str(error)}
        except ReleaseError as error:
            status, result = 400 if isinstance(error, SpecError) else 409, {"error": str(error)}
        except Exception:
            log.exception("%s failed", path)
            status, result = 500, {"error": "this is a fault of ingot's; its log has the details"}
        body = json.dumps(result).encode()
        exchange.post(partial(exchange.respond, status, [body], _JSON))

    def _result(self, exchange: Exchange, path: str) -> Any:
        for route in ROUTES:
            match = route.pattern.fullmatch(path)
            if match is not None and exchange.method == route.method:
                actor = self._actor(exchange, route.command)
                query = parse_qs(exchange.target.partition(b"?")[2].decode("latin-1"))
                return route.action(Asked(self.store, bytes(exchange.body), query, actor, **match.groupdict()))
        raise Denied(404, f"there is no {exchange.method.decode('latin-1')} {path}")

    def _actor(self, exchange: Exchange, command: bool) -> str:
        """Who asks; Denied if he may not."""
        header = exchange.headers.get(b"authorization", b"").decode("latin-1")
        if command and exchange.headers.get(b"content-type", b"").partition(b";")[0] not in (
            b"application/json", b"application/yaml",
        ):  # fmt: skip
            raise Denied(415, "a command comes as application/json or application/yaml")
        if not header and not self.store.has_keys():
            return _own_program(exchange)
        found = self.store.key(header.removeprefix("Bearer "))
        if found is None:
            raise Denied(401, "send a key: authorization: Bearer …")
        name, role = found
        if command and role != "operator":
            raise Denied(403, f"{name} is a {role}; commands need an operator")
        return name


def _own_program(exchange: Exchange) -> str:
    host = exchange.headers.get(b"host", b"").decode("latin-1")
    if exchange.address not in ("127.0.0.1", "::1") or _OWN_HOSTS.fullmatch(host) is None:
        raise Denied(401, "no key was made yet: `ingot release keys add NAME --role operator` on the store's machine")
    return "local"


# -- actions ----------------------------------------------------------------------------------------------------------
def _list(asked: Asked) -> Any:
    return {"rollouts": [view.summary(_loaded(asked.store, model)[0]) for model in asked.store.models()]}


def _loaded(store: Store, model: str) -> Any:
    state, sequence = store.load(model)
    if state is None:
        raise Denied(404, f"there is no rollout of {model!r}")
    return state, sequence


def _get(asked: Asked) -> Any:
    state, sequence = _loaded(asked.store, asked.model)
    observations, _ = asked.store.observations(asked.model, most=400)
    now = max(time.time(), observations[-1].time if observations else 0.0)
    found = view.full(state, sequence, observations, now)
    if "series" in asked.query:
        found["series"] = view.series(tuple(state.spec.versions), observations, now, _CHART_SECONDS)
    return found


def _history(asked: Asked) -> Any:
    _loaded(asked.store, asked.model)
    after = int(asked.query.get("after", ["0"])[0])
    entries = asked.store.history(asked.model, after)
    return {"history": [view.entry(one) for one in entries]}


def _verify(asked: Asked) -> Any:
    _loaded(asked.store, asked.model)
    return {"fault": asked.store.verify(asked.model)}


def _apply(asked: Asked) -> Any:
    spec = parse(asked.body.decode(errors="replace"))
    return view.summary(asked.store.submit(spec.model, events.Applied(spec), asked.actor))


def _lint(asked: Asked) -> Any:
    spec = parse(asked.body.decode(errors="replace"))
    return {"model": spec.model, "steps": len(spec.steps)}


def _command(asked: Asked) -> Any:
    _loaded(asked.store, asked.model)
    try:
        event = command(asked.verb, json.loads(asked.body or b"{}"))
    except ValueError as error:
        raise Denied(400, f"{asked.verb}: {error}") from error
    return view.summary(asked.store.submit(asked.model, event, asked.actor))


def command(verb: str, settings: Mapping[str, Any]) -> events.Event:
    """The event of a verb with its settings; ValueError if they are none of its own."""
    kind = events.SetWeight if verb == "set-weight" else events.COMMANDS.get(verb)
    if kind is None:
        raise ValueError(f"there is no command {verb!r}")
    unknown = set(settings) - set(kind.__struct_fields__)
    if unknown:
        raise ValueError(f"unknown setting {sorted(unknown)[0]!r}")
    return msgspec.convert({"kind": kind.__name__, **settings}, kind)


def _route(method: bytes, path: str, action: Callable[[Asked], Any], command: bool = False) -> Route:
    return Route(method, re.compile(path), action, command)


_MODEL = r"/api/rollouts/(?P<model>[\w.-]+)"
ROUTES = (
    _route(b"GET", "/api/rollouts", _list),
    _route(b"GET", _MODEL, _get),
    _route(b"GET", _MODEL + "/history", _history),
    _route(b"GET", _MODEL + "/verify", _verify),
    _route(b"POST", "/api/rollouts", _apply, command=True),
    _route(b"POST", "/api/lint", _lint),
    _route(b"POST", _MODEL + "/(?P<verb>[a-z-]+)", _command, command=True),
)

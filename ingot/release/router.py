"""Which version a request goes to: forced version, header routes, rules in order, then weights. Pure."""

from __future__ import annotations

import hashlib
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from ingot.release.rollout import State
from ingot.release.slots import salted
from ingot.release.spec import WHOLE, Endpoint, HeaderRoute, Match, ReleaseError, Version, seconds, slots
from ingot.release.windows import USER_BITS

FORCE, SERVED, ROUTE = b"x-ingot-version", b"x-ingot-version", b"x-ingot-route"
LABELS = b"x-ingot-labels"
_MODEL_PATH = re.compile(rb"/v2/models/([^/?]+)(?:/versions/[^/?]+)?")


class UnknownVersion(ReleaseError):
    """A request forces a version that is not there."""


@dataclass(frozen=True)
class Request:
    """What rules may look at. `model` reads the body, and is called only if a rule needs it."""

    headers: Mapping[bytes, bytes]
    address: Callable[[], str] = lambda: ""
    model: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Decision:
    """A version, why, and the user's bit for counting distinct ones (None: not assigned by weight)."""

    version: str
    reason: str
    user: int | None = None


@dataclass(frozen=True)
class Target:
    """One server of a version; `model` is what the version is called there, None leaves the path alone."""

    host: str
    port: int
    tls: bool
    prefix: bytes
    model: bytes | None

    def path(self, target: bytes) -> bytes:
        """The request's path as this server knows it."""
        if self.model is not None:
            target = _MODEL_PATH.sub(lambda _: b"/v2/models/" + self.model, target, count=1)  # type: ignore[operator]
        return self.prefix + target


def target_of(model: str, version: Version, endpoint: Endpoint) -> Target:
    """An endpoint with the name of its device's engine."""
    url = urlsplit(endpoint.url)
    name = version.engines.get(endpoint.device) or version.model
    if version.model_version is not None:
        name = f"{name or model}/versions/{version.model_version}"
    port = url.port or (443 if url.scheme == "https" else 80)
    prefix = url.path.rstrip("/").encode()
    return Target(url.hostname or "", port, url.scheme == "https", prefix, name.encode() if name else None)


@dataclass(frozen=True)
class Key:
    """A user: where the hash puts him."""

    slot: int
    bit: int


class Router:
    """The routes of one model, compiled from a state; replaced as a whole when the state changes."""

    def __init__(self, state: State, sequence: int, chance: Callable[[], int] | None = None) -> None:
        spec = self.spec = state.spec
        self.state, self.sequence, self.stable = state, sequence, state.stable
        self.targets = {
            name: tuple(target_of(spec.model, version, endpoint) for endpoint in version.endpoints)
            for name, version in spec.versions.items()
        }
        self.timeouts = {name: seconds(version.timeout) for name, version in spec.versions.items()}
        self.live = {state.stable, *(state.ready if state.stage in ("steps", "promoting", "watching") else ())}
        self._starts = [run.start for run in state.assignment]
        self._owners = [run.version for run in state.assignment]
        self._salt = salted(f"{spec.model}/{spec.routing.salt}")
        self._key_header = spec.routing.key.header.lower().encode()
        self._by_address = spec.routing.key.fallback == "address"
        self._chance = chance or partial(random.getrandbits, 63)
        self._header_routes = [_header_test(route) for route in state.header_routes if route.version in self.live]
        rules = [rule for rule in spec.routing.rules if rule.version in self.live]
        self._rules = [(rule.version, f"rule:{rule.name}", self._test(rule.match, rule.name)) for rule in rules]
        self._plain = not self._header_routes and not self._rules
        self.mirror = state.mirror if state.mirror is not None and state.mirror.version in self.live else None

    def decide(self, request: Request) -> Decision:
        """Where it goes; UnknownVersion if it forces one that is not ready."""
        forced = request.headers.get(FORCE)
        if forced is not None:
            return self._forced(forced.decode("latin-1"))
        if not self._plain:
            for version, reason, test in (*self._header_routes, *self._rules):
                if test(request):
                    return Decision(version, reason)
        key = self.key(request)
        return Decision(self.owner(key.slot), "weight", key.bit)

    def owner(self, slot: int) -> str:
        """The version that has a slot."""
        return self._owners[bisect_right(self._starts, slot) - 1]

    def key(self, request: Request) -> Key:
        """The user's slot and bit; of a request without a user: another one each time."""
        text = request.headers.get(self._key_header)
        if text is None and self._by_address:
            text = request.address().encode()
        number = self._chance() if text is None else self._hashed(text)
        return Key(number % WHOLE, number // WHOLE % USER_BITS)

    def fallback(self, version: str) -> str | None:
        """Who answers where a version cannot: stable; for stable itself the one before, as long as that is ready."""
        if version != self.stable:
            return self.stable
        previous = self.state.previous
        return previous if previous in self.state.ready and previous in self.targets else None

    def mirrors(self) -> bool:
        """Whether this request is one of those to be mirrored."""
        return self.mirror is not None and self._chance() % WHOLE < self.mirror.slots

    def _hashed(self, text: bytes) -> int:
        return int.from_bytes(hashlib.blake2b(text, digest_size=8, salt=self._salt).digest(), "big")

    def _forced(self, name: str) -> Decision:
        if name not in self.spec.versions or name not in (*self.state.ready, self.stable):
            ready = ", ".join(sorted({*self.state.ready, self.stable}))
            raise UnknownVersion(f"version {name!r} of {self.spec.model!r} is not ready; these are: {ready}")
        return Decision(name, "forced")

    # -- rules --------------------------------------------------------------------------------------------------------
    def _test(self, match: Match, name: str) -> Callable[[Request], bool]:
        """Every stated field must hold; the body is looked at last."""
        tests: list[Callable[[Request], bool]] = []
        value = _value_test(match)
        if match.header is not None:
            header = match.header.lower().encode()
            tests.append(lambda request: value(request.headers.get(header)))
        if match.label is not None:
            label = match.label.encode()
            tests.append(lambda request: value(_label(request, label)))
        if match.allow_list is not None:
            allowed = {user.encode() for user in match.allow_list}
            tests.append(lambda request: request.headers.get(self._key_header) in allowed)
        if match.percentage is not None:
            tests.append(partial(self._within, slots(match.percentage), salted(f"{self.spec.model}/{name}")))
        if match.segment is not None:
            parts = [self._test(part, name) for part in self.spec.routing.segments[match.segment]]
            tests.append(lambda request: any(part(request) for part in parts))
        if match.model is not None:
            tests.append(lambda request: request.model() == match.model)
        return lambda request: all(test(request) for test in tests)

    def _within(self, share: int, salt: bytes, request: Request) -> bool:
        text = request.headers.get(self._key_header)
        if text is None:
            return self._chance() % WHOLE < share
        return int.from_bytes(hashlib.blake2b(text, digest_size=8, salt=salt).digest(), "big") % WHOLE < share


def _value_test(match: Match) -> Callable[[bytes | None], bool]:
    if match.equals is not None:
        wanted = match.equals.encode()
        return lambda value: value == wanted
    if match.regex is not None:
        pattern = re.compile(match.regex.encode())
        return lambda value: value is not None and pattern.fullmatch(value) is not None
    return lambda value: value is not None


def _label(request: Request, name: bytes) -> bytes | None:
    """The value of `name=value` in the labels' header."""
    for part in request.headers.get(LABELS, b"").split(b","):
        key, found, value = part.strip().partition(b"=")
        if found and key == name:
            return value
    return None


def _header_test(route: HeaderRoute) -> tuple[str, str, Callable[[Request], bool]]:
    value = _value_test(Match(header=route.header, equals=route.equals))
    header = route.header.lower().encode()
    assert route.version is not None
    return route.version, f"header:{route.name}", lambda request: value(request.headers.get(header))


class Routes:
    """All models' routers; found by path, by prefix, or by the body's model where several share a prefix."""

    def __init__(self, routers: Mapping[str, Router]) -> None:
        self.routers = dict(routers)
        self._prefixes: dict[bytes, list[Router]] = {}
        for router in routers.values():
            for prefix in router.spec.routing.paths:
                self._prefixes.setdefault(prefix.encode(), []).append(router)

    def find(self, target: bytes, model: Callable[[], str]) -> Router | None:
        """The router of a path; None if no rollout knows it."""
        match = _MODEL_PATH.match(target)
        if match is not None:
            return self.routers.get(match[1].decode("latin-1"))
        for prefix, routers in self._prefixes.items():
            if target.startswith(prefix):
                if len(routers) == 1:
                    return routers[0]
                return next((router for router in routers if router.spec.model == model()), None)
        return None

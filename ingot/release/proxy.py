"""One worker's work: a request to its version, the answer to the client, what happened to the counters."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import msgspec

from ingot.release.breaker import CircuitBreaker
from ingot.release.mirror import MOST_UNDER_WAY, Mirrored
from ingot.release.router import ROUTE, SERVED, Decision, Request, Router, Routes, Target, UnknownVersion
from ingot.release.spec import seconds
from ingot.release.upstream import Call, Headers, Pool
from ingot.release.windows import USER_BITS, Counters
from ingot.server.wire import Exchange

log = logging.getLogger("ingot.release.gateway")
_JSON = {b"content-type": b"application/json"}
_HOP = frozenset(
    b"connection keep-alive proxy-connection transfer-encoding content-length te trailer upgrade expect".split()
)
_REPEATABLE = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})
_DOWN_SECONDS = 1.0


class Pairs(dict[bytes, bytes]):
    """Headers that may repeat (set-cookie), as the front writes them: only `items` is asked for."""

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        super().__init__()
        self._pairs = list(pairs)

    def items(self) -> Any:
        """All of them, in order."""
        return self._pairs

    def __len__(self) -> int:
        return len(self._pairs)


class Feedback(msgspec.Struct, forbid_unknown_fields=True):
    """POST /feedback: an event on an answer; the version as the answer said, or the user whose answer it was."""

    model: str
    event: str
    good: bool
    version: str | None = None
    user: str | None = None


_FEEDBACK = msgspec.json.Decoder(Feedback)


class Proxy:
    """Handles exchanges of `wire.Front`; counters are cumulative for the life of this process."""

    def __init__(self, routes: Routes) -> None:
        self.routes = routes
        self.counters: dict[str, dict[str, Counters]] = {}
        self.users: dict[str, dict[str, bytearray]] = {}
        self.breakers: dict[tuple[str, str], CircuitBreaker] = {}
        self.pools: dict[tuple[str, int, bool], Pool] = {}
        self.down: dict[Target, float] = {}
        self.under_way = self.mirroring = self._turn = 0
        self.loop = asyncio.get_running_loop()

    def __call__(self, exchange: Exchange) -> None:
        """Answer an exchange, soon."""
        target = exchange.target
        router = self.routes.find(target, partial(model_of, exchange))
        if router is None:
            self._own(exchange, target.partition(b"?")[0])
            return
        facts = Request(exchange.headers, lambda: exchange.address, partial(model_of, exchange))
        try:
            decision = router.decide(facts)
        except UnknownVersion as error:
            exchange.respond(400, [_message(str(error))], _JSON)
            return
        Transfer(self, router, exchange, decision).begin()

    def change(self, routes: Routes) -> None:
        """From the next request on; what is under way keeps its routes. Distinct users are counted anew per weights."""
        for model, router in routes.routers.items():
            before = self.routes.routers.get(model)
            if before is None or before.state.assignment != router.state.assignment:
                self.users[model] = {}
        self.routes = routes

    # -- what is counted ----------------------------------------------------------------------------------------------
    def counted(self, model: str, version: str) -> Counters:
        """A version's counters."""
        versions = self.counters.setdefault(model, {})
        if version not in versions:
            versions[version] = Counters(histogram={}, feedback={})
        return versions[version]

    def saw(self, model: str, version: str, bit: int) -> None:
        """A user got an answer of a version."""
        versions = self.users.setdefault(model, {})
        if version not in versions:
            versions[version] = bytearray(USER_BITS // 8)
        versions[version][bit >> 3] |= 1 << (bit & 7)

    def breaker(self, router: Router, version: str) -> CircuitBreaker:
        """A version's breaker in this worker."""
        config, key = router.spec.routing.breaker, (router.spec.model, version)
        breaker, cooldown = self.breakers.get(key), seconds(config.cooldown)
        if breaker is None or (breaker.failures, breaker.cooldown) != (config.failures, cooldown):
            breaker = self.breakers[key] = CircuitBreaker(config.failures, cooldown)
        return breaker

    # -- servers ------------------------------------------------------------------------------------------------------
    def pool(self, target: Target) -> Pool:
        """The connections to a server."""
        key = (target.host, target.port, target.tls)
        if key not in self.pools:
            self.pools[key] = Pool(*key)
        return self.pools[key]

    def choose(self, targets: tuple[Target, ...]) -> Target:
        """The next server in turn, those that just refused a connection last."""
        self._turn += 1
        if len(targets) == 1:
            return targets[0]
        now = time.monotonic()
        up = [target for target in targets if self.down.get(target, 0.0) <= now] or list(targets)
        return up[self._turn % len(up)]

    # -- the gateway's own paths --------------------------------------------------------------------------------------
    def _own(self, exchange: Exchange, path: bytes) -> None:
        if path in (b"/v2/health/live", b"/v2/health/ready"):
            exchange.respond(200)
        elif path == b"/feedback" and exchange.method == b"POST":
            self._feedback(exchange)
        else:
            exchange.respond(404, [_message("no rollout knows this path; apply one for its model")], _JSON)

    def _feedback(self, exchange: Exchange) -> None:
        try:
            event = _FEEDBACK.decode(exchange.body)
        except msgspec.MsgspecError as error:
            exchange.respond(400, [_message(f"feedback: {error}")], _JSON)
            return
        router = self.routes.routers.get(event.model)
        version = self._version_of(router, event) if router is not None else None
        if router is None or version not in router.spec.versions:
            exchange.respond(404, [_message(f"there is no such model or version: {event.model} {version}")], _JSON)
            return
        self.counted(event.model, version).told(event.event, event.good)
        exchange.respond(204)

    def _version_of(self, router: Router, event: Feedback) -> str | None:
        if event.version is not None or event.user is None:
            return event.version
        header = router.spec.routing.key.header.lower().encode()
        return router.owner(router.key(Request({header: event.user.encode()})).slot)


class Transfer:
    """A request on its way: at most one attempt at its version, and one on stable if that is safe."""

    def __init__(self, proxy: Proxy, router: Router, exchange: Exchange, decision: Decision) -> None:
        self.proxy, self.router, self.exchange = proxy, router, exchange
        self.version, self.reason, self.user = decision.version, decision.reason, decision.user
        self.call: Call | None = None
        self.mirrored: Mirrored | None = None
        self.status, self.headers = 0, Headers()
        self.pieces: list[bytes] = []
        self.streaming = self.retried = False
        self.target: Target | None = None
        exchange.cancel, exchange.flow = self.client_gone, self.flow

    # -- sending ------------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """The first attempt; a version whose breaker is open is passed over."""
        proxy, router = self.proxy, self.router
        proxy.under_way += 1
        guarded = self.version != router.stable and self.reason != "forced"
        if guarded and not proxy.breaker(router, self.version).allows(time.monotonic()):
            proxy.counted(router.spec.model, self.version).diverted += 1
            self.version, self.reason, self.user = router.stable, "breaker", None
        if router.mirror is not None and self.version == router.stable and router.mirrors():
            self._mirror(router.mirror.version)
        self.attempt()

    def attempt(self, fresh: bool = False) -> None:
        """Send it to a server of its version."""
        self.started = time.perf_counter()
        self.target = self.proxy.choose(self.router.targets[self.version])
        message = self._message(self.target)
        self.call = self.proxy.pool(self.target).call(message, self, self.router.timeouts[self.version], fresh)

    def _message(self, target: Target) -> list[bytes | bytearray]:
        exchange = self.exchange
        method = b"GET" if exchange.method == b"HEAD" else exchange.method
        lines = [b"%b %b HTTP/1.1\r\n" % (method, target.path(exchange.target))]
        lines += [b"%b: %b\r\n" % pair for pair in exchange.headers.items() if pair[0] not in _HOP]
        lines.append(b"content-length: %d\r\n\r\n" % len(exchange.body))
        return [b"".join(lines), exchange.body] if exchange.body else [b"".join(lines)]

    def _mirror(self, version: str) -> None:
        proxy, router = self.proxy, self.router
        if proxy.mirroring >= MOST_UNDER_WAY:
            return
        counters = proxy.counted(router.spec.model, version)

        def done(agree: bool) -> None:
            counters.mirrored += 1
            counters.agreed += agree

        self.mirrored = mirrored = Mirrored(done)
        target = proxy.choose(router.targets[version])
        call = proxy.pool(target).call(self._message(target), _Counted(mirrored, proxy), router.timeouts[version])
        proxy.mirroring += 1
        assert call is not None

    # -- the answer ---------------------------------------------------------------------------------------------------
    def head(self, status: int, headers: Headers) -> None:
        """Decide whether this is the answer, and whether it is passed on as it comes."""
        if status in self.router.spec.routing.retry.statuses and self._may_retry(sent=True):
            assert self.call is not None
            self.call.cancel()
            self._retry(f"answered {status}")
            return
        self.status, self.headers = status, headers
        if not any(name == b"content-length" for name, _ in headers) and status not in (204, 304):
            self.streaming = True
            self.latency = time.perf_counter() - self.started
            self.exchange.begin(status, self._answer_headers())

    def data(self, piece: bytes) -> None:
        """Pass on, or keep until the answer is whole."""
        if self.streaming:
            self.exchange.piece(piece)
        else:
            self.pieces.append(piece)

    def complete(self) -> None:
        """Count, and answer."""
        self._count(self.status < 500, self.latency if self.streaming else time.perf_counter() - self.started)
        if self.mirrored is not None:
            whole = None if self.streaming else (self.status, dict(self.headers), b"".join(self.pieces))
            self.mirrored.user_answered(whole if self.status < 500 else None)
        if self.streaming:
            self.exchange.piece(b"")
        else:
            self.exchange.respond(self.status, self.pieces, self._answer_headers())

    def broken(self, reason: str, sent: bool, stale: bool) -> None:
        """Try again where that is safe: a stale connection on the same version, else stable."""
        if not sent and self.target is not None:
            self.proxy.down[self.target] = time.monotonic() + _DOWN_SECONDS
        if stale and self._repeatable():
            self.attempt(fresh=True)
        elif self._may_retry(sent):
            self._retry(reason)
        else:
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        self._count(False, 0.0)
        if self.mirrored is not None:
            self.mirrored.user_answered(None)
        if self.streaming:
            self.exchange.cancel = None
            self.exchange.abandon()
        else:
            said = f"version {self.version} of {self.router.spec.model}: {reason}"
            self.exchange.respond(502, [_message(said)], Pairs([*_JSON.items(), *self._marks()]))

    # -- retries ------------------------------------------------------------------------------------------------------
    def _may_retry(self, sent: bool) -> bool:
        """Once, if nothing has gone out and the server cannot have done anything that counts."""
        fresh = not self.retried and not self.streaming and self.reason != "forced"
        others = not sent and len(self.router.targets[self.version]) > 1
        elsewhere = others or self.router.fallback(self.version) is not None
        return fresh and elsewhere and (not sent or self._repeatable())

    def _repeatable(self) -> bool:
        """GET and the like, and inference, which changes nothing on a server unless the rollout says so."""
        exchange = self.exchange
        if exchange.method in _REPEATABLE:
            return True
        inference = exchange.target.startswith((b"/v2/models/", b"/v1/"))
        return inference and self.router.spec.routing.retry.inference

    def _retry(self, reason: str) -> None:
        self._count(False, 0.0)
        self.proxy.counted(self.router.spec.model, self.version).retried += 1
        fallback = self.router.fallback(self.version) or self.version
        log.debug("version %s of %s: %s; tried on %s", self.version, self.router.spec.model, reason, fallback)
        self.retried, self.version, self.reason, self.user = True, fallback, "retry", None
        self.proxy.under_way += 1
        self.attempt()

    def _count(self, good: bool, latency: float) -> None:
        """One attempt is over."""
        proxy, router = self.proxy, self.router
        proxy.under_way -= 1
        counters = proxy.counted(router.spec.model, self.version)
        if good:
            counters.answered(latency)
            if self.user is not None:
                proxy.saw(router.spec.model, self.version, self.user)
        else:
            counters.failed()
        if self.version != router.stable:
            breaker = proxy.breaker(router, self.version)
            if good:
                breaker.succeeded()
            else:
                breaker.failed(time.monotonic())

    # -- the client ---------------------------------------------------------------------------------------------------
    def client_gone(self) -> None:
        """Nobody waits: the attempt ends uncounted."""
        self.proxy.under_way -= 1
        if self.version != self.router.stable:
            self.proxy.breaker(self.router, self.version).given_up()
        if self.call is not None:
            self.call.cancel()
        if self.mirrored is not None:
            self.mirrored.user_answered(None)

    def flow(self, flowing: bool) -> None:
        """The client reads too slowly, or again: so does the gateway."""
        if self.call is not None:
            self.call.flow(flowing)

    def _answer_headers(self) -> Mapping[bytes, bytes]:
        return Pairs([*(pair for pair in self.headers if pair[0] not in _HOP), *self._marks()])

    def _marks(self) -> list[tuple[bytes, bytes]]:
        return [(SERVED, self.version.encode()), (ROUTE, self.reason.encode())]


class _Counted:
    """A mirror's receiver that gives its place back."""

    def __init__(self, inner: Mirrored, proxy: Proxy) -> None:
        self._inner, self._proxy = inner, proxy
        self.head, self.data = inner.head, inner.data

    def complete(self) -> None:
        """Whole."""
        self._proxy.mirroring -= 1
        self._inner.complete()

    def broken(self, reason: str, sent: bool, stale: bool) -> None:
        """Lost."""
        self._proxy.mirroring -= 1
        self._inner.broken(reason, sent, stale)


def model_of(exchange: Exchange) -> str:
    """The body's "model", for those rules and paths that need it; empty if there is none."""
    with contextlib.suppress(ValueError):
        content = json.loads(bytes(exchange.body))
        if isinstance(content, dict) and isinstance(content.get("model"), str):
            return content["model"]
    return ""


def _message(text: str) -> bytes:
    return json.dumps({"error": text}).encode()

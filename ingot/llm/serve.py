"""An engine behind OpenAI's API, on the model server's HTTP front."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson

from ingot import __version__
from ingot.errors import ConfigError, IngotError
from ingot.llm import openai
from ingot.llm.engine import Engine
from ingot.llm.fields import Fields, UnknownModel, WrongField
from ingot.llm.metrics import exposition
from ingot.llm.openai import Asked, Model
from ingot.llm.replies import Reply
from ingot.llm.request import Event, Overloaded
from ingot.server.access import Access
from ingot.server.app import new_loop
from ingot.server.mailbox import Mailbox
from ingot.server.metrics import CONTENT_TYPE
from ingot.server.request import ServerError
from ingot.server.wire import Exchange, Front, Limits

log = logging.getLogger("ingot.llm.serve")
_JSON = {b"content-type": b"application/json"}
_FLUSH = 2.0  # seconds that clients get to read the last of what was written
_EVENTS = {b"content-type": b"text/event-stream; charset=utf-8", b"cache-control": b"no-cache"}
_NO_EMBEDDINGS = "this engine is of an older Ingot and gives no embeddings; build it anew"


@dataclass(frozen=True)
class ServeOptions:
    """Where a server listens, and who may ask. drain: seconds that answers get to end when the server does."""

    host: str = "127.0.0.1"
    port: int = 8000
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=lambda: Limits(body=16 << 20))
    drain: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.drain < math.inf:  # NaN is not
            raise ConfigError(f"a drain takes at least 0 seconds, not {self.drain}")
        if self.limits.body < 1:
            raise ConfigError(f"the largest body must be at least 1 byte, not {self.limits.body}")


class Conversation:
    """One HTTP request that the engine answers; lives on the event loop."""

    def __init__(self, api: Api, exchange: Exchange, tell: Callable[[Conversation, int, Event], None]) -> None:
        self.api, self.exchange, self.tell = api, exchange, tell
        self.reply: Reply | None = None
        self.gone = self.begun = False
        exchange.cancel = self.cancel

    def submit(self, asked: Asked) -> None:
        """Hand its prompts to the engine; in a thread of the pool."""
        self.reply = reply = Reply(self.api.model, asked)
        try:
            for prompt, request in enumerate(asked.requests):
                reply.tickets.append(self.api.engine.submit(request, partial(self._told, prompt)))
        except Exception:
            self.cancel()
            raise
        if self.gone:
            self.cancel()

    def _told(self, prompt: int, event: Event) -> None:
        """In the speaker's thread."""
        self.exchange.post(partial(self.tell, self, prompt, event))

    def cancel(self) -> None:
        """The client is gone, or has got an error."""
        self.gone = True
        for ticket in self.reply.tickets if self.reply is not None else ():
            self.api.engine.cancel(ticket)

    def whole(self, prompt: int, event: Event) -> None:
        """An answer told at its end."""
        self._at_end(prompt, event, Reply.body)

    def generated(self, prompt: int, event: Event) -> None:
        """KServe's generate: a flat object at the end."""
        self._at_end(prompt, event, lambda reply: self._flat(reply.choices[0].text))

    def embedded(self, prompt: int, event: Event) -> None:
        """Embeddings, when all texts have theirs."""
        self._at_end(prompt, event, Reply.vectors)

    def _at_end(self, prompt: int, event: Event, body: Callable[[Reply], object]) -> None:
        reply = self.reply
        if self.gone or reply is None:
            return
        reply.take(prompt, event)
        if reply.error:
            self._fail(reply.error)
        elif reply.whole:
            self.exchange.respond(200, [orjson.dumps(body(reply))], _JSON)

    def _flat(self, text: str) -> dict[str, Any]:
        return {"model_name": self.api.model.name, "model_version": "1", "text_output": text}

    def generated_piece(self, prompt: int, event: Event) -> None:
        """The same as events, of each piece of text."""
        if self.gone or self.reply is None:
            return
        self.reply.take(prompt, event)
        if event.error and not self.begun:
            self._fail(event.error)
            return
        self._begin()
        if event.text or event.error:
            body = self._flat(event.text)
            self._piece({**body, "error": event.error} if event.error else body)
        if self.reply.whole:
            self.exchange.piece(b"")

    def piece(self, prompt: int, event: Event) -> None:
        """An answer told as it comes."""
        reply = self.reply
        if self.gone or reply is None:
            return
        choice = reply.take(prompt, event)
        if event.error and not self.begun:
            self._fail(event.error)
            return
        self._begin()
        if event.error:
            self._piece({"error": {"message": event.error, "type": "server_error", "param": None, "code": None}})
        else:
            for piece in reply.pieces(choice, event):
                self._piece(piece)
        if reply.whole:
            if reply.asked.usage:
                self._piece(reply.last_piece())
            self.exchange.piece(b"data: [DONE]\n\n")
            self.exchange.piece(b"")

    def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            self.exchange.begin(200, _EVENTS)

    def _piece(self, document: Mapping[str, Any]) -> None:
        self.exchange.piece(b"data: " + orjson.dumps(document) + b"\n\n")

    def _fail(self, error: str) -> None:
        self.cancel()
        self.exchange.respond(500, [_error(error, "server_error")], _JSON)


class Api:
    """Handles exchanges of `wire.Front`. What takes long (templates, tokens, grammars) happens in threads."""

    def __init__(self, engine: Engine, model: Model, access: Access | None = None) -> None:
        self.engine, self.model, self.access = engine, model, access or Access()
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="ingot-llm-http")
        self.ending = False

    def __call__(self, exchange: Exchange) -> None:
        """Answer an exchange, now or later."""
        path = urllib.parse.unquote(exchange.target.partition(b"?")[0].decode("latin-1")).rstrip("/") or "/"
        try:
            self._route(exchange, path)
        except Exception as error:  # noqa: BLE001 - a client always gets an answer
            self._refuse(exchange, error)

    def _route(self, exchange: Exchange, path: str) -> None:
        name = self.model.name
        general = path.replace(f"/v2/models/{name}/", "/v2/models/-/").replace(f"/v1/models/{name}", "/v1/models/-")
        method, action = ROUTES.get(general, (b"", None))
        if action is None:
            code = "model_not_found" if path.startswith(("/v1/models/", "/v2/models/")) else None
            exchange.respond(404, [_error(f"there is no {path} here", "invalid_request_error", code=code)], _JSON)
        elif exchange.method != method and not (method == b"GET" and exchange.method == b"HEAD"):
            exchange.respond(405, [_error(f"{path} takes {method.decode()}", "invalid_request_error")], _JSON)
        else:
            if general not in _OPEN:
                self.access.check_headers("inference", exchange.headers)
            action(self, exchange)

    def _refuse(self, exchange: Exchange, error: Exception) -> None:
        if isinstance(error, Overloaded):
            status, kind = 503, "server_error"
        elif isinstance(error, ServerError):
            status, kind = error.code.status, "invalid_request_error"
        elif isinstance(error, RecursionError):
            status, kind = 400, "invalid_request_error"
        elif isinstance(error, IngotError):
            status, kind = 404 if isinstance(error, UnknownModel) else 400, "invalid_request_error"
        else:
            log.error("a request failed", exc_info=error)
            status, kind = 500, "server_error"
        param = error.param or None if isinstance(error, WrongField) else None
        headers = {**_JSON, **({b"retry-after": b"1"} if status == 503 else {})}
        code = "model_not_found" if isinstance(error, UnknownModel) else None
        exchange.respond(status, [_error(str(error), kind, param, code)], headers)

    # -- what is generated --------------------------------------------------------------------------------------------
    def answer(self, exchange: Exchange, read: Callable[[Any, str], Asked], tells: Tells) -> None:
        """Read the request in a thread, submit it, tell what comes."""
        client = exchange.headers.get(b"authorization", b"").decode("latin-1") or exchange.address
        conversation = Conversation(self, exchange, tells(False))
        self.pool.submit(self._submit, conversation, read, tells, client)

    def _submit(self, conversation: Conversation, read: Callable[[Any, str], Asked], tells: Tells, client: str) -> None:
        exchange = conversation.exchange
        try:
            document = openai.parse(bytes(exchange.body))
            self._check_model(Fields.of(document))
            asked = read(document, client)
            conversation.tell = tells(asked.stream)
            conversation.submit(asked)
        except Exception as error:  # noqa: BLE001 - becomes the answer
            exchange.post(partial(self._refuse, exchange, error))

    def beside(self, exchange: Exchange, body: Callable[[Fields], Mapping[str, Any]]) -> None:
        """Answer with what a thread makes of the request."""
        self.pool.submit(self._answer, exchange, body)

    def _answer(self, exchange: Exchange, body: Callable[[Fields], Mapping[str, Any]]) -> None:
        try:
            told = orjson.dumps(body(Fields.of(openai.parse(bytes(exchange.body)))))
            exchange.post(partial(exchange.respond, 200, [told], _JSON))
        except Exception as error:  # noqa: BLE001 - becomes the answer
            exchange.post(partial(self._refuse, exchange, error))

    def _check_model(self, fields: Fields) -> None:
        wanted = fields.text("model", self.model.name)
        if wanted != self.model.name:
            raise UnknownModel("model", f"there is no model '{wanted}' here; this server has '{self.model.name}'")

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)


Tells = Callable[[bool], Callable[[Conversation, int, Event], None]]


def _error(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    text = message.encode(errors="replace").decode()
    return orjson.dumps({"error": {"message": text, "type": kind, "param": param, "code": code}})


# -- routes -----------------------------------------------------------------------------------------------------------
def _chat(api: Api, exchange: Exchange) -> None:
    api.answer(exchange, api.model.chat, _told)


def _completions(api: Api, exchange: Exchange) -> None:
    api.answer(exchange, api.model.completion, _told)


def _told(stream: bool) -> Callable[[Conversation, int, Event], None]:
    return Conversation.piece if stream else Conversation.whole


def _generate(api: Api, exchange: Exchange) -> None:
    api.answer(exchange, api.model.generate, lambda stream: Conversation.generated)


def _generate_stream(api: Api, exchange: Exchange) -> None:
    api.answer(exchange, api.model.generate, lambda stream: Conversation.generated_piece)


def _model_card(api: Api) -> dict[str, Any]:
    card = {"id": api.model.name, "object": "model", "created": 0, "owned_by": "ingot"}
    return {**card, "root": api.model.name, "max_model_len": api.engine.longest}


def _model(api: Api, exchange: Exchange) -> None:
    exchange.respond(200, [orjson.dumps(_model_card(api))], _JSON)


def _models(api: Api, exchange: Exchange) -> None:
    exchange.respond(200, [orjson.dumps({"object": "list", "data": [_model_card(api)]})], _JSON)


def _health(api: Api, exchange: Exchange) -> None:
    trouble = "the server is ending" if api.ending else api.engine.health
    exchange.respond(503 if trouble else 200, [_error(trouble, "server_error")] if trouble else [], _JSON)


def _metrics(api: Api, exchange: Exchange) -> None:
    api.access.check_headers("metrics", exchange.headers)
    exchange.respond(200, [exposition(api.engine, api.model.name).encode()], {b"content-type": CONTENT_TYPE})


def _version(api: Api, exchange: Exchange) -> None:
    exchange.respond(200, [orjson.dumps({"version": __version__})], _JSON)


def _tokenize(api: Api, exchange: Exchange) -> None:
    def body(fields: Fields) -> dict[str, Any]:
        if not fields.has("prompt"):
            raise fields.wrong("prompt", "a string")
        tokens = api.model.text.encode(fields.text("prompt"), fields.flag("add_special_tokens", True))
        return {"tokens": tokens, "count": len(tokens), "max_model_len": api.engine.longest}

    api.beside(exchange, body)


def _detokenize(api: Api, exchange: Exchange) -> None:
    def body(fields: Fields) -> dict[str, Any]:
        if not fields.has("tokens"):
            raise fields.wrong("tokens", "an array of integers")
        tokens = fields.integers("tokens")
        if any(not 0 <= token < api.engine.runner.vocabulary for token in tokens):
            raise WrongField("tokens", f"tokens are 0 to {api.engine.runner.vocabulary - 1}")
        return {"prompt": api.model.text.decode(tokens)}

    api.beside(exchange, body)


def _embeddings(api: Api, exchange: Exchange) -> None:
    if not api.engine.runner.hidden:
        exchange.respond(501, [_error(_NO_EMBEDDINGS, "invalid_request_error")], _JSON)
        return
    read = partial(api.model.embedding, hidden=api.engine.runner.hidden)
    api.answer(exchange, read, lambda stream: Conversation.embedded)


ROUTES: Mapping[str, tuple[bytes, Callable[[Api, Exchange], None]]] = {
    "/v1/chat/completions": (b"POST", _chat),
    "/v1/completions": (b"POST", _completions),
    "/v1/embeddings": (b"POST", _embeddings),
    "/v1/models": (b"GET", _models),
    "/v1/models/-": (b"GET", _model),
    "/v2/models/-/generate": (b"POST", _generate),
    "/v2/models/-/generate_stream": (b"POST", _generate_stream),
    "/tokenize": (b"POST", _tokenize),
    "/detokenize": (b"POST", _detokenize),
    "/health": (b"GET", _health),
    "/ping": (b"GET", _health),
    "/v2/health/ready": (b"GET", _health),
    "/metrics": (b"GET", _metrics),
    "/version": (b"GET", _version),
}
_OPEN = ("/health", "/ping", "/v2/health/ready", "/version", "/metrics")


# -- a server ---------------------------------------------------------------------------------------------------------
class LlmServer:
    """Listens; `start` and `stop` belong to one event loop. The engine runs in threads of its own."""

    def __init__(self, engine: Engine, model: Model, options: ServeOptions | None = None) -> None:
        self.engine, self.options, self.port = engine, options or ServeOptions(), 0
        self.api = Api(engine, model, self.options.access)
        self.front = Front(self.api, self.options.limits, Mailbox())

    async def start(self) -> None:
        """Start the engine, then listen."""
        self.engine.start()
        self.port = await self.front.start(self.options.host, self.options.port)

    async def stop(self) -> None:
        """Health falls, what was accepted is answered within `drain`, the rest is cancelled."""
        self.api.ending = True
        await self.front.stop()
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close, self.options.drain)
        until = time.monotonic() + _FLUSH
        while self.front.connections and time.monotonic() < until:  # the last answers are on their way
            await asyncio.sleep(0.01)
        self.front.abort()
        self.api.close()


@contextlib.contextmanager
def serving(server: LlmServer) -> Iterator[LlmServer]:
    """The server on an event loop in a thread of its own."""
    loop = new_loop()
    thread = threading.Thread(target=loop.run_forever, name="ingot-llm-http-loop", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        try:
            yield server
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

"""The gRPC service: inference.GRPCInferenceService and grpc.health.v1, on the event loop that serves HTTP."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ingot.errors import IngotError
from ingot.server import grpc_codec
from ingot.server.access import Access, Tls
from ingot.server.conversations import TOO_SLOW, Parts
from ingot.server.mailbox import Mailbox
from ingot.server.request import Code, Outcome, Request, Response, ServerError
from ingot.server.scheduler import Cancel, as_server_error, clock
from ingot.server.schema import message, methods
from ingot.server.service import Service, version_number
from ingot.server.shm import CUDA_REFUSAL

log = logging.getLogger("ingot.server.grpc")
_KEEP_ALIVE = (  # a client that is gone without a word is noticed, and what it waits for cancelled
    ("grpc.keepalive_time_ms", 60_000), ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)  # fmt: skip
_STREAM_DEPTH = 256  # requests of one stream that are accepted before their answers are fetched
Call = Callable[["GrpcApi", Any], Any]


@dataclass
class GrpcApi:
    """Answers calls from the service; `mailbox` brings outcomes onto the loop."""

    service: Service
    mailbox: Mailbox = field(default_factory=Mailbox)
    limit: int = 1 << 30
    access: Access = field(default_factory=Access)
    tls: Tls | None = None
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, thread_name_prefix="ingot-grpc"))
    _server: Any = None

    async def start(self, address: str) -> int:
        """Listen; returns the port."""
        self.mailbox.open(asyncio.get_running_loop())
        options = [
            ("grpc.max_receive_message_length", self.limit), ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0), *_KEEP_ALIVE,
        ]  # fmt: skip
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers((_handlers(self), _health_handlers(self)))
        port: int
        if self.tls is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, self.tls.credentials())
        await self._server.start()
        return port

    async def stop(self, grace: float) -> None:
        """End the calls that are still open after `grace` seconds."""
        if self._server is not None:
            await self._server.stop(grace)
        self.pool.shutdown(wait=False, cancel_futures=True)

    # -- inference ----------------------------------------------------------------------------------------------------
    async def infer(self, asked: Any, context: Any) -> Any:
        """ModelInfer."""
        try:
            self.admit("inference", context)
            request = self._decoded(asked, context)
            outcome = await self._outcome(request)
            if isinstance(outcome, ServerError):
                raise outcome
            return grpc_codec.encode(request, outcome, self.service.regions)
        except Exception as error:  # noqa: BLE001 - becomes the call's status
            return await _abort(context, error)

    def _decoded(self, asked: Any, context: Any) -> Request:
        if isinstance(asked, ServerError):
            raise asked
        request = grpc_codec.decode(asked, self.service.regions, clock())
        if not self.service.watching:
            return request
        found = dict(context.invocation_metadata())
        return self.service.watch(request, "grpc", found.get("x-request-id", ""), found.get("traceparent", ""))

    async def _outcome(self, request: Request) -> Outcome:
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        cancel = self.service.infer(request, lambda outcome: self.mailbox.run(lambda: _settle(future, outcome)))
        try:
            return await future
        except asyncio.CancelledError:
            cancel()
            raise

    async def stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """ModelStreamInfer: answers in the order in which they are ready; an error is an answer of its own."""
        await self._admitted("inference", context)
        answers: asyncio.Queue[Any] = asyncio.Queue()
        slots = asyncio.Semaphore(_STREAM_DEPTH)
        cancels: dict[int, Callable[[], Any]] = {}
        reader = asyncio.create_task(self._read_stream(requests, context, answers, slots, cancels))
        try:
            open_answers, reading = 0, True
            while reading or open_answers:
                item = await answers.get()
                if item is _ACCEPTED:
                    open_answers += 1
                elif item is _END:
                    reading = False
                elif isinstance(item, _Part):
                    yield item.answer
                    item.taken()
                else:
                    open_answers -= 1
                    slots.release()
                    if item is not None:
                        yield item
        finally:
            reader.cancel()
            for cancel in cancels.values():
                cancel()

    async def _read_stream(
        self, requests: AsyncIterator[Any], context: Any, answers: asyncio.Queue[Any], slots: asyncio.Semaphore,
        cancels: dict[int, Callable[[], Any]],
    ) -> None:  # fmt: skip
        number = 0
        async for asked in requests:
            await slots.acquire()
            number += 1
            answers.put_nowait(_ACCEPTED)
            try:
                request = self._decoded(asked, context)
                parts = Parts(functools.partial(self._stream_part, request, answers))
                done = functools.partial(self._stream_done, request, parts, answers, cancels, number)
                cancels[number] = parts.leave
                cancel = self.service.infer(replace(request, part=parts), done)
                if number in cancels:  # a quick model has answered by now
                    cancels[number] = functools.partial(_leave, parts, cancel)
            except Exception as error:  # noqa: BLE001 - becomes an answer of the stream
                cancels.pop(number, None)
                names = ("", "") if isinstance(asked, ServerError) else (asked.id, asked.model_name)
                answers.put_nowait(_stream_error(error, *names))
        answers.put_nowait(_END)

    def _stream_part(
        self, request: Request, answers: asyncio.Queue[Any], parts: Parts, outcome: Outcome, final: bool
    ) -> None:
        """One response of a decoupled model."""
        answer = self._stream_answer(request, outcome, final)
        self.mailbox.run(lambda: answers.put_nowait(_Part(answer, parts.taken)))

    def _stream_done(
        self, request: Request, parts: Parts, answers: asyncio.Queue[Any], cancels: dict[int, Callable[[], Any]],
        number: int, outcome: Outcome,
    ) -> None:  # fmt: skip
        def settle() -> None:
            cancels.pop(number, None)
            answers.put_nowait(self._stream_last(request, parts, outcome))

        self.mailbox.run(settle)

    def _stream_last(self, request: Request, parts: Parts, outcome: Outcome) -> Any:
        """A request's answer; a decoupled model's end is one only where the client asks for it."""
        if parts.too_slow:
            outcome = TOO_SLOW
        elif isinstance(outcome, Response) and outcome.ports.decoupled:
            wanted = request.parameters.get("triton_enable_empty_final_response") is True
            if parts.ended or not wanted:
                return None
        return self._stream_answer(request, outcome, True)

    def _stream_answer(self, request: Request, outcome: Outcome, final: bool) -> Any:
        if isinstance(outcome, ServerError):
            return _stream_error(outcome, request.id, request.model)
        try:
            answer = grpc_codec.encode(request, outcome, self.service.regions)
        except Exception as error:  # noqa: BLE001 - becomes an answer of the stream
            return _stream_error(error, request.id, request.model)
        grpc_codec.set_parameter(answer.parameters["triton_final_response"], final)
        return StreamResponse(infer_response=answer)

    async def _admitted(self, group: str, context: Any) -> None:
        """End the call unless it carries a key of the group."""
        try:
            self.admit(group, context)
        except ServerError as error:
            await _abort(context, error)

    def admit(self, group: str, context: Any) -> None:
        """Echo x-request-id; UNAUTHORIZED unless the group's keys, if it has any, allow this call."""
        metadata = context.invocation_metadata()
        identity = next((value for name, value in metadata if name == "x-request-id"), "")
        if identity:
            context.set_trailing_metadata((("x-request-id", identity),))
        if group in self.access.keys:
            try:
                self.access.check_grpc(group, metadata)
            except ServerError as error:
                self.service.refused("grpc", identity, context.peer(), error)
                raise

    async def slow(self, call: Call, asked: Any) -> Any:
        """A call outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, call, self, asked)


@dataclass(frozen=True)
class _Part:
    """A response that is not a request's last word; `taken` says that it is on its way."""

    answer: Any
    taken: Callable[[], None]


_ACCEPTED, _END = object(), object()
StreamResponse = message("inference.ModelStreamInferResponse")


def _settle(future: asyncio.Future[Outcome], outcome: Outcome) -> None:
    if not future.done():
        future.set_result(outcome)


def _leave(parts: Parts, cancel: Cancel) -> None:
    parts.leave()
    cancel()


def _stream_error(error: Exception, identity: str, model: str) -> Any:
    answer = StreamResponse(error_message=str(_reported(error)))
    answer.infer_response.id, answer.infer_response.model_name = identity, model
    return answer


async def _abort(context: Any, error: Exception) -> None:
    failure = _reported(error)
    await context.abort(grpc.StatusCode[failure.code.value[1]], str(failure))


def _reported(error: Exception) -> ServerError:
    if not isinstance(error, IngotError):
        log.error("a call failed", exc_info=error)
    return as_server_error(error)


# -- simple calls: (api, message) -> fields of the answer -------------------------------------------------------------
def _model_ready(api: GrpcApi, asked: Any) -> Any:
    return {"ready": api.service.model_ready(asked.name, version_number(asked.version))}


def _model_metadata(api: GrpcApi, asked: Any) -> Any:
    return api.service.model_metadata(asked.name, version_number(asked.version))


def _model_config(api: GrpcApi, asked: Any) -> Any:
    return {"config": api.service.config(asked.name, version_number(asked.version))}


def _statistics(api: GrpcApi, asked: Any) -> Any:
    return {"model_stats": api.service.statistics(asked.name, version_number(asked.version))}


def _index(api: GrpcApi, asked: Any) -> Any:
    return {"models": api.service.index(asked.ready)}


def _load(api: GrpcApi, asked: Any) -> Any:
    api.service.load(asked.model_name, grpc_codec.plain_parameters(asked.parameters))
    return {}


def _unload(api: GrpcApi, asked: Any) -> Any:
    api.service.unload(asked.model_name, grpc_codec.plain_parameters(asked.parameters))
    return {}


def _system_status(api: GrpcApi, asked: Any) -> Any:
    return {"regions": {region["name"]: region for region in api.service.regions.status(asked.name)}}


def _system_register(api: GrpcApi, asked: Any) -> Any:
    api.service.regions.register(asked.name, asked.key, asked.offset, asked.byte_size)
    return {}


def _system_unregister(api: GrpcApi, asked: Any) -> Any:
    api.service.regions.unregister(asked.name)
    return {}


def _cuda_status(api: GrpcApi, asked: Any) -> Any:
    if asked.name:
        raise ServerError(Code.NOT_FOUND, f"Unable to find cuda shared memory region: '{asked.name}'")
    return {}


def _cuda_register(api: GrpcApi, asked: Any) -> Any:
    raise ServerError(Code.UNSUPPORTED, CUDA_REFUSAL)


def _trace_setting(api: GrpcApi, asked: Any) -> Any:
    stated = {name: list(setting.value) for name, setting in asked.settings.items()}
    changes = {
        name: (values if name == "trace_level" else values[0]) if values else None for name, values in stated.items()
    }
    settings = api.service.trace_settings_updated(changes, asked.model_name)
    return {
        "settings": {name: {"value": [value] if isinstance(value, str) else value} for name, value in settings.items()}
    }


def _log_settings(api: GrpcApi, asked: Any) -> Any:
    changes = {name: grpc_codec.plain_parameters({name: setting})[name] for name, setting in asked.settings.items()}
    return {"settings": {name: _setting(value) for name, value in api.service.log_settings_updated(changes).items()}}


def _setting(value: Any) -> dict[str, Any]:
    return {{bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]: value}


CALLS: dict[str, Call] = {
    "ServerLive": lambda api, asked: {"live": True},
    "ServerReady": lambda api, asked: {"ready": api.service.ready()},
    "ServerMetadata": lambda api, asked: api.service.metadata(),
    "ModelReady": _model_ready,
    "ModelMetadata": _model_metadata,
    "ModelConfig": _model_config,
    "ModelStatistics": _statistics,
    "SystemSharedMemoryStatus": _system_status,
    "SystemSharedMemoryRegister": _system_register,
    "SystemSharedMemoryUnregister": _system_unregister,
    "CudaSharedMemoryStatus": _cuda_status,
    "CudaSharedMemoryRegister": _cuda_register,
    "CudaSharedMemoryUnregister": lambda api, asked: {},
    "TraceSetting": _trace_setting,
    "LogSettings": _log_settings,
}
SLOW_CALLS: dict[str, Call] = {
    "RepositoryIndex": _index,
    "RepositoryModelLoad": _load,
    "RepositoryModelUnload": _unload,
}


_OPEN_CALLS = {"ServerLive", "ServerReady"}
_MANAGEMENT_CALLS = {*SLOW_CALLS, "TraceSetting", "LogSettings"}


def _handlers(api: GrpcApi) -> Any:
    """One handler for each method of the service; a method without one is an error here, not at a client."""
    handlers = {}
    for name, method in methods("inference.GRPCInferenceService").items():
        request, response = message(method.input_type.full_name), message(method.output_type.full_name)
        codec = {"request_deserializer": _parser(request), "response_serializer": response.SerializeToString}
        if name == "ModelStreamInfer":
            handlers[name] = grpc.stream_stream_rpc_method_handler(api.stream, **codec)
        elif name == "ModelInfer":
            handlers[name] = grpc.unary_unary_rpc_method_handler(api.infer, **codec)
        else:
            handlers[name] = grpc.unary_unary_rpc_method_handler(_simple(api, name, response), **codec)
    return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)


def _parser(kind: Any) -> Callable[[bytes], Any]:
    """Bytes to a message, or to the error of what is none: grpcio would log a traceback for each and say UNKNOWN."""

    def parse(raw: bytes) -> Any:
        try:
            return kind.FromString(raw)
        except DecodeError as error:
            return ServerError(Code.INVALID_ARG, f"the request is no {kind.DESCRIPTOR.full_name}: {error}")

    return parse


def _simple(api: GrpcApi, name: str, response: Any) -> Callable[[Any, Any], Awaitable[Any]]:
    quick, slow = CALLS.get(name), SLOW_CALLS.get(name)
    group = "" if name in _OPEN_CALLS else "management" if name in _MANAGEMENT_CALLS else "inference"

    async def call(asked: Any, context: Any) -> Any:
        try:
            api.admit(group, context)
            if isinstance(asked, ServerError):
                raise asked
            fields = quick(api, asked) if quick else await api.slow(slow or CALLS[name], asked)
            return response(**fields)
        except Exception as error:  # noqa: BLE001 - becomes the call's status
            return await _abort(context, error)

    return call


def _health_handlers(api: GrpcApi) -> Any:
    """Health of the server ('') and of each model by name."""
    check, status = message("grpc.health.v1.HealthCheckRequest"), message("grpc.health.v1.HealthCheckResponse")

    def state(asked: Any) -> Any:
        service = api.service
        known = not asked.service or asked.service == "inference.GRPCInferenceService"
        ready = service.ready() if known else service.model_ready(asked.service)
        return status(status="SERVING" if ready else "NOT_SERVING")

    async def checked(asked: Any, context: Any) -> Any:
        return state(asked)

    async def watched(asked: Any, context: Any) -> AsyncIterator[Any]:
        last = None
        while True:
            current = state(asked)
            if current != last:
                yield current
            last = current
            await asyncio.sleep(1.0)

    codec = {"request_deserializer": check.FromString, "response_serializer": status.SerializeToString}
    handlers = {
        "Check": grpc.unary_unary_rpc_method_handler(checked, **codec),
        "Watch": grpc.unary_stream_rpc_method_handler(watched, **codec),
    }
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", handlers)

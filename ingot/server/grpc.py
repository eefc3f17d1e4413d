"""The gRPC service: inference.GRPCInferenceService and grpc.health.v1, on the event loop that serves HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ingot.server import grpc_codec
from ingot.server.access import Access, Tls
from ingot.server.grpc_calls import Call, Calls, Message, unary
from ingot.server.grpc_codec import parsed
from ingot.server.grpc_stream import StreamInfer
from ingot.server.http2 import Connection
from ingot.server.lookout import Lookout
from ingot.server.mailbox import Mailbox
from ingot.server.request import Code, Outcome, Request, ServerError
from ingot.server.scheduler import clock
from ingot.server.schema import message, methods
from ingot.server.service import Service, version_number
from ingot.server.shm import CUDA_REFUSAL
from ingot.server.wire import Front, Limits

_WATCHED_SECONDS = 1.0
Action = Callable[["GrpcApi", Any], Any]


@dataclass
class GrpcApi:
    """Answers calls from the service; `mailbox` brings outcomes onto the loop."""

    service: Service
    mailbox: Mailbox = field(default_factory=Mailbox)
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    tls: Tls | None = None
    lookout: Lookout = field(default_factory=Lookout)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, thread_name_prefix="ingot-grpc"))

    def __post_init__(self) -> None:
        calls = Calls(_methods(self), self.limits.body, self.pool, self.mailbox)
        self._decoder = grpc_codec.Decoder(self.service.regions)
        self.front = Front(calls, self.limits, self.mailbox, Connection, self.lookout)
        self._context = self.tls.context() if self.tls is not None else None
        if self._context is not None:
            self._context.set_alpn_protocols(["h2"])

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port."""
        return await self.front.start(host, port, self._context)

    def renew(self) -> None:
        """Read certificates again; new connections use them. ConfigError if they cannot be used: the old ones stay."""
        if self.tls is not None and self._context is not None:
            self.tls.context()
            self.tls.load_into(self._context)

    async def stop(self, grace: float) -> None:
        """End the calls that are still open after `grace` seconds."""
        await self.front.stop()
        end = asyncio.get_running_loop().time() + grace
        while self.front.connections and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        self.front.abort()
        self.pool.shutdown(wait=False, cancel_futures=True)

    # -- inference ----------------------------------------------------------------------------------------------------
    def infer(self, call: Call, raw: Message) -> None:
        """ModelInfer."""
        self.admit("inference", call)
        request = self.decoded(call, raw)
        cancel = self.service.infer(request, partial(self._done, call, request))
        if call.open:
            call.cancel = cancel

    def decoded(self, call: Call, raw: Message) -> Request:
        """A message as a request, marked where it is to be traced or logged."""
        request = self._decoder(raw, clock())
        if not self.service.watching:
            return request
        return self.service.watch(request, "grpc", call.text(b"x-request-id"), call.text(b"traceparent"))

    def _done(self, call: Call, request: Request, outcome: Outcome) -> None:
        if self.mailbox.here():
            self._answer(call, request, outcome)
        else:
            call.post(partial(self._answer, call, request, outcome))

    def _answer(self, call: Call, request: Request, outcome: Outcome) -> None:
        try:
            if isinstance(outcome, ServerError):
                raise outcome
            call.respond(*grpc_codec.encode(request, outcome, self.service.regions))
        except Exception as error:  # noqa: BLE001 - becomes the call's status
            call.fail(error)

    def admit(self, group: str, call: Call) -> None:
        """UNAUTHORIZED unless the group's keys, if it has any, allow this call."""
        if group in self.access.keys:
            try:
                self.access.check_headers(group, call.metadata)
            except ServerError as error:
                self.service.refused("grpc", call.text(b"x-request-id"), call.address, error)
                raise


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


CALLS: dict[str, Action] = {
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
SLOW_CALLS: dict[str, Action] = {
    "RepositoryIndex": _index,
    "RepositoryModelLoad": _load,
    "RepositoryModelUnload": _unload,
}


_OPEN_CALLS = {"ServerLive", "ServerReady"}
_MANAGEMENT_CALLS = {*SLOW_CALLS, "TraceSetting", "LogSettings"}


def _methods(api: GrpcApi) -> dict[bytes, Callable[[Call], None]]:
    """How each method begins, by its path; a method without an action is an error here, not at a client."""
    begins: dict[str, Callable[[Call], None]] = {
        "ModelInfer": unary(api.infer), "ModelStreamInfer": partial(_stream_infer, api)
    }  # fmt: skip
    for name, method in methods("inference.GRPCInferenceService").items():
        if name not in begins:
            kinds = message(method.input_type.full_name), message(method.output_type.full_name)
            begins[name] = unary(partial(_act, api, name, CALLS.get(name) or SLOW_CALLS[name], *kinds))
    found = {f"/inference.GRPCInferenceService/{name}".encode(): begin for name, begin in begins.items()}
    return {**found, **_health_methods(api)}


def _stream_infer(api: GrpcApi, call: Call) -> None:
    try:
        api.admit("inference", call)
    except ServerError as error:
        call.fail(error)
    else:
        StreamInfer(call, api.service, api.decoded)


def _act(api: GrpcApi, name: str, action: Action, question: Any, answer: Any, call: Call, raw: Message) -> None:
    """A simple call: at once, or on a thread of the pool."""
    api.admit("" if name in _OPEN_CALLS else "management" if name in _MANAGEMENT_CALLS else "inference", call)
    asked = parsed(question, raw)
    if name in CALLS:
        call.respond(answer(**action(api, asked)).SerializeToString())
    else:
        api.pool.submit(_act_slowly, api, action, asked, answer, call)


def _act_slowly(api: GrpcApi, action: Action, asked: Any, answer: Any, call: Call) -> None:
    try:
        result = answer(**action(api, asked)).SerializeToString()
    except Exception as error:  # noqa: BLE001 - becomes the call's status
        call.post(partial(call.fail, error))
    else:
        call.post(partial(call.respond, result))


def _health_methods(api: GrpcApi) -> dict[bytes, Callable[[Call], None]]:
    """Health of the server ('') and of each model by name."""
    question, status = message("grpc.health.v1.HealthCheckRequest"), message("grpc.health.v1.HealthCheckResponse")

    def state(asked: Any) -> bytes:
        service = api.service
        known = not asked.service or asked.service == "inference.GRPCInferenceService"
        ready = service.ready() if known else service.model_ready(asked.service)
        return bytes(status(status="SERVING" if ready else "NOT_SERVING").SerializeToString())

    def check(call: Call, raw: Message) -> None:
        call.respond(state(parsed(question, raw)))

    def watch(call: Call, raw: Message) -> None:
        asked = parsed(question, raw)

        def tell(last: bytes | None) -> None:
            if call.open:
                current = state(asked)
                if current != last:
                    call.send(current)
                asyncio.get_running_loop().call_later(_WATCHED_SECONDS, tell, current)

        tell(None)

    found = {"Check": unary(check), "Watch": unary(watch)}
    return {f"/grpc.health.v1.Health/{name}".encode(): begin for name, begin in found.items()}

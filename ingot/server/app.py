"""`ingot serve models/`: tritonserver's flags, the wiring, signals, and an orderly end."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ingot.errors import ConfigError
from ingot.server import logs
from ingot.server.builder import Builder
from ingot.server.cache import CachedModel, ResponseCache
from ingot.server.config import Config, limit_queue
from ingot.server.ensembles import load_ensemble
from ingot.server.grpc import GrpcApi
from ingot.server.http import HttpApi
from ingot.server.lookout import Lookout
from ingot.server.mailbox import Mailbox
from ingot.server.metrics import MetricsApi
from ingot.server.model import EngineModel, Placing, Servable, load_engine_model
from ingot.server.options import Options as Options
from ingot.server.options import add_arguments as add_arguments
from ingot.server.options import options_from as options_from
from ingot.server.python_model import has_python_backend, load_python_model
from ingot.server.repository import Repository, in_dependency_order
from ingot.server.request import ServerError
from ingot.server.service import Service
from ingot.server.support import check_support
from ingot.server.tracing import COLLECTOR, Tracer
from ingot.server.wire import Front

log = logging.getLogger("ingot.server")


class Server:
    """A running server. `start` and `stop` belong to one event loop; models load in a thread beside it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.builder = Builder(options.engine_cache.expanduser(), options.build_arguments)
        self.mailbox, self.cache = Mailbox(), ResponseCache(options.cache_bytes)
        self.repository = Repository(options.repositories, options.mode, self._load, options.config_name)
        self.service = Service(
            self.repository, options.server_id, strict_readiness=options.strict_readiness, limit=options.inflight,
            tracer=_tracer(options.trace), log_requests=options.log_requests,
        )  # fmt: skip
        self.api = HttpApi(self.service, options.limits.body, options.access)
        self.front = Front(self.api, options.limits, self.mailbox)
        self.grpc = GrpcApi(
            self.service, self.mailbox, options.limits, options.access, options.grpc_tls, Lookout(options.busy_poll)
        )  # fmt: skip
        self.metrics = Front(MetricsApi(self.service, self.cache, options.access), options.limits, self.mailbox)
        self._tls = options.tls.context() if options.tls else None
        self.ports: dict[str, int] = {}
        self._changing = ThreadPoolExecutor(1, thread_name_prefix="ingot-repository")
        self._poller: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the models, then listen. ServerError if a model fails and `exit_on_error` is set."""
        loop = asyncio.get_running_loop()
        self.mailbox.open(loop)
        failures = await loop.run_in_executor(self._changing, self._load_first)
        if failures and self.options.exit_on_error:
            await loop.run_in_executor(self._changing, self.repository.close)
            log.error("the server ends, because a model failed to load; --exit-on-error=false serves the others")
            raise failures[0]
        try:
            await self._listen()
        except ConfigError:
            await self.stop()
            raise
        if self.options.mode == "poll":
            self._poller = asyncio.create_task(self._poll())
        log.info("listening: %s", ", ".join(f"{name} {port}" for name, port in self.ports.items()))

    async def _listen(self) -> None:
        """Open the ports; ConfigError names the one that cannot be had."""
        options = self.options
        grpc, metrics = options.grpc_address or options.address, options.metrics_address or options.address
        opened: dict[str, tuple[int | None, Callable[[int], Awaitable[int]]]] = {
            "http": (options.http_port, lambda port: self.front.start(options.address, port, self._tls)),
            "grpc": (options.grpc_port, lambda port: self.grpc.start(grpc, port)),
            "metrics": (options.metrics_port, lambda port: self.metrics.start(metrics, port, self._tls)),
        }
        for name, (port, opens) in opened.items():
            if port is not None:
                try:
                    self.ports[name] = await opens(port)
                except OSError as error:
                    problem = f"port {port} cannot be listened on: {error}"
                    raise ConfigError(f"{problem}; choose another one (--{name}-port)") from error

    async def stop(self) -> None:
        """Readiness falls, a lame-duck period passes, what was accepted is answered, everything ends; idempotent."""
        if self.service.exiting_soon:
            return
        self.service.exiting_soon = True
        await asyncio.sleep(self.options.lame_duck)
        self.service.exiting = True
        if self._poller is not None:
            self._poller.cancel()
        await self.front.stop()
        loop = asyncio.get_running_loop()
        try:
            closing = loop.run_in_executor(self._changing, self.repository.close)
            await asyncio.wait_for(asyncio.shield(closing), self.options.exit_timeout)
            while self.front.connections and self.service.inflight:
                await asyncio.sleep(0.01)
        except TimeoutError:
            log.error("some requests were not answered within %s s", self.options.exit_timeout)
        await asyncio.sleep(0)  # answers posted by the last instance
        await self.grpc.stop(grace=min(2.0, self.options.exit_timeout))  # answers may still be on their way
        await self.metrics.stop()
        for front in (self.front, self.metrics):
            front.abort()
        self.api.close()
        self._changing.shutdown(wait=False)
        await loop.run_in_executor(None, self.service.tracer.close)

    def renew(self) -> None:
        """Read certificates again; new connections use them. ConfigError if they cannot be used: the old ones stay."""
        if self.options.tls is not None and self._tls is not None:
            self.options.tls.context()
            self.options.tls.load_into(self._tls)
        self.grpc.renew()
        log.info("the certificates were read again")

    # -- models -------------------------------------------------------------------------------------------------------
    def _load(self, config: Config, version: int, folder: Path) -> Servable:
        """One version, ready to serve."""
        check_support(config)
        if config.platform == "ensemble" or config.HasField("ensemble_scheduling"):
            return load_ensemble(config, version, folder, self.repository.find, self.service.submit)
        limit_queue(config, self.options.queue_size)
        if has_python_backend(config):
            loaded = load_python_model(config, version, folder, self.service.submit, self.options.host_policies)
        else:
            loaded = self._engine_model(config, version, folder)
        if config.response_cache.enable and self.cache.capacity:
            return CachedModel(loaded, self.cache, os.urandom(16))
        return loaded

    def _engine_model(self, config: Config, version: int, folder: Path) -> EngineModel:
        engine = self.builder.engine(config, folder / str(version))
        placing = Placing(
            self.options.threads, self.mailbox, self.options.processes, self.options.host_policies
        )  # fmt: skip
        loaded = load_engine_model(config, version, engine, folder, placing)
        return replace(loaded, digests=self.builder.digests(config, folder / str(version), engine))

    def _load_first(self) -> list[ServerError]:
        """Load what the control mode asks for at the start."""
        if self.options.mode != "explicit":
            return self.repository.poll()
        failures = []
        names = self.options.load_models
        if "*" in names:
            names = tuple(in_dependency_order(self.repository.scan()))
        for name in names:
            try:
                self.repository.load(name)
            except ServerError as error:
                log.error("%s", error)
                failures.append(error)
        return failures

    async def _poll(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.options.poll_seconds)
            await loop.run_in_executor(self._changing, self.repository.poll)


class BackgroundServer:
    """A server with an event loop in a thread of its own, as a context manager."""

    def __init__(self, options: Options) -> None:
        self.server = Server(options)
        self.loop = new_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="ingot-loop", daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.server.start(), self.loop).result()
        except BaseException:
            self._end()
            raise
        return self.server

    def __exit__(self, *_: object) -> None:
        try:
            asyncio.run_coroutine_threadsafe(self.server.stop(), self.loop).result()
        finally:
            self._end()

    def _end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def _tracer(settings: Mapping[str, str]) -> Tracer:
    """A tracer as --trace-config says; naming a mode or a destination is enough to switch it on."""
    chosen = {name: value for name, value in settings.items() if name not in ("url", "resource")}
    if settings and "trace_level" not in chosen:
        chosen["trace_level"] = "TIMESTAMPS"
    name, _, value = settings.get("resource", "").partition("=")
    tracer = Tracer(url=settings.get("url", COLLECTOR), resource={name: value} if name else {})
    tracer.updated(chosen)
    return tracer


def new_loop() -> asyncio.AbstractEventLoop:
    """The fastest event loop that is installed."""
    import uvloop

    return uvloop.new_event_loop()


# -- command line -----------------------------------------------------------------------------------------------------
def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    logs.configure(arguments.log_format, bool(arguments.log_verbose), arguments.log_file)
    for name in arguments.unused:
        log.warning("%s says nothing to this server", name)
    if os.geteuid() == 0:
        log.warning("running as root: nothing here needs it; give the server a user of its own")
    loop: Any = new_loop()
    shown = {f"log_{name}": getattr(arguments, f"log_{name}") for name in ("info", "warning", "error")}
    try:
        loop.run_until_complete(_serve(options_from(arguments), shown))
    finally:
        loop.close()
    return 0


def _renew(server: Server) -> None:
    try:
        server.renew()
    except ConfigError as error:
        log.error("%s", error)


def _collect_less() -> None:
    """What stands is not looked through again: a full collection held every request up for 17 ms."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


async def _serve(options: Options, shown: Mapping[str, bool]) -> None:
    ended = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, ended.set)
    server = Server(options)
    server.service.log_settings_updated({**shown, "log_format": logs.chosen()[0]})
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _renew, server)
    await server.start()
    _collect_less()
    await ended.wait()
    log.info("ending: %d requests are being answered", server.service.inflight)
    await server.stop()

"""`ingot serve models/`: tritonserver's flags, the wiring, signals, and an orderly end."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingot.errors import ConfigError
from ingot.server.builder import Builder
from ingot.server.cache import CachedModel, ResponseCache
from ingot.server.config import Config
from ingot.server.ensembles import load_ensemble
from ingot.server.grpc import GrpcApi
from ingot.server.http import HttpApi
from ingot.server.mailbox import Mailbox
from ingot.server.metrics import MetricsApi
from ingot.server.model import EngineModel, Placing, Servable, load_engine_model
from ingot.server.python_model import has_python_backend, load_python_model
from ingot.server.repository import Mode, Repository, in_dependency_order
from ingot.server.request import ServerError
from ingot.server.service import Service
from ingot.server.wire import Front, Limits

log = logging.getLogger("ingot.server")
LOCAL = "0.0.0.0"


@dataclass(frozen=True)
class Options:
    """How a server runs; a port of None leaves that protocol out, 0 lets the system choose."""

    repositories: tuple[Path, ...]
    mode: Mode = "none"
    load_models: tuple[str, ...] = ()
    poll_seconds: float = 15.0
    address: str = LOCAL
    http_port: int | None = 8000
    grpc_port: int | None = 8001
    metrics_port: int | None = 8002
    server_id: str = "ingot"
    strict_readiness: bool = True
    exit_on_error: bool = True
    exit_timeout: float = 30.0
    lame_duck: float = 0.0
    limits: Limits = field(default_factory=Limits)
    engine_cache: Path = Path("~/.cache/ingot/engines")
    config_name: str = ""
    cache_bytes: int = 64 << 20
    processes: bool = False
    threads: int | None = None
    build_arguments: tuple[str, ...] = ("--level", "1")


class Server:
    """A running server. `start` and `stop` belong to one event loop; models load in a thread beside it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.builder = Builder(options.engine_cache.expanduser(), options.build_arguments)
        self.mailbox, self.cache = Mailbox(), ResponseCache(options.cache_bytes)
        self.repository = Repository(options.repositories, options.mode, self._load, options.config_name)
        self.service = Service(self.repository, options.server_id, strict_readiness=options.strict_readiness)
        self.api = HttpApi(self.service, options.limits.body)
        self.front = Front(self.api, options.limits, self.mailbox)
        self.grpc = GrpcApi(self.service, self.mailbox, options.limits.body)
        self.metrics = Front(MetricsApi(self.service, self.cache), options.limits, self.mailbox)
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
            raise failures[0]
        if self.options.http_port is not None:
            self.ports["http"] = await self.front.start(self.options.address, self.options.http_port)
        if self.options.grpc_port is not None:
            self.ports["grpc"] = await self.grpc.start(f"{self.options.address}:{self.options.grpc_port}")
        if self.options.metrics_port is not None:
            self.ports["metrics"] = await self.metrics.start(self.options.address, self.options.metrics_port)
        if self.options.mode == "poll":
            self._poller = asyncio.create_task(self._poll())
        log.info("listening: %s", ", ".join(f"{name} {port}" for name, port in self.ports.items()))

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
        await self.grpc.stop(grace=0.1)
        await self.metrics.stop()
        for front in (self.front, self.metrics):
            front.abort()
        self.api.close()
        self._changing.shutdown(wait=False)

    # -- models -------------------------------------------------------------------------------------------------------
    def _load(self, config: Config, version: int, folder: Path) -> Servable:
        """One version, ready to serve."""
        if config.platform == "ensemble" or config.HasField("ensemble_scheduling"):
            return load_ensemble(config, version, folder, self.repository.find, self.service.submit)
        if has_python_backend(config):
            loaded = load_python_model(config, version, folder)
        else:
            loaded = self._engine_model(config, version, folder)
        if config.response_cache.enable and self.cache.capacity:
            return CachedModel(loaded, self.cache, os.urandom(16))
        return loaded

    def _engine_model(self, config: Config, version: int, folder: Path) -> EngineModel:
        engine = self.builder.engine(config, folder / str(version))
        placing = Placing("cpu", self.options.threads, self.mailbox, self.options.processes)
        return load_engine_model(config, version, engine, folder, placing)

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


def new_loop() -> asyncio.AbstractEventLoop:
    """The fastest event loop that is installed."""
    import uvloop

    return uvloop.new_event_loop()


# -- command line -----------------------------------------------------------------------------------------------------
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """tritonserver's flags, with a hyphen or an underscore; the repository may also be the only argument."""
    add = parser.add_argument
    add("repository", nargs="*", type=Path, help="model repository")
    add(
        "--model-repository",
        "--model-store",
        action="append",
        type=Path,
        default=[],
        help="model repository; repeatable",
    )
    add("--model-control-mode", choices=["none", "poll", "explicit"], default="none")
    add("--load-model", action="append", default=[], help="explicit mode: load at the start; * loads all")
    add("--repository-poll-secs", type=float, default=15.0)
    add("--model-config-name", default="", help="use configs/NAME.pbtxt where a model has it")
    add("--http-port", type=int, default=8000)
    add("--http-address", default=LOCAL)
    add("--grpc-port", type=int, default=8001)
    add("--metrics-port", type=int, default=8002)
    add("--http-max-input-size", type=int, default=1 << 30, help="largest body in bytes, also after decompression")
    for name in ("http", "grpc", "metrics"):
        add(f"--allow-{name}", type=_flag, default=True, metavar="BOOL")
    add("--cache-config", action="append", default=[], help="local,size=BYTES: response cache (64 MiB; 0: none)")
    add("--server-id", default="ingot")
    add("--strict-readiness", type=_flag, default=True, metavar="BOOL")
    add("--exit-on-error", type=_flag, default=True, metavar="BOOL")
    add("--exit-timeout-secs", type=float, default=30.0)
    add("--lame-duck-secs", type=float, default=0.0, help="keep serving so long after readiness fell")
    add("--log-verbose", type=int, default=0)
    add("--engine-cache", type=Path, default=Options.engine_cache, help="where built and copied engines are kept")
    add(
        "--process-per-model",
        type=_flag,
        default=True,
        metavar="BOOL",
        help="false: run models in the server's process",
    )
    add("--threads", type=int, help="threads of each instance (default: all cores)")


def _flag(text: str) -> bool:
    known: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return known[text.lower()]


def options_from(arguments: argparse.Namespace) -> Options:
    """The options the flags stand for."""
    repositories = (*arguments.repository, *arguments.model_repository)
    missing = [path for path in repositories if not path.is_dir()]
    if missing or not repositories:
        raise ConfigError(f"model repository {missing[0]} is no folder" if missing else "name a model repository")
    return Options(
        repositories, arguments.model_control_mode, tuple(arguments.load_model), arguments.repository_poll_secs,
        arguments.http_address, _port(arguments, "http"), _port(arguments, "grpc"), _port(arguments, "metrics"),
        arguments.server_id, arguments.strict_readiness, arguments.exit_on_error, arguments.exit_timeout_secs,
        arguments.lame_duck_secs, Limits(body=arguments.http_max_input_size), arguments.engine_cache,
        arguments.model_config_name, _cache_bytes(arguments), arguments.process_per_model, arguments.threads,
    )  # fmt: skip


def _cache_bytes(arguments: argparse.Namespace) -> int:
    size = Options.cache_bytes
    for text in arguments.cache_config:
        kind, _, setting = text.partition(",")
        name, _, value = setting.partition("=")
        if kind != "local" or name != "size" or not value.isdigit():
            raise ConfigError(f"--cache-config must be local,size=BYTES, not {text!r}")
        size = int(value)
    return size


def _port(arguments: argparse.Namespace, name: str) -> int | None:
    return getattr(arguments, f"{name}_port") if getattr(arguments, f"allow_{name}") else None


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    level = logging.DEBUG if arguments.log_verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    loop: Any = new_loop()
    try:
        loop.run_until_complete(_serve(options_from(arguments)))
    finally:
        loop.close()
    return 0


async def _serve(options: Options) -> None:
    ended = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, ended.set)
    server = Server(options)
    await server.start()
    await ended.wait()
    log.info("ending: %d requests are being answered", server.service.inflight)
    await server.stop()

"""How a server runs: tritonserver's flags and our own, and the options they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingot.errors import ConfigError
from ingot.server import logs
from ingot.server.access import GROUPS, Access, Tls, read_keys
from ingot.server.placement import Policies, read_policies
from ingot.server.repository import Mode
from ingot.server.wire import Limits

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
    tls: Tls | None = None
    grpc_tls: Tls | None = None
    access: Access = field(default_factory=Access)
    inflight: int = 0
    queue_size: int = 0
    busy_poll: int = 200
    log_format: str = "default"
    log_requests: bool = False
    trace: Mapping[str, str] = field(default_factory=dict)
    grpc_address: str = ""
    metrics_address: str = ""
    host_policies: Policies = field(default_factory=dict)


# -- flags ------------------------------------------------------------------------------------------------------------
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """tritonserver's flags and ours; the repository may also be the only argument."""
    _add_repository(parser.add_argument_group("models"))
    _add_protocols(parser.add_argument_group("protocols"))
    _add_limits(parser.add_argument_group("limits"))
    _add_access(parser.add_argument_group("access"))
    _add_logs(parser.add_argument_group("logs and traces"))
    for name in UNUSED:
        count = 0 if name == "disable-auto-complete-config" else 1
        parser.add_argument(f"--{name}", nargs=count, action=_Unused, dest="unused", default=[], help=argparse.SUPPRESS)


def _add_repository(group: Any) -> None:
    add = group.add_argument
    add("repository", nargs="*", type=Path, help="model repository")
    add(
        "--model-repository", "--model-store", action="append", type=Path, default=[],
        help="model repository; repeatable",
    )  # fmt: skip
    add("--model-control-mode", choices=["none", "poll", "explicit"], default="none")
    add("--load-model", action="append", default=[], help="explicit mode: load at the start; * loads all")
    add("--repository-poll-secs", type=float, default=15.0)
    add("--model-config-name", default="", help="use configs/NAME.pbtxt where a model has it")
    add("--strict-readiness", type=_flag, default=True, metavar="BOOL")
    add("--exit-on-error", type=_flag, default=True, metavar="BOOL")
    add("--engine-cache", type=Path, default=Options.engine_cache, help="where built and copied engines are kept")
    add(
        "--process-per-model", type=_flag, default=True, metavar="BOOL",
        help="false: run models in the server's process",
    )  # fmt: skip
    add("--threads", type=int, help="threads of each instance (default: all cores)")
    add(
        "--host-policy", action="append", default=[], metavar="NAME,cpu-cores=0-3",
        help="cores of the instance groups with this host_policy; or NAME,numa-node=0; repeatable",
    )  # fmt: skip
    add("--cache-config", action="append", default=[], help="local,size=BYTES: response cache (64 MiB; 0: none)")
    add("--response-cache-byte-size", type=int, help="the same, as older servers spell it")


def _add_protocols(group: Any) -> None:
    add = group.add_argument
    add("--http-port", type=int, default=8000)
    add("--http-address", default=LOCAL)
    add("--grpc-port", type=int, default=8001)
    add("--grpc-address", help="default: --http-address")
    add("--metrics-port", type=int, default=8002)
    add("--metrics-address", help="default: --http-address")
    for name in ("http", "grpc", "metrics"):
        add(f"--allow-{name}", type=_flag, default=True, metavar="BOOL")
    add("--server-id", default="ingot")
    add("--exit-timeout-secs", type=float, default=30.0)
    add("--lame-duck-secs", type=float, default=0.0, help="keep serving so long after readiness fell")


def _add_limits(group: Any) -> None:
    add = group.add_argument
    add("--http-max-input-size", type=int, default=64 << 20, help="largest body in bytes, also after decompression")
    add("--max-connections", type=int, default=Limits.connections, help="open HTTP connections; more are closed")
    add("--max-requests-in-flight", type=int, default=0, help="accepted and not yet answered; more get 503 (0: any)")
    add("--max-queue-size", type=int, default=0, help="of each model whose configuration states none (0: any)")
    add(
        "--busy-poll-us", type=int, default=Options.busy_poll,
        help="look for a next gRPC call so long before sleeping, as long as that usually finds one",
    )  # fmt: skip
    add("--stalled-secs", type=float, default=Limits.stalled, help="close a client that stops within a request")
    add("--idle-secs", type=float, default=Limits.idle, help="close a connection that asks nothing")
    add(
        "--grpc-keepalive-time", type=int, default=int(1000 * Limits.ask_after), metavar="MS",
        help="ask a gRPC client that has been silent so long whether it is there",
    )  # fmt: skip
    add(
        "--grpc-keepalive-timeout", type=int, default=int(1000 * Limits.answer_within), metavar="MS",
        help="close its connection if it does not answer within this",
    )  # fmt: skip


def _add_access(group: Any) -> None:
    add = group.add_argument
    add("--tls-cert", type=Path, help="PEM certificate chain: HTTP, gRPC and metrics are encrypted")
    add("--tls-key", type=Path, help="its private key")
    add("--tls-client-ca", type=Path, help="clients must present a certificate of this authority")
    add("--grpc-use-ssl", type=_flag, default=False, metavar="BOOL", help="encrypt gRPC alone")
    add("--grpc-server-cert", type=Path)
    add("--grpc-server-key", type=Path)
    add("--grpc-use-ssl-mutual", type=_flag, default=False, metavar="BOOL")
    add("--grpc-root-cert", type=Path)
    add(
        "--api-key-file", action="append", default=[], metavar="GROUP=FILE",
        help=f"requests of the group ({', '.join(GROUPS)}) need one of the file's keys; repeatable",
    )  # fmt: skip


def _add_logs(group: Any) -> None:
    add = group.add_argument
    add("--log-verbose", type=int, default=0)
    for name in ("info", "warning", "error"):
        add(f"--log-{name}", type=_flag, default=True, metavar="BOOL")
    add("--log-file", type=Path, help="write the log there instead of standard error")
    add("--log-format", choices=logs.FORMATS, default="default")
    add("--log-requests", type=_flag, default=False, metavar="BOOL", help="a line for each request")
    add(
        "--trace-config", action="append", default=[], metavar="SETTING=VALUE",
        help="rate=, count=, level=, mode=opentelemetry|triton, opentelemetry,url=, triton,file=; repeatable",
    )  # fmt: skip


# Flags of tritonserver that say nothing to this server: command lines that have them still work, and are told.
UNUSED = (
    "backend-config", "backend-directory", "buffer-manager-thread-count", "cache-directory",
    "cuda-memory-pool-byte-size", "cuda-virtual-address-size",
    "disable-auto-complete-config", "enable-peer-access", "grpc-http2-max-ping-strikes",
    "grpc-http2-max-pings-without-data", "grpc-http2-min-recv-ping-interval-without-data",
    "grpc-infer-allocation-pool-size", "grpc-infer-response-compression-level", "grpc-infer-thread-count",
    "grpc-keepalive-permit-without-calls", "grpc-max-connection-age",
    "grpc-max-connection-age-grace", "grpc-max-response-pool-size", "http-thread-count",
    "metrics-config", "metrics-interval-ms", "min-supported-compute-capability", "model-load-gpu-limit",
    "model-load-retry-count", "model-load-thread-count", "pinned-memory-pool-byte-size", "repoagent-directory",
    "allow-cpu-metrics", "allow-gpu-metrics", "pool-buffers", "rate-limit", "strict-model-config",
)  # fmt: skip


class _Unused(argparse.Action):
    """Remembers that such a flag was given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.unused = [*namespace.unused, option_string]


def _flag(text: str) -> bool:
    known: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return known[text.lower()]


# -- what they stand for ----------------------------------------------------------------------------------------------
def options_from(arguments: argparse.Namespace) -> Options:
    """The options the flags stand for; ConfigError names what is wrong with them."""
    repositories = (*arguments.repository, *arguments.model_repository)
    missing = [path for path in repositories if not path.is_dir()]
    if missing or not repositories:
        raise ConfigError(f"model repository {missing[0]} is no folder" if missing else "name a model repository")
    tls = _tls(arguments)
    return Options(
        repositories, arguments.model_control_mode, tuple(arguments.load_model), arguments.repository_poll_secs,
        arguments.http_address, _port(arguments, "http"), _port(arguments, "grpc"), _port(arguments, "metrics"),
        arguments.server_id, arguments.strict_readiness, arguments.exit_on_error, arguments.exit_timeout_secs,
        arguments.lame_duck_secs, _limits(arguments), arguments.engine_cache,
        arguments.model_config_name, _cache_bytes(arguments), arguments.process_per_model, arguments.threads,
        tls=tls, grpc_tls=_grpc_tls(arguments) or tls, access=_access(arguments.api_key_file),
        inflight=arguments.max_requests_in_flight, queue_size=arguments.max_queue_size,
        busy_poll=arguments.busy_poll_us,
        log_format=arguments.log_format, log_requests=arguments.log_requests, trace=_trace(arguments.trace_config),
        grpc_address=arguments.grpc_address or "", metrics_address=arguments.metrics_address or "",
        host_policies=read_policies(arguments.host_policy),
    )  # fmt: skip


def _limits(arguments: argparse.Namespace) -> Limits:
    return Limits(
        body=arguments.http_max_input_size, connections=arguments.max_connections, stalled=arguments.stalled_secs,
        idle=arguments.idle_secs, ask_after=arguments.grpc_keepalive_time / 1000,
        answer_within=arguments.grpc_keepalive_timeout / 1000,
    )  # fmt: skip


def _cache_bytes(arguments: argparse.Namespace) -> int:
    older: int | None = arguments.response_cache_byte_size
    size = Options.cache_bytes if older is None else older
    for text in arguments.cache_config:
        kind, _, setting = text.partition(",")
        name, _, value = setting.partition("=")
        if kind != "local" or name != "size" or not value.isdigit():
            raise ConfigError(f"--cache-config must be local,size=BYTES, not {text!r}")
        size = int(value)
    return size


def _port(arguments: argparse.Namespace, name: str) -> int | None:
    return getattr(arguments, f"{name}_port") if getattr(arguments, f"allow_{name}") else None


def _tls(arguments: argparse.Namespace) -> Tls | None:
    if arguments.tls_cert is None and arguments.tls_key is None and arguments.tls_client_ca is None:
        return None
    if arguments.tls_cert is None or arguments.tls_key is None:
        raise ConfigError("TLS takes --tls-cert and --tls-key")
    return Tls(arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca)


def _grpc_tls(arguments: argparse.Namespace) -> Tls | None:
    mutual = arguments.grpc_use_ssl_mutual
    if not arguments.grpc_use_ssl and not mutual:
        return None
    if arguments.grpc_server_cert is None or arguments.grpc_server_key is None:
        raise ConfigError("--grpc-use-ssl takes --grpc-server-cert and --grpc-server-key")
    if mutual and arguments.grpc_root_cert is None:
        raise ConfigError("--grpc-use-ssl-mutual takes --grpc-root-cert")
    return Tls(arguments.grpc_server_cert, arguments.grpc_server_key, arguments.grpc_root_cert if mutual else None)


def _access(files: Sequence[str]) -> Access:
    keys: dict[str, Path] = {}
    for text in files:
        group, _, file = text.partition("=")
        if group not in GROUPS or not file:
            raise ConfigError(f"--api-key-file must be GROUP=FILE with a group of {', '.join(GROUPS)}, not {text!r}")
        keys[group] = Path(file)
    return Access({group: read_keys(file) for group, file in keys.items()})


_TRACE_FLAGS = {
    "rate": "trace_rate", "count": "trace_count", "level": "trace_level", "mode": "trace_mode",
    "opentelemetry,url": "url", "triton,file": "trace_file", "triton,log-frequency": "log_frequency",
    "opentelemetry,resource": "resource",
}  # fmt: skip


def _trace(settings: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in settings:
        name, _, value = text.partition("=")
        if name not in _TRACE_FLAGS or not value:
            raise ConfigError(f"--trace-config knows {', '.join(_TRACE_FLAGS)}, each with a value, not {text!r}")
        found[_TRACE_FLAGS[name]] = value
    return found

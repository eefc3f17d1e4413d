"""`ingot doctor models/`: what would stop `ingot serve` with the same flags here, and what to do about it."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ingot.engine import Engine, Variant
from ingot.errors import ConfigError, IngotError
from ingot.runtime import session
from ingot.runtime.cuda import select
from ingot.runtime.machine import describe
from ingot.server import options as server_options
from ingot.server.config import Config, chosen_versions, files_of
from ingot.server.ensembles import Step, check_steps
from ingot.server.options import Options, options_from
from ingot.server.placement import Place, places_of, targets_of, wants_gpu
from ingot.server.ports import ports_of
from ingot.server.python_model import has_python_backend
from ingot.server.repository import Folder, configuration, read_folder
from ingot.server.request import ServerError
from ingot.server.support import check_support

Verdict = Literal["ok", "warn", "fail"]
_MIB = 1 << 20
_MODULES = ("uvloop", "httptools", "orjson", "zttp", "google.protobuf", "numpy")
_SPARE_FILES = 200  # besides connections: logs, engines, lines to processes


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    verdict: Verdict
    detail: str
    remedy: str = ""


Check = Callable[[Options], Iterable[Finding]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ingot serve`, and --json."""
    server_options.add_arguments(parser)
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 if something would stop the server."""
    found = examine(options_from(arguments))
    failed = any(finding.verdict == "fail" for finding in found)
    if arguments.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        print(as_text(found))
    return int(failed)


def examine(options: Options) -> list[Finding]:
    """Everything that was looked at, in order."""
    return [finding for check in CHECKS for finding in check(options)]


def as_text(found: Iterable[Finding]) -> str:
    """A line each, and below it the remedy where there is something to remedy."""
    lines = []
    for finding in found:
        lines.append(f"{finding.verdict:4}  {finding.what}: {finding.detail}")
        lines += [f"      {finding.remedy}"] if finding.remedy else []
    return "\n".join(lines)


# -- the machine ------------------------------------------------------------------------------------------------------
def _modules(options: Options) -> Iterator[Finding]:
    missing = []
    for name in _MODULES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    if missing:
        yield Finding("packages", "fail", f"missing: {', '.join(missing)}", "pip install 'ingot[server]'")
    else:
        yield Finding("packages", "ok", ", ".join(_MODULES))


def _ports(options: Options) -> Iterator[Finding]:
    asked = (("http", options.http_port), ("grpc", options.grpc_port), ("metrics", options.metrics_port))
    wanted = {name: port for name, port in asked if port}
    for name, port in wanted.items():
        same = [other for other in wanted if other != name and wanted[other] == port]
        yield _port(name, options.address, port, same)


def _port(name: str, address: str, port: int, same: list[str]) -> Finding:
    what, remedy = f"port {port} ({name})", f"end what listens there, or choose another with --{name}-port"
    if same:
        return Finding(what, "fail", f"{same[0]} has the same port", remedy)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return Finding(what, "fail", f"{address} cannot be listened on: {error.strerror}", remedy)
    return Finding(what, "ok", "free")


def _files(options: Options) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = options.limits.connections + _SPARE_FILES
    detail = f"{soft} open files allowed (hard limit {hard}), {options.limits.connections} connections may be open"
    if soft < _SPARE_FILES * 2:
        yield Finding("file limit", "fail", detail, f"ulimit -n {needed}")
    elif soft < needed:
        yield Finding("file limit", "warn", detail, f"ulimit -n {needed}, or --max-connections={soft - _SPARE_FILES}")
    else:
        yield Finding("file limit", "ok", detail)


def _shared_memory(options: Options) -> Iterator[Finding]:
    what = "shared memory"
    try:
        with open(os.memfd_create("ingot-doctor"), "wb") as file:
            file.truncate(_MIB)
    except (OSError, AttributeError) as error:
        yield Finding(
            what, "fail", f"no anonymous shared memory: {error}", "--process-per-model=false, or a newer kernel"
        )
        return
    if not Path("/dev/shm").is_dir():
        yield Finding(what, "warn", "there is no /dev/shm", "clients cannot register system shared memory")
        return
    size = shutil.disk_usage("/dev/shm").total
    remedy = "docker run --shm-size=1g, or clients' regions will not fit" if size < 256 * _MIB else ""
    yield Finding(what, "warn" if remedy else "ok", f"/dev/shm has {size // _MIB} MiB for clients' regions", remedy)


def _cores(options: Options) -> Iterator[Finding]:
    allowed, quota = len(os.sched_getaffinity(0)), _quota()
    detail = f"{describe()}; {allowed} cores" + (f", a quota of {quota:g}" if quota else "")
    threads = options.threads or allowed
    if quota and threads > quota:
        yield Finding("processor", "warn", detail, f"threads would wait for each other: --threads={max(int(quota), 1)}")
    else:
        yield Finding("processor", "ok", detail)


def _quota() -> float:
    """Cores the control group allows; 0: any number."""
    try:
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return 0.0
    return 0.0 if most == "max" else int(most) / int(period)


def memory_bytes() -> int:
    """What is available here, the control group's limit considered."""
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(known["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))


def _user(options: Options) -> Iterator[Finding]:
    if os.geteuid() == 0:
        yield Finding("user", "warn", "root", "nothing here needs root: give the server a user of its own")
    else:
        yield Finding("user", "ok", f"user {os.geteuid()}")


def _access(options: Options) -> Iterator[Finding]:
    for name, tls in (("TLS", options.tls), ("gRPC's TLS", options.grpc_tls)):
        if tls is not None:
            try:
                tls.context()
                yield Finding(name, "ok", str(tls.certificate))
            except ConfigError as error:
                yield Finding(name, "fail", str(error), "give a certificate chain and its key, both PEM")
    if options.address not in ("127.0.0.1", "::1", "localhost"):
        open_groups = [group for group in ("inference", "management") if group not in options.access.keys]
        if open_groups:
            remedy = "--api-key-file GROUP=FILE, or --http-address=127.0.0.1"
            detail = f"whoever reaches {options.address} may use {' and '.join(open_groups)}"
            yield Finding("access", "warn", detail, remedy)


def _engine_cache(options: Options) -> Iterator[Finding]:
    folder = options.engine_cache.expanduser()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    what, free = "engine cache", shutil.disk_usage(nearest).free
    if not os.access(nearest, os.W_OK) or not nearest.is_dir():
        yield Finding(what, "fail", f"{folder} cannot be written", "--engine-cache FOLDER")
    elif free < 512 * _MIB:
        yield Finding(what, "warn", f"{folder}: {free // _MIB} MiB are free", "engines are as large as their models")
    else:
        yield Finding(what, "ok", f"{folder}: {free // _MIB} MiB are free")


# -- the models -------------------------------------------------------------------------------------------------------
def _models(options: Options) -> Iterator[Finding]:
    folders = _folders(options)
    if not folders:
        yield Finding("models", "warn", "the repository is empty", "a model is a folder: NAME/1/model.onnx")
    needed = 0
    for name, folder in folders.items():
        try:
            detail, size = _model(folder, folders, options)
            needed += size
            yield Finding(f"model {name}", "ok", detail)
        except (IngotError, OSError, SyntaxError) as error:
            yield Finding(f"model {name}", "fail", " ".join(str(error).split()), _remedy(options))
    available = memory_bytes()
    detail = f"{available // _MIB} MiB available, the models' files take {needed // _MIB} MiB"
    short = needed + 200 * _MIB * max(len(folders), 1) > available
    yield Finding("memory", "fail" if needed > available else "warn" if short else "ok", detail,
                  "fewer models, fewer instances, or more memory" if short else "")  # fmt: skip


def _remedy(options: Options) -> str:
    return "" if options.exit_on_error else "the server would start without it (--exit-on-error=false)"


def _folders(options: Options) -> Mapping[str, Folder]:
    found: dict[str, Folder] = {}
    for root in options.repositories:
        for path in sorted(root.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                found.setdefault(path.name, read_folder(path, options.config_name))
    return found


def _model(folder: Folder, folders: Mapping[str, Folder], options: Options) -> tuple[str, int]:
    """(what it is, bytes of its files); raises what would fail its load, as far as can be seen without building."""
    config = configuration(folder, None)
    check_support(config)
    if config.platform == "ensemble" or config.HasField("ensemble_scheduling"):
        return _ensemble(config, folder, folders), 0
    versions = chosen_versions(config, folder.versions)
    if not versions:
        raise ConfigError(f"no version is available: {folder.path} needs a folder 1/ with the model in it")
    found = [_file(config, folder.path / str(version)) for version in versions]
    details = [f"version {version}: {detail}" for version, (detail, _) in zip(versions, found, strict=True)]
    return "; ".join(details), sum(size for _, size in found)


def _file(config: Config, folder: Path) -> tuple[str, int]:
    if has_python_backend(config):
        file = folder / (config.default_model_filename or "model.py")
        ast.parse(file.read_text(), str(file))
        return f"{file.name} (Python)", 0
    names = files_of(config)
    file = next((folder / name for name in names if (folder / name).is_file()), folder)
    if file == folder:
        raise ConfigError(f"{folder} holds none of {', '.join(names)}")
    size = file.stat().st_size
    if file.suffix == ".onnx":
        _check_onnx(file)
        if wants_gpu(config):
            select("cuda")
        return f"{file.name}, built when it is first loaded", size + _beside(file)
    engine = Engine.load(file)
    variants = [_variant(engine, place) for place in dict.fromkeys(places_of(_with_groups(config), targets_of(engine)))]
    needs = [f"{v.target}, {', '.join(sorted(v.requires)) or 'any machine'}" for v in variants]
    return f"{file.name} for {'; '.join(needs)}", size


def _with_groups(config: Config) -> Config:
    """The configuration with the instance group that a load would give it."""
    if not config.instance_group:
        config.instance_group.add(kind="KIND_AUTO")
    return config


def _variant(engine: Engine, place: Place) -> Variant:
    """What an instance at a place would run; EngineError or DeviceError where it cannot."""
    if place.device == "cpu":
        return engine.pick(("cpu", "host"), session.features("cpu"), describe())
    device = select(f"cuda:{place.visible}" if place.visible else place.device)
    return engine.pick(("cuda",), device.features, f"with {device}")


def _check_onnx(file: Path) -> None:
    """Read a model as a build would begin to."""
    try:
        from ingot.importers import onnx
    except ImportError as error:
        remedy = "pip install 'ingot[compile]', or build the engine elsewhere"
        raise ConfigError(f"{file.name} would have to be built, which needs {error.name}: {remedy}") from error
    onnx.load(file)


def _beside(file: Path) -> int:
    return sum(path.stat().st_size for path in file.parent.rglob("*") if path.is_file() and path != file)


def _ensemble(config: Config, folder: Folder, folders: Mapping[str, Folder]) -> str:
    steps = tuple(
        Step(item.model_name, max(item.model_version, 0), tuple(item.input_map.items()), tuple(item.output_map.items()))
        for item in config.ensemble_scheduling.step
    )
    missing = [step.model for step in steps if step.model not in folders]
    if missing:
        raise ConfigError(f"the ensemble uses {', '.join(missing)}, which the repository does not hold")
    try:
        check_steps(folder.name, steps, ports_of(config, folder.path))
    except ServerError as error:
        raise ConfigError(str(error)) from error
    return f"ensemble of {', '.join(step.model for step in steps)}"


CHECKS: tuple[Check, ...] = (
    _modules, _ports, _files, _shared_memory, _cores, _user, _access, _engine_cache, _models
)  # fmt: skip

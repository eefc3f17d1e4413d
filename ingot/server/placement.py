"""Where a model's instances run: KIND_CPU, KIND_GPU with its gpus, KIND_AUTO, MIG instances by their name, cores."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ingot.engine import Engine
from ingot.errors import ConfigError, IngotError
from ingot.runtime.cpu import usable_threads
from ingot.runtime.session import features
from ingot.server.config import Config, enum_name
from ingot.server.request import invalid

DEVICE = "device"  # the parameter of a configuration that names devices itself
_GPU = "cuda"
Policies = Mapping[str, tuple[int, ...]]  # cores by a host policy's name
NO_POLICIES: Policies = {}
log = logging.getLogger("ingot.server")


@dataclass(frozen=True)
class Place:
    """A device as a session names it, and what the process that uses it may see of GPUs (empty: everything)."""

    device: str
    visible: str = ""
    cores: tuple[int, ...] = ()  # what its process may run on; empty: all

    @property
    def apart(self) -> bool:
        """Whether it takes a process of its own."""
        return bool(self.visible or self.cores)


def places_of(config: Config, targets: Sequence[str], policies: Policies = NO_POLICIES) -> list[Place]:
    """A place for each instance of a model whose engine has variants for these targets; ServerError if none can be."""
    text = config.parameters[DEVICE].string_value if _names(config) else ""
    named = [_named(config, name) for name in text.split(",")] if text else []
    places: list[Place] = []
    for group in config.instance_group:
        kind, count = enum_name(group, "kind"), max(group.count, 1)
        if named:
            chosen = named
        elif kind == "KIND_GPU" or (kind in ("KIND_AUTO", "KIND_MODEL") and _prefers_gpu(group, targets)):
            chosen = [Place(f"{_GPU}:{number}") for number in group.gpus] or [Place(_GPU)]
        else:
            chosen = [Place("cpu")]
        cores = _cores(config, group.host_policy, policies)
        places += [replace(place, cores=cores) for place in chosen for _ in range(count)]
    for place in places:
        _check(config, place, targets)
    return places or [Place("cpu")]


def wants_gpu(config: Config) -> bool:
    """Whether an ONNX file has to be built for a GPU."""
    if _names(config):
        return config.parameters[DEVICE].string_value.startswith(_GPU)
    return any(enum_name(group, "kind") == "KIND_GPU" for group in config.instance_group)


def _names(config: Config) -> bool:
    return DEVICE in config.parameters


def _named(config: Config, name: str) -> Place:
    """A MIG instance is visible to a process only that starts with its name."""
    kind, _, which = name.strip().partition(":")
    if kind not in ("cpu", _GPU) or (kind == "cpu" and which):
        known = "cpu, cuda, cuda:1, cuda:GPU-… and cuda:MIG-…"
        raise invalid(f"model '{config.name}': the parameter '{DEVICE}' takes {known}, not '{name}'")
    return Place(_GPU, which) if which.startswith("MIG-") else Place(name.strip())


def _prefers_gpu(group: object, targets: Sequence[str]) -> bool:
    """KIND_AUTO: a GPU where the group names one, where the engine is for nothing else, or where there is one."""
    if getattr(group, "gpus", None):
        return True
    return _GPU in targets and ("cpu" not in targets or bool(_here()))


def _here() -> frozenset[str]:
    try:
        return features(_GPU)
    except IngotError:  # no driver, or none of its Python package
        return frozenset()


def _check(config: Config, place: Place, targets: Sequence[str]) -> None:
    wanted = place.device.partition(":")[0]
    if wanted == _GPU and _GPU not in targets:
        raise invalid(
            f"model '{config.name}': its instances are to run on a GPU (KIND_GPU), its engine runs on the CPU; "
            "use KIND_AUTO or KIND_CPU, or build the engine for cuda"
        )
    if wanted == "cpu" and not {"cpu", "host"} & set(targets):
        raise invalid(
            f"model '{config.name}': its instances are to run on the CPU, its engine is for a GPU; use KIND_GPU, "
            "or build it with --variants"
        )


def targets_of(engine: Engine) -> list[str]:
    """What an engine holds variants for."""
    return list(dict.fromkeys(variant.target for variant in engine.variants))


def threads_of(place: Place, places: Sequence[Place]) -> int | None:
    """Instances on the CPU share their cores: threads of several would wait for each other. None: all cores."""
    count = sum(other.device == "cpu" and other.cores == place.cores for other in places)
    return max((len(place.cores) or usable_threads()) // count, 1) if count > 1 else None


# -- cores ------------------------------------------------------------------------------------------------------------
def read_policies(flags: Sequence[str]) -> Policies:
    """What --host-policy says: cores by the policy's name. ConfigError for what is not understood or not here."""
    found: dict[str, tuple[int, ...]] = {}
    for text in flags:
        name, _, setting = text.partition(",")
        kind, _, value = setting.partition("=")
        if not name or kind not in ("cpu-cores", "numa-node"):
            raise ConfigError(f"--host-policy takes NAME,cpu-cores=0-3 or NAME,numa-node=0, not {text!r}")
        cores = _listed(value if kind == "cpu-cores" else _cores_of_node(value), text)
        missing = sorted(set(cores) - available_cores())
        if missing:
            here = ", ".join(map(str, sorted(available_cores())))
            raise ConfigError(f"--host-policy {text}: core {missing[0]} is none of this process's ({here})")
        found[name] = cores
    return found


def available_cores() -> set[int]:
    """Cores that this process may use."""
    return os.sched_getaffinity(0)


def _cores_of_node(number: str) -> str:
    try:
        return Path(f"/sys/devices/system/node/node{int(number)}/cpulist").read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--host-policy: there is no NUMA node {number!r}") from error


def _listed(text: str, flag: str) -> tuple[int, ...]:
    """0-3,8 as numbers."""
    cores: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
            raise ConfigError(f"--host-policy {flag}: {part!r} is no core and no range of cores")
        cores |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(cores))


def _cores(config: Config, policy: str, policies: Policies) -> tuple[int, ...]:
    if policy and policy not in policies:
        problem = f"there is no --host-policy={policy},cpu-cores=0-3 or the like: any core may run it"
        log.warning("model %s: no host policy '%s'; %s", config.name, policy, problem)
    return policies.get(policy, ())

"""Model folders: what is there, what is loaded, and the safe way from one to the other.

A load makes every wanted version ready first and then replaces the old ones in one step; if anything fails, what served
before goes on serving. Replaced versions answer what they accepted before they end.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from ingot.errors import IngotError
from ingot.server.config import Config, ModelConfig, check_name, chosen_versions, read_config
from ingot.server.model import Servable
from ingot.server.overrides import written
from ingot.server.request import Code, ServerError, invalid

log = logging.getLogger("ingot.server")
Mode = Literal["none", "poll", "explicit"]
Loader = Callable[[Config, int, Path], Servable]  # (configuration, version, folder of the model) -> ready to serve
_VERSION = re.compile(r"[1-9][0-9]*")


@dataclass(frozen=True)
class Folder:
    """A model's folder as found: where, its configuration's text, its versions, a fingerprint that changes with it."""

    name: str
    path: Path
    config_text: str
    versions: tuple[int, ...]
    fingerprint: str


@dataclass(frozen=True)
class State:
    """One line of the index."""

    name: str
    version: str
    state: str
    reason: str = ""


@dataclass
class _Slot:
    """What is known of one model name; `serving` is replaced whole, never changed."""

    serving: Mapping[int, Servable] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
    fingerprint: str = ""
    changing: threading.Lock = field(default_factory=threading.Lock)
    given: Path | None = None  # a folder that a load request carried

    def forget_given(self) -> None:
        """Remove that folder, once nothing serves from it."""
        if self.given is not None:
            shutil.rmtree(self.given, ignore_errors=True)
            self.given = None


class Repository:
    """The models of some folders. Thread-safe; `find` takes no lock."""

    def __init__(self, roots: tuple[Path, ...], mode: Mode, load_version: Loader, config_name: str = "") -> None:
        self.roots, self.mode, self._load_version, self._config_name = roots, mode, load_version, config_name
        self._slots: dict[str, _Slot] = {}
        self._lock = threading.Lock()
        self._closed = False

    # -- looking up ---------------------------------------------------------------------------------------------------
    def find(self, name: str, version: int = 0) -> Servable:
        """The version asked for, or the latest one; NOT_FOUND says what is missing."""
        slot = self._slots.get(name)
        serving = slot.serving if slot else {}
        if version in serving:
            return serving[version]
        if serving and not version:
            return serving[max(serving)]
        if slot is None:
            raise ServerError(Code.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        if version:
            raise ServerError(Code.NOT_FOUND, f"Request for unknown model: '{name}' version {version} is not found")
        raise ServerError(Code.NOT_FOUND, f"Request for unknown model: '{name}' has no available versions")

    def serving(self) -> list[Servable]:
        """Every loaded version, by name and version."""
        slots = sorted(self._slots.copy().items())
        return [slot.serving[version] for _, slot in slots for version in sorted(slot.serving)]

    def versions(self, name: str) -> list[int]:
        """Loaded versions of a model."""
        return sorted(self._slots[name].serving) if name in self._slots else []

    def index(self) -> list[State]:
        """Every model that is or was here, loaded or not."""
        names = {folder.name for folder in self.scan().values()} | self._slots.keys()
        states: list[State] = []
        for name in sorted(names):
            slot = self._slots.get(name)
            known = [slot.states[version] for version in sorted(slot.states)] if slot else []
            states += known or [State(name, "", "")]
        return states

    def ready(self) -> bool:
        """Whether every model that was to be loaded is."""
        return not any(
            state.state == "UNAVAILABLE" and state.reason != "unloaded"
            for slot in self._slots.copy().values() if not slot.serving
            for state in slot.states.values()
        )  # fmt: skip

    # -- folders ------------------------------------------------------------------------------------------------------
    def scan(self) -> dict[str, Folder]:
        """The folders there are now; the first root that has a name wins."""
        found: dict[str, Folder] = {}
        for root in self.roots:
            for path in sorted(root.iterdir()) if root.is_dir() else ():
                if path.is_dir() and not path.name.startswith(".") and path.name not in found:
                    found[path.name] = read_folder(path, self._config_name)
        return found

    def folder(self, name: str) -> Folder:
        """One model's folder; a name is a single path component."""
        check_model_name(name)
        for root in self.roots:
            if (root / name).is_dir():
                return read_folder(root / name, self._config_name)
        raise ServerError(Code.NOT_FOUND, f"failed to load '{name}', failed to poll from model repository")

    # -- changing -----------------------------------------------------------------------------------------------------
    def load(
        self, name: str, override: Config | None = None, folder: Folder | None = None, given: Path | None = None
    ) -> None:
        """Load or reload a model; on failure the old versions go on serving and ServerError says why.

        `given`: a temporary folder, removed when the model is replaced or unloaded.
        """
        folder = folder or self.folder(name)
        slot = self._slot(name)
        with slot.changing:
            if self._closed:
                raise ServerError(Code.UNAVAILABLE, f"load failed for model '{name}': the server is shutting down")
            try:
                fresh = self._load_all(slot, folder, override)
            except IngotError as error:
                slot.fingerprint = folder.fingerprint
                if not slot.serving and not any(state.reason == str(error) for state in slot.states.values()):
                    slot.states[0] = State(name, "", "UNAVAILABLE", str(error))
                code = error.code if isinstance(error, ServerError) else Code.INVALID_ARG
                raise ServerError(code, f"load failed for model '{name}': {error}") from error
            with self._lock:
                old: Mapping[int, Servable] = fresh
                if not self._closed:
                    old, slot.serving, slot.fingerprint = slot.serving, fresh, folder.fingerprint
                    self._mark(slot, name, fresh, old)
            for servable in old.values():
                servable.close()
            slot.forget_given()
            slot.given = given

    def load_given(self, name: str, override: Config, files: Mapping[PurePosixPath, bytes]) -> None:
        """Load a model whose folder a request carries; it is kept until the model is replaced or unloaded."""
        check_model_name(name)
        folder = written(files)
        try:
            self.load(name, override, replace(read_folder(folder), name=name), given=folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def unload(self, name: str) -> None:
        """Stop serving a model, after what it accepted; one that is not loaded is no error, as with Triton."""
        slot = self._slots.get(name)
        if slot is None:
            self.folder(name)
            return
        with slot.changing:
            with self._lock:
                old, slot.serving, slot.fingerprint = slot.serving, {}, ""
                self._mark(slot, name, {}, old)
            for servable in old.values():
                servable.close()
            slot.forget_given()
        if old:
            log.info("model %s: unloaded", name)

    def poll(self) -> list[ServerError]:
        """Load what is new or changed, unload what is gone; what fails stays as it was and is returned."""
        found, failures = self.scan(), []
        for name in [name for name, slot in self._slots.copy().items() if name not in found and slot.serving]:
            self.unload(name)
        for name in in_dependency_order(found):
            if self._slot(name).fingerprint != found[name].fingerprint:
                try:
                    self.load(name, folder=found[name])
                except ServerError as error:
                    log.error("%s", error)
                    failures.append(error)
        return failures

    def close(self) -> None:
        """Unload everything: what may use other models before them, then what is being loaded just now."""
        with self._lock:
            self._closed = True
        order = sorted(self.serving(), key=lambda servable: _distance_from_clients(servable.config))
        for name in dict.fromkeys([*(servable.config.name for servable in order), *self._slots.copy()]):
            self.unload(name)

    def _slot(self, name: str) -> _Slot:
        with self._lock:
            return self._slots.setdefault(name, _Slot())

    def _load_all(self, slot: _Slot, folder: Folder, override: Config | None) -> dict[int, Servable]:
        config = configuration(folder, override)
        ensemble = config.platform == "ensemble" or config.HasField("ensemble_scheduling")
        wanted = chosen_versions(config, folder.versions or ((1,) if ensemble else ()))
        if not wanted:
            raise invalid(f"no version of '{folder.name}' is available at {folder.path.name}/: its folder needs 1/")
        ready: dict[int, Servable] = {}
        for version in wanted:
            try:
                ready[version] = self._load_version(config, version, folder.path)
            except IngotError as error:
                if version not in slot.serving:
                    slot.states[version] = State(folder.name, str(version), "UNAVAILABLE", str(error))
                for servable in ready.values():
                    servable.close()
                raise
        return ready

    @staticmethod
    def _mark(slot: _Slot, name: str, fresh: Mapping[int, Servable], old: Mapping[int, Servable]) -> None:
        slot.states.pop(0, None)
        for version in old:
            slot.states[version] = State(name, str(version), "UNAVAILABLE", "unloaded")
        for version in fresh:
            slot.states[version] = State(name, str(version), "READY")


def check_model_name(name: str) -> None:
    """A name is a single path component."""
    if not name or "/" in name or "\\" in name or "\0" in name or name.startswith("."):
        raise invalid(f"failed to load '{name}', it is no model name")


def configuration(folder: Folder, override: Config | None) -> Config:
    """The configuration of a folder, or the one a load request carries instead."""
    config = ModelConfig()
    config.CopyFrom(
        override if override is not None else read_config(folder.config_text, f"{folder.name}/config.pbtxt")
    )
    check_name(config, folder.name)
    return config


def read_folder(path: Path, config_name: str = "") -> Folder:
    """What a model's folder holds; folders that are no version (names, 007, files) are passed over."""
    versions = tuple(
        sorted(int(item.name) for item in path.iterdir() if item.is_dir() and _VERSION.fullmatch(item.name))
    )
    custom = path / "configs" / f"{config_name}.pbtxt"
    file = custom if config_name and custom.is_file() else path / "config.pbtxt"
    text = file.read_text() if file.is_file() else ""
    return Folder(path.name, path, text, versions, _fingerprint(path, text))


def _fingerprint(path: Path, config_text: str) -> str:
    digest = hashlib.sha256(config_text.encode())
    for file in sorted(path.rglob("*")):
        status = file.stat()
        digest.update(f"{file.relative_to(path)} {status.st_size if file.is_file() else 0} ".encode())
        digest.update(f"{status.st_mtime_ns if file.is_file() else 0}\n".encode())
    return digest.hexdigest()


def _distance_from_clients(config: Config) -> int:
    """Ensembles use any model, a model.py may call others, an engine uses none."""
    return 0 if config.HasField("ensemble_scheduling") else 1 if config.backend == "python" else 2


def in_dependency_order(folders: Mapping[str, Folder]) -> list[str]:
    """Names with an ensemble behind the models it uses; a folder whose configuration is malformed keeps its place."""
    uses = {name: _uses(folder) & folders.keys() for name, folder in folders.items()}
    order: dict[str, None] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        for other in sorted(uses[name]) if name not in path else ():
            visit(other, (*path, name))
        order.setdefault(name)

    for name in folders:
        visit(name, ())
    return list(order)


def _uses(folder: Folder) -> set[str]:
    try:
        config = read_config(folder.config_text, folder.name)
    except ServerError:  # reported when it is loaded
        return set()
    return {step.model_name for step in config.ensemble_scheduling.step}

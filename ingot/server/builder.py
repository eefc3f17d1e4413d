"""ONNX files of a repository become engines in the server's cache: `ingot build` as a child, once per content.

Engines are copied into the cache too: a file that is overwritten in place would change under its map.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingot import __version__
from ingot.engine import Engine
from ingot.errors import EngineError, IngotError
from ingot.runtime.machine import cpu_features
from ingot.runtime.session import features
from ingot.server.config import Config, files_of
from ingot.server.placement import wants_gpu
from ingot.server.request import Code, ServerError, invalid

log = logging.getLogger("ingot.server")


@dataclass(frozen=True)
class Builder:
    """Where engines are kept and what `ingot build` is told."""

    cache: Path
    arguments: tuple[str, ...] = ("--level", "1")

    def engine(self, config: Config, folder: Path) -> Engine:
        """The engine of a version's folder: mapped from the cache, built if its ONNX file was not seen before."""
        file = _model_file(config, folder)
        try:
            if file.suffix == ".onnx":
                return self._built(config, file)
            return Engine.load(self._copied(file))
        except IngotError as error:
            if isinstance(error, ServerError):
                raise
            raise invalid(f"model '{config.name}': {error}") from error

    def digests(self, config: Config, folder: Path, engine: Engine) -> dict[str, str]:
        """SHA-256 of the repository's file and of the engine that serves it."""
        return {"file_sha256": sha256(_model_file(config, folder)), "engine_sha256": sha256(Path(engine.source))}

    def _copied(self, file: Path) -> Path:
        target = self.cache / f"{digest_of([file])}.engine"
        if not target.exists():
            self._install(target, lambda temporary: shutil.copyfile(file, temporary))
        return target

    def _built(self, config: Config, file: Path) -> Engine:
        arguments = [*self.arguments, *_wanted(config)]
        machine = ",".join(sorted(features("cuda") if wants_gpu(config) else cpu_features()))
        beside = sorted(path for path in file.parent.rglob("*") if path.is_file())
        target = self.cache / f"{digest_of(beside, __version__, machine, *arguments)}.engine"
        if target.exists():
            try:
                return Engine.load(target)
            except EngineError as error:
                log.warning("model %s: the engine in the cache is built again: %s", config.name, error)
        self._install(target, lambda temporary: self._run(config.name, file, temporary, arguments))
        return Engine.load(target)

    @staticmethod
    def _run(name: str, file: Path, output: Path, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "ingot", "build", str(file), "-o", str(output), "--quiet", *arguments]
        log.info("model %s: building %s", name, file)
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        for line in finished.stdout.splitlines():
            log.info("model %s: %s", name, line)
        if finished.returncode:
            reason = finished.stderr.strip().removeprefix("ingot: error: ")
            raise ServerError(Code.INVALID_ARG, f"model '{name}': {file.name} cannot be built: {reason}")

    def _install(self, target: Path, write: Any) -> None:
        """Write beside, then rename: another server may share the cache."""
        self.cache.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.cache, suffix=".part")
        os.close(handle)
        try:
            write(Path(name))
            os.replace(name, target)
        finally:
            Path(name).unlink(missing_ok=True)


def _model_file(config: Config, folder: Path) -> Path:
    names = files_of(config)
    for name in names:
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:  # links are the repository owner's own business
            raise invalid(f"model '{config.name}': default_model_filename '{name}' leads out of the version's folder")
        if file.is_file():
            return file
    raise invalid(f"model '{config.name}': {folder.name}/ holds none of {', '.join(names)}")


def sha256(file: Path) -> str:
    """A file's digest as other tools print it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(files: Sequence[Path], *words: str) -> str:
    """SHA-256 over the files' contents and some words."""
    digest = hashlib.sha256("\0".join(words).encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _wanted(config: Config) -> list[str]:
    """What a configuration asks of a build."""
    shapes = _shapes(config)
    return [*(["--shapes", shapes] if shapes else []), *(["--target", "cuda"] if wants_gpu(config) else [])]


def _shapes(config: Config) -> str:
    """--shapes for a configuration that states every extent; empty leaves dimensions free."""
    stated = {item.name: list(item.reshape.shape if item.HasField("reshape") else item.dims) for item in config.input}
    stated |= {state.input_name: list(state.dims) for state in config.sequence_batching.state}
    if not config.input or any(-1 in dims for dims in stated.values()):
        return ""
    batch = [f"1..{config.max_batch_size}"] if config.max_batch_size else []
    shapes = {name: "x".join([*batch, *map(str, dims)]) for name, dims in stated.items()}
    return ",".join(f"{name}:{shape}" for name, shape in shapes.items() if shape)

"""Python files that users name: samples, metrics, plugins."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from ingot.errors import ConfigError


def module_of(path: Path, said: str) -> ModuleType:
    """The file as a module; ConfigError calls it `said`."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ConfigError(f"{said} is not a Python file that exists")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{said} cannot be loaded: {type(error).__name__}: {error}") from error
    return module

"""Files that a load request carries instead of the repository's: `file:1/model.onnx` and its content."""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ingot.server.request import invalid

_PREFIX = "file:"
_MOST_FILES, _LONGEST = 1000, 255


def given_files(name: str, parameters: Mapping[str, Any]) -> dict[PurePosixPath, bytes]:
    """Contents by path below the model's folder; over HTTP they are base64. ServerError for stray parameters."""
    files: dict[PurePosixPath, bytes] = {}
    for key, value in parameters.items():
        if key.startswith(_PREFIX):
            files[_path(name, key)] = _content(name, key, value)
        elif key != "config":
            problem = f"parameter '{key}' is not supported; 'config' and 'file:PATH' are"
            raise invalid(f"failed to load '{name}', {problem}")
    if len(files) > _MOST_FILES:
        raise invalid(f"failed to load '{name}', it carries {len(files)} files; {_MOST_FILES} are allowed")
    return files


def _path(name: str, key: str) -> PurePosixPath:
    path = PurePosixPath(key.removeprefix(_PREFIX))
    bad = path.is_absolute() or ".." in path.parts or not path.parts or "\0" in key or "\\" in key
    if bad or any(len(part) > _LONGEST for part in path.parts):
        raise invalid(f"failed to load '{name}', '{key}' leads out of the model's folder or is no path")
    return path


def _content(name: str, key: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise invalid(f"failed to load '{name}', the content of '{key}' is not base64: {error}") from error


def written(files: Mapping[PurePosixPath, bytes]) -> Path:
    """A new folder with these files."""
    folder = Path(tempfile.mkdtemp(prefix="ingot-model-"))
    for path, content in files.items():
        target = folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        except OSError as error:  # a path that is both a file and a folder
            raise invalid(f"the file '{path}' cannot be written: {error.strerror}") from error
    return folder

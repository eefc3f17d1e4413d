"""Files that tools read as arrays, and files that they write: whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import ConfigError, InputError


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replace the file at `path`; what was there before stays if that fails. ConfigError names the file and the
    reason."""
    target = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    try:
        if target.exists() and not target.is_file():  # /dev/stdout, a pipe: nothing to put in its place
            target.write_bytes(data)
        else:
            _replace(target, data)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _replace(target: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def json_text(content: Any) -> str:
    """Data as JSON that every reader takes: what is infinite or not a number is null."""
    return json.dumps(_finite(content), indent=1, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def load_array(path: Path, dtype: str, shape: tuple[int, ...]) -> Any:
    """A .npy file's array, or any other file's bytes as dtype and shape."""
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        return np.fromfile(path, numpy_dtype(dtype)).reshape(shape)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"cannot take {path} as {dtype}{list(shape)}: {error}") from None

"""Inputs for a tool's run: from files where given, drawn where not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ingot.errors import ConfigError, InputError
from ingot.evidence import draw
from ingot.plan.extent import evaluate, symbols_of
from ingot.plan.plan import TensorSpec


def make_feeds(
    specs: Sequence[TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    files: Mapping[str, str] | None = None,
    seed: int = 0,
    limits: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """An array per input: loaded, or drawn in the given shape (else the profile's typical one, else symbols count
    1)."""
    names = {spec.name for spec in specs}
    stray = [name for name in (*shapes, *(files or {})) if name not in names]
    if stray:
        raise ConfigError(f"there is no input {stray[0]!r}; the model has {', '.join(sorted(names))}")
    rng = np.random.default_rng(seed)
    feeds: dict[str, Any] = {}
    for spec in specs:
        if files and spec.name in files:
            feeds[spec.name] = load_array(Path(files[spec.name]), spec.dtype)
            continue
        ones = {s: 1 for d in spec.shape for s in symbols_of(d)}
        shape = shapes.get(spec.name) or spec.opt or tuple(evaluate(d, ones) for d in spec.shape)
        feeds[spec.name] = draw(rng, spec.dtype, shape, (limits or {}).get(spec.name, 2))
    return feeds


def load_array(path: Path, dtype: str) -> Any:
    """A .npy file's array."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} as .npy: {error}") from None
    return array if dtype == "object" else np.asarray(array)


def pairs(text: str) -> dict[str, str]:
    """`x:file,y:file` as a mapping."""
    found = {}
    for part in filter(None, text.split(",")):
        name, colon, path = part.partition(":")
        if not colon:
            raise ConfigError(f"{part!r} should read name:file")
        found[name.strip("'\"")] = path
    return found

"""Inputs for a tool's run: from files where given, drawn where not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ingot.dtypes import HOST_ONLY, numpy_dtype
from ingot.errors import ConfigError, InputError
from ingot.evidence import draw_input
from ingot.plan.extent import evaluate, symbols_of
from ingot.plan.plan import TensorSpec
from ingot.tools.files import load_array

Shape = tuple[int, ...]


def make_feeds(
    specs: Sequence[TensorSpec],
    shapes: Mapping[str, Shape],
    files: Mapping[str, str] | None = None,
    seed: int = 0,
    limits: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """An array per input: loaded, or drawn in the given shape (else the profile's typical one, else symbols count
    1). ConfigError for a name, InputError for a dtype or shape that the model does not have."""
    names = {spec.name for spec in specs}
    stray = [name for name in (*shapes, *(files or {})) if name not in names]
    if stray:
        raise ConfigError(f"there is no input {stray[0]!r}; the model has {', '.join(sorted(names))}")
    rng = np.random.default_rng(seed)
    feeds: dict[str, Any] = {}
    for spec in specs:
        shape = shapes.get(spec.name) or default_shape(spec)
        _check_shape(spec, shape)
        if files and spec.name in files:
            feeds[spec.name] = _loaded(spec, files[spec.name], shape)
        else:
            feeds[spec.name] = draw_input(rng, spec, shape, (limits or {}).get(spec.name, 2))
    return feeds


def default_shape(spec: TensorSpec) -> Shape:
    """The profile's typical shape; without a profile symbols count 1."""
    return spec.opt or tuple(evaluate(d, dict.fromkeys(symbols_of(d), 1)) for d in spec.shape)


def _loaded(spec: TensorSpec, file: str, shape: Shape) -> Any:
    array = load_array(Path(file), spec.dtype, shape)
    if spec.dtype not in HOST_ONLY and array.dtype != numpy_dtype(spec.dtype):
        raise InputError(f"{file} holds {array.dtype}, input {spec.name!r} takes {spec.dtype}")
    _check_shape(spec, array.shape)
    return array


def _check_shape(spec: TensorSpec, shape: Shape) -> None:
    fits = len(shape) == len(spec.shape) and all(
        isinstance(wanted, str) or wanted == given for wanted, given in zip(spec.shape, shape, strict=True)
    )
    if not fits and spec.dtype != "object":
        raise InputError(f"input {spec.name!r} was given shape {list(shape)}, the model takes {list(spec.shape)}")


def pairs(text: str) -> dict[str, str]:
    """`x:file,y:file` as a mapping."""
    found = {}
    for part in filter(None, text.split(",")):
        name, colon, path = part.partition(":")
        if not colon:
            raise ConfigError(f"{part!r} should read name:file")
        found[name.strip("'\"")] = path
    return found

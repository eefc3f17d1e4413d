"""Libraries that compute a step in the place of its generated kernels, where they are there and take the recipe."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ingot.errors import LibraryUnusable
from ingot.plan.plan import LibraryCall
from ingot.runtime import cuda

Ready = Callable[[Sequence[int], Any], None]  # (addresses, stream)
# By name: the module here that knows it, and the package it comes with.
MODULES: Mapping[str, tuple[str, str]] = {"cublaslt": ("ingot.runtime.cublaslt", "nvmath")}


def installed(names: Sequence[str]) -> tuple[str, ...]:
    """Those libraries whose packages are here."""
    return tuple(name for name in names if importlib.util.find_spec(MODULES[name][1]) is not None)


def prepare(context: cuda.Context, call: LibraryCall, symbols: Mapping[str, int]) -> Ready | None:
    """What puts the call on a stream; None, with a warning, where the step's own kernels must do."""
    try:
        module = importlib.import_module(MODULES[call.library][0])
        ready: Ready = module.prepare(context, call.recipe, symbols)
        return ready
    except LibraryUnusable as error:
        warnings.warn(f"the engine's {call.library} tactics are not used, generated kernels are: {error}", stacklevel=2)
        return None

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
from ingot.runtime.buffers import Array

Ready = Callable[[Sequence[int], Any], None]  # (addresses, stream)
Replacement = tuple[LibraryCall, Ready]
# By name: the module here that knows it, and the package it comes with.
MODULES: Mapping[str, tuple[str, str]] = {
    "cublaslt": ("ingot.runtime.cublaslt", "nvmath"),
    "cudnn": ("ingot.runtime.cudnn", "cudnn"),
}


def installed(names: Sequence[str]) -> tuple[str, ...]:
    """Those libraries whose packages are here."""
    return tuple(name for name in names if importlib.util.find_spec(MODULES[name][1]) is not None)


def prepare(context: cuda.Context, call: LibraryCall, symbols: Mapping[str, int], code: bytes = b"") -> Ready | None:
    """What puts the call on a stream, `code` being its plan; None, with a warning, where the step's own kernels must
    do."""
    try:
        module = importlib.import_module(MODULES[call.library][0])
        ready: Ready = module.prepare(context, call.recipe, symbols, code)
        return ready
    except LibraryUnusable as error:
        warnings.warn(f"the engine's {call.library} tactics are not used, generated kernels are: {error}", stacklevel=2)
        return None


def replacements(
    context: cuda.Context, kernels: cuda.Kernels, calls: Sequence[LibraryCall], symbols: Mapping[str, int]
) -> dict[int, Replacement]:
    """By step: the calls that can be made here."""
    made = [(call, prepare(context, call, symbols, kernels.code(call.entry))) for call in calls]
    return {call.step: (call, ready) for call, ready in made if ready is not None}


def put(made: Replacement, addresses: Array, stream: Any) -> None:
    """Put a call on the stream; `addresses` are those of the plan's storages."""
    call, ready = made
    ready([int(addresses[storage]) for storage in call.pointers], stream)

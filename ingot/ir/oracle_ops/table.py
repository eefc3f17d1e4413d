"""The table of operator meanings Ingot defines itself: `@meaning("Conv", since=1)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Value = np.ndarray | list[Any] | None
"""A tensor, a sequence, or an absent optional."""

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Meaning:
    """A numpy function for an operator from one opset on; attributes arrive as keywords."""

    since: int
    function: Callable[..., Any]
    wants: frozenset[str]


_MEANINGS: dict[tuple[str, str], list[Meaning]] = {}
_CONTEXT = frozenset({"outputs", "opset"})


def meaning(*op_types: str, since: int = 1, domain: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register `function(*inputs, **attributes)`: one result, or a tuple of several.

    A keyword `outputs` receives which outputs the node names (a tuple of bools), `opset` the domain's version.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        wants = _CONTEXT & inspect.signature(function).parameters.keys()
        for op_type in op_types:
            versions = _MEANINGS.setdefault((domain, op_type), [])
            versions.append(Meaning(since, function, wants))
            versions.sort(key=lambda entry: -entry.since)
        return function

    return register


def find(domain: str, op_type: str, version: int) -> Meaning | None:
    """The newest meaning that is not newer than `version`."""
    return next((entry for entry in _MEANINGS.get((domain, op_type), ()) if entry.since <= version), None)

"""Ingot compiles trained models into verified inference engines and runs them. Public names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingot.build import build
    from ingot.config import BuildConfig, Profile
    from ingot.engine import Engine
    from ingot.errors import IngotError
    from ingot.llm.api import LLM
    from ingot.plan.plan import TensorSpec
    from ingot.plugins import plugin
    from ingot.runtime.profiler import StepTime
    from ingot.runtime.session import Session

__version__ = "0.1.0"

_HOMES = {
    "build": "ingot.build",
    "BuildConfig": "ingot.config",
    "Profile": "ingot.config",
    "Engine": "ingot.engine",
    "IngotError": "ingot.errors",
    "LLM": "ingot.llm.api",
    "TensorSpec": "ingot.plan.plan",
    "plugin": "ingot.plugins",
    "StepTime": "ingot.runtime.profiler",
    "Session": "ingot.runtime.session",
}

__all__ = [
    "LLM", "BuildConfig", "Engine", "IngotError", "Profile", "Session", "StepTime", "TensorSpec", "build", "plugin",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ingot' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

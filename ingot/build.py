"""`build(model, config)`: the one readable function from a model to a verified engine."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from ingot import compiler, evidence, report
from ingot.config import BuildConfig
from ingot.engine import Engine

Progress = Callable[[str, float], None]


def build(model: Any, config: BuildConfig | None = None, progress: Progress | None = None, **options: Any) -> Engine:
    """Compile a model into an engine.

    model: a path, bytes, an onnx.ModelProto, an onnx_ir.Model, or (torch module, example inputs). options are
    BuildConfig's
    fields, for short. `progress(stage, share done)` is called as the build goes. Raises ImportFailure, BuildError,
    VerificationFailed, ConfigError; each names the user's node and the remedy.
    """
    config = config or BuildConfig(**options)
    log = report.BuildLog(progress)
    source = compiler.import_model(model, config, log)
    optimised = compiler.optimise(source, config, log)

    def attempt(banned: frozenset[str]) -> tuple[Engine, list[compiler.Compiled]]:
        compiled = compiler.compile_variants(source, optimised, config, log, banned)
        return compiler.package(source, compiled, config, log), compiled

    return evidence.first_correct(attempt, source, config, log) if config.verify else attempt(frozenset())[0]


class _CallableModule(types.ModuleType):
    """Keeps `ingot.build(…)` a call: importing this module puts it in the place of the function of the same name."""

    __call__ = staticmethod(build)


sys.modules[__name__].__class__ = _CallableModule

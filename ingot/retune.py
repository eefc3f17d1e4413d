"""An engine that was built where its machine was not, timed anew where it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ingot import compiler
from ingot.build import Progress, build
from ingot.config import BuildConfig, Profile
from ingot.engine import Engine, Variant
from ingot.errors import ConfigError
from ingot.report import BuildLog
from ingot.runtime.session import features

_LEVEL = 3  # of an engine that was built without timing


def retune(engine: Engine, model: Any, timing_cache: str | Path | None = None,
           progress: Progress | None = None) -> Engine:  # fmt: skip
    """The engine with what this machine can run of it timed and verified here; its other variants stay as they are.

    `model` is what the engine was built from: an engine keeps packed weights, not the graph that tactics are chosen
    for. ConfigError when it is another model, or when this machine can run no variant of the engine.
    """
    config = replace(config_of(engine.details["config"]), timing_cache=timing_cache)
    old = _runnable(engine)
    _check_model(engine, model)
    again = build(model, replace(config, level=config.level or _LEVEL, **_only(old)), progress)
    (made,) = again.variants
    variants = tuple(made if variant is old else variant for variant in engine.variants)
    details = {**again.details, "config": engine.details["config"], "retuned": f"{old.target} {old.isa}"}
    return Engine(engine.inputs, engine.outputs, variants, details)


def config_of(described: Mapping[str, Any]) -> BuildConfig:
    """The configuration that an engine's details describe."""
    known = {f.name for f in fields(BuildConfig)} & described.keys()
    given: dict[str, Any] = {k: tuple(v) if isinstance(v := described[k], list) else v for k in known}
    given["profiles"] = tuple(Profile(**shapes) for shapes in described["profiles"])
    return BuildConfig(**given)


def _runnable(engine: Engine) -> Variant:
    for variant in engine.verified().variants:
        if variant.target != "host" and frozenset(variant.requires) <= features(variant.target):
            return variant
    held = ", ".join(f"{v.target} {v.isa}".strip() for v in engine.variants)
    raise ConfigError(f"{engine.source} cannot be tuned here: it holds {held}, and this machine runs none of them")


def _check_model(engine: Engine, model: Any) -> None:
    found = compiler.digest(compiler.import_model(model, BuildConfig(target="host"), BuildLog()))
    if found != engine.details["model"]["digest"]:
        raise ConfigError(f"{engine.source} was built from another model; give the one it was built from (of an engine "
                          "with narrow layers, what --save-model wrote)")  # fmt: skip


def _only(variant: Variant) -> dict[str, Any]:
    """The options of a build of nothing but this variant."""
    if variant.target == "cuda":
        return {"target": f"cuda:{variant.isa}", "variants": ()}
    return {"target": variant.target, "variants": (variant.isa,)}

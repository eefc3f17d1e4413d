"""Angles of rotary positions as tables: cosine and sine [context, half] per kind of layer, with the usual scalings.

Computed once at build in float64, so that nothing at run time knows of scalings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ingot.errors import ImportFailure

Array = np.ndarray[Any, Any]
Settings = Mapping[str, Any]
Rates = tuple[Array, float]
"""(angle per position of each pair, factor of cosine and sine)"""


def settings_of(config: Settings, kind: str | None = None, default_theta: float = 10000.0) -> dict[str, Any]:
    """The rope settings of a config, in the old form (rope_theta, rope_scaling) or the new one (rope_parameters);
    `kind`: of which kind of layer, where they differ."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ImportFailure(f"config.json: rope settings are {given!r}, not an object")
    found = dict(given)
    if kind is not None and isinstance(found.get(kind), Mapping):
        found = dict(found[kind])
    found["rope_type"] = found.get("rope_type", found.get("type", "default"))
    found["rope_theta"] = found.get("rope_theta", config.get("rope_theta", default_theta))
    found.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    found.setdefault("max_position_embeddings", config.get("max_position_embeddings"))
    return found


def tables(settings: Settings, depth: int, context: int) -> tuple[Array, Array]:
    """(cosine, sine) [context, half] for the first 2 * half of `depth` elements of a head."""
    try:
        return _tables(settings, depth, context)
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise ImportFailure(f"config.json: rope settings {dict(settings)} make no sense ({_said(error)})") from None


def _said(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _tables(settings: Settings, depth: int, context: int) -> tuple[Array, Array]:
    kind = str(settings["rope_type"])
    if kind not in _KINDS:
        raise ImportFailure(f"config.json: rope type {kind!r} is not known; known are {', '.join(sorted(_KINDS))}")
    rotated = int(depth * float(settings.get("partial_rotary_factor") or 1.0))
    if not 0 < rotated <= depth or not float(settings["rope_theta"]) > 0:
        raise ValueError("rope_theta and partial_rotary_factor must be greater than 0, the latter at most 1")
    rates, factor = _KINDS[kind](settings, _plain(settings, rotated), context)
    if not (np.isfinite(rates).all() and math.isfinite(factor)):
        raise ValueError("angles are no finite numbers")
    angles = np.outer(np.arange(context, dtype=np.float64), rates.astype(np.float32).astype(np.float64))
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)


def _plain(settings: Settings, rotated: int) -> Array:
    return float(settings["rope_theta"]) ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)


def _default(settings: Settings, rates: Array, context: int) -> Rates:
    return rates, 1.0


def _linear(settings: Settings, rates: Array, context: int) -> Rates:
    return rates / float(settings["factor"]), 1.0


def _dynamic(settings: Settings, rates: Array, context: int) -> Rates:
    """As for a prompt within the trained length: beyond it transformers changes all angles with every token."""
    if context > int(settings.get("max_position_embeddings") or context):
        raise ImportFailure(
            "a context beyond max_position_embeddings is not offered with dynamic rope; lower --context"
        )
    return rates, 1.0


def _llama3(settings: Settings, rates: Array, context: int) -> Rates:
    factor, low = float(settings["factor"]), float(settings["low_freq_factor"])
    high, original = float(settings["high_freq_factor"]), float(settings["original_max_position_embeddings"])
    turns = original * rates / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return rates * ((1 - smooth) / factor + smooth), 1.0


def _yarn(settings: Settings, rates: Array, context: int) -> Rates:
    """Peng et al., "YaRN", 2023: slow pairs are interpolated, fast ones are not, with a ramp between."""
    original = settings.get("original_max_position_embeddings") or settings["max_position_embeddings"]
    factor, base, size = float(settings["factor"]), float(settings["rope_theta"]), 2 * len(rates)

    def pair_of(turns: float) -> float:
        return size * math.log(float(original) / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(float(settings.get("beta_fast") or 32)), pair_of(float(settings.get("beta_slow") or 1))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(len(rates)) - low) / max(high - low, 0.001), 0, 1)
    return rates * (1 - ramp) + rates / factor * ramp, _yarn_factor(settings, factor)


def _yarn_factor(settings: Settings, factor: float) -> float:
    def scale(by: float, strength: float) -> float:
        return 0.1 * strength * math.log(by) + 1.0 if by > 1 else 1.0

    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return scale(factor, float(settings["mscale"])) / scale(factor, float(settings["mscale_all_dim"]))
    return scale(factor, 1.0)


def _longrope(settings: Settings, rates: Array, context: int) -> Rates:
    """Ding et al., "LongRoPE", 2024. The engine's context decides between the short and the long factors, once."""
    original = int(settings.get("original_max_position_embeddings") or settings["max_position_embeddings"])
    wanted = int(settings.get("max_position_embeddings") or original)
    factors = settings["long_factor" if context > original else "short_factor"]
    factor = float(settings.get("factor") or 0) or wanted / original
    attention = settings.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if np.shape(factors) != rates.shape:
        raise ValueError(f"{np.size(factors)} factors for {len(rates)} pairs")
    return rates / np.asarray(factors, np.float64), float(attention)


_KINDS: dict[str, Callable[[Settings, Array, int], Rates]] = {
    "default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn,
    "longrope": _longrope, "su": _longrope,
}  # fmt: skip

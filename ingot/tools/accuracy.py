"""Comparing outputs with a reference: the accuracy gate of trtexec 11, and the statistics `ingot compare` prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ingot.errors import ConfigError
from ingot.evidence import cosine_of
from ingot.tools.files import load_array

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Closeness:
    """Error statistics of one output beside its reference; relative errors are over the reference's magnitude."""

    largest: float
    mean: float
    median: float
    relative: float
    cosine: float
    signal_to_noise: float
    mismatched: int
    elements: int


def closeness(mine: Array, wanted: Array, atol: float, rtol: float) -> Closeness:
    """Statistics of a pair of equal shape; `mismatched` counts elements with |a - b| > atol + rtol * |b|."""
    a, b = np.asarray(mine).astype(np.float64).ravel(), np.asarray(wanted).astype(np.float64).ravel()
    with np.errstate(all="ignore"):
        gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        gap = np.where(np.isnan(gap), np.inf, gap)
        power, noise = float((b**2).sum()), float((gap**2).sum())
        cosine = cosine_of(a, b) if noise else 1.0
        return Closeness(
            float(gap.max(initial=0)),
            float(gap.mean()) if gap.size else 0.0,
            float(np.median(gap)) if gap.size else 0.0,
            float((gap / np.maximum(np.abs(b), 1e-30)).max(initial=0)), cosine,
            10 * float(np.log10(power / noise)) if noise and power else float("inf" if not noise else "-inf"),
            int((gap > atol + rtol * np.abs(b)).sum()), gap.size,
        )  # fmt: skip


_ALGORITHMS: Mapping[str, Callable[[Array, Array], float]] = {
    "l0": lambda gap, b: float(np.count_nonzero(gap)) / max(gap.size, 1),
    "l1": lambda gap, b: float(gap.mean()) if gap.size else 0.0,
    "l2": lambda gap, b: float(np.sqrt((gap**2).mean())) if gap.size else 0.0,
    "lInf": lambda gap, b: float(gap.max(initial=0)),
    "cos": lambda gap, b: 0.0,
}


def gate(outputs: Mapping[str, Any], flags: Mapping[str, str]) -> bool:
    """trtexec's --loadRefOutputs: every named output within its tolerance; prints a line each. True without
    references."""
    references = _references(flags, outputs)
    if not references:
        return True
    algorithm = flags.get("accuracyAlgorithm", "lInf")
    atol, rtol = float(flags.get("atol", 1e-5)), float(flags.get("rtol", 1e-5))
    good = True
    for name, wanted in references.items():
        value, limit, passed = _judge(np.asarray(outputs[name]), wanted, algorithm, atol, rtol, flags)
        print(f"Accuracy {algorithm} of {name}: {value:.6g} (threshold {limit:.6g}) {'PASSED' if passed else 'FAILED'}")
        good = good and passed
    return good


def _judge(
    mine: Array, wanted: Array, algorithm: str, atol: float, rtol: float, flags: Mapping[str, str]
) -> tuple[float, float, bool]:
    if algorithm == "cos":
        value, limit = closeness(mine, wanted, 0, 0).cosine, float(flags.get("accuracyThreshold", 0.99))
        return value, limit, value >= limit
    a, b = mine.astype(np.float64), wanted.astype(np.float64)
    gap = np.abs(a - b)
    if algorithm == "l0":
        gap = gap > atol + rtol * np.abs(b)
    value = _ALGORITHMS[algorithm](gap, b)
    default = 0.0 if algorithm == "l0" else atol + rtol * float(np.abs(b).max(initial=0))
    limit = float(flags.get("accuracyThreshold", default))
    return value, limit, value <= limit


def _references(flags: Mapping[str, str], outputs: Mapping[str, Any]) -> dict[str, Array]:
    pairs = [p.partition(":") for p in flags.get("loadRefOutputs", "").split(",") if p]
    renamed = dict(p.partition(":")[::2] for p in flags.get("refPair", "").split(",") if p)
    references = {}
    for name, colon, path in pairs:
        name = renamed.get(name, name)
        if not colon or name not in outputs:
            raise ConfigError(f"--loadRefOutputs: {name!r} is not an output; the engine has {', '.join(outputs)}")
        like = np.asarray(outputs[name])
        references[name] = load_array(Path(path), like.dtype.name, like.shape)
        if references[name].shape != like.shape:
            raise ConfigError(
                f"--loadRefOutputs: {path} has shape {list(references[name].shape)}, {name!r} has {list(like.shape)}"
            )
    return references

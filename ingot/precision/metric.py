"""How good an engine's answers are: a user's metric, or closeness to a reference's; higher is better.

A user's metric is a Python file with `def metric(outputs, samples) -> float`: `outputs` has a dictionary of arrays for
each sample, `samples` the sample itself with what it holds beside the model's inputs (labels, say).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ingot.errors import ConfigError
from ingot.evidence import cosine_of
from ingot.precision.spool import held
from ingot.precision.user_code import module_of

Array = np.ndarray[Any, Any]
Answer = Mapping[str, Any]
_PERFECT_DECIBELS = 200.0  # of answers that are equal to the last bit
_CLASSES = range(2, 100_001)  # extents of a last axis whose largest element is a decision
_RANK = 3  # at most, of scores: one per sample or per word of it; what has more axes are images
_CHANGED_COSINE = 0.99


@dataclass(frozen=True)
class Metric:
    """`judge(answers, samples, reference answers)`; `relative`: it looks at the reference's answers, not at labels."""

    name: str
    judge: Callable[[Sequence[Answer], Sequence[Answer], Sequence[Answer]], float]
    relative: bool = False

    def __call__(self, answers: Sequence[Answer], samples: Sequence[Answer], reference: Sequence[Answer]) -> float:
        """The score; ConfigError names the metric when it is no number."""
        score = self.judge(answers, samples, reference)
        if not isinstance(score, int | float | np.number) or math.isnan(score):
            raise ConfigError(f"metric {self.name} gave {score!r}, a number is needed (higher is better)")
        return float(score)


def load(source: str | Path | Callable[..., float] | None) -> Metric:
    """A metric from a file, a function of (outputs, samples), "cosine", "snr" or "agreement"; default cosine."""
    if callable(source):
        return _of_user(source, getattr(source, "__name__", "metric"))
    name = str(source or "cosine")
    if name in BUILT_IN:
        return BUILT_IN[name]
    return _of_user(_from_file(Path(name)), name)


def _from_file(path: Path) -> Callable[..., float]:
    if path.suffix != ".py" or not path.is_file():
        known = ", ".join(BUILT_IN)
        raise ConfigError(f"metric {str(path)!r} is neither a Python file that exists nor one of {known}")
    module = module_of(path, f"metric {path}")
    if not callable(getattr(module, "metric", None)):
        raise ConfigError(f"metric {path} has no function `metric(outputs, samples)`")
    return module.metric


def _of_user(function: Callable[..., float], name: str) -> Metric:
    def judge(answers: Sequence[Answer], samples: Sequence[Answer], reference: Sequence[Answer]) -> float:
        try:
            return function(list(answers), list(samples))
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(f"metric {name} failed: {type(error).__name__}: {error}") from error

    return Metric(name, judge)


# -- closeness to a reference


def cosines(answers: Sequence[Answer], reference: Sequence[Answer]) -> list[float]:
    """Per sample: the smallest cosine of its floating point outputs to the reference's; infinity or NaN counts as 0."""
    return [min((_cosine(a[n], b[n]) for n in _floats(b)), default=1.0) for a, b in _both(answers, reference)]


def decibels(answers: Sequence[Answer], reference: Sequence[Answer]) -> float:
    """Signal to noise over all samples, of the worst output; 200 where nothing differs."""
    names = _floats(reference[0]) if reference else []
    found = (_decibels([a[n] for a in answers], [b[n] for b in reference]) for n in names)
    return min(found, default=_PERFECT_DECIBELS)


def _both(answers: Sequence[Answer], reference: Sequence[Answer]) -> Iterable[tuple[Answer, Answer]]:
    return zip(answers, reference, strict=True)


def _floats(answer: Answer) -> list[str]:
    return [n for n, y in answer.items() if isinstance(y, np.ndarray) and (y.dtype.kind == "f" or _is_bfloat16(y))]


def _is_bfloat16(array: Array) -> bool:
    return array.dtype.name == "bfloat16"


def _flat(array: Any) -> Array:
    return np.asarray(array).astype(np.float64).ravel()


def _cosine(mine: Any, wanted: Any) -> float:
    a, b = _flat(mine), _flat(wanted)
    if a.size != b.size or not np.isfinite(a).all():
        return 0.0
    return 1.0 if np.array_equal(a, b) else cosine_of(a, b)


def _decibels(mine: Sequence[Any], wanted: Sequence[Any]) -> float:
    power = noise = 0.0
    for a, b in zip(map(_flat, mine), map(_flat, wanted), strict=True):
        if a.size != b.size or not np.isfinite(a).all():
            return -math.inf
        power, noise = power + float((b**2).sum()), noise + float(((a - b) ** 2).sum())
    if not noise:
        return _PERFECT_DECIBELS
    return 10 * math.log10(power / noise) if power else -math.inf


def _mean_cosine(answers: Sequence[Answer], samples: Sequence[Answer], reference: Sequence[Answer]) -> float:
    return float(np.mean(cosines(answers, reference)))


def _signal(answers: Sequence[Answer], samples: Sequence[Answer], reference: Sequence[Answer]) -> float:
    return decibels(answers, reference)


def _agreement(answers: Sequence[Answer], samples: Sequence[Answer], reference: Sequence[Answer]) -> float:
    """Share of decisions that are the reference's."""
    same = [np.ravel(decisions(a)[n] == d) for a, b in _both(answers, reference) for n, d in decisions(b).items()]
    if not same:
        raise ConfigError("metric agreement needs an output whose largest element is a decision; use cosine")
    return float(np.concatenate(same).mean())


BUILT_IN = {
    "cosine": Metric("cosine", _mean_cosine, relative=True),
    "snr": Metric("snr", _signal, relative=True),
    "agreement": Metric("agreement", _agreement, relative=True),
}


# -- single samples


def decisions(answer: Answer) -> dict[str, Array]:
    """Per output that looks like scores of classes: the place of the largest along the last axis."""
    shapes = {name: answer[name].shape for name in _floats(answer)}
    scores = {n: answer[n] for n, s in shapes.items() if 0 < len(s) <= _RANK and s[-1] in _CLASSES}
    return {n: np.asarray(y.argmax(-1)) for n, y in scores.items()}


@dataclass(frozen=True)
class Change:
    """A sample whose answer is another one now: where it stands, which output, what changed."""

    index: int
    output: str
    was: str
    now: str
    cosine: float


def changes(before: Sequence[Answer], after: Sequence[Answer]) -> list[Change]:
    """Samples with another decision, another integer, or a cosine below 0.99."""
    pairs = enumerate(_both(before, after))
    return [change for i, (old, new) in pairs for name in old if (change := _change(i, name, old[name], new[name]))]


def _change(index: int, name: str, old: Any, new: Any) -> Change | None:
    old, new = np.asarray(old), np.asarray(new)
    if old.shape != new.shape:
        return Change(index, name, f"shape {list(old.shape)}", f"shape {list(new.shape)}", 0.0)
    if name not in _floats({name: old}):
        return None if np.array_equal(old, new) else Change(index, name, _short(old), _short(new), 0.0)
    cosine = _cosine(new, old)
    before, after = decisions({name: old}).get(name), decisions({name: new}).get(name)
    if before is not None and after is not None and not np.array_equal(before, after):
        differing = np.flatnonzero(before.ravel() != after.ravel())
        return Change(index, name, _short(before.ravel()[differing]), _short(after.ravel()[differing]), cosine)
    return Change(index, name, _short(old), _short(new), cosine) if cosine < _CHANGED_COSINE else None


def _short(array: Array) -> str:
    flat = np.ravel(array)
    text = ", ".join(f"{v:.4g}" if flat.dtype.kind == "f" else str(v) for v in flat[:4].tolist())
    return text + (", …" if flat.size > 4 else "")


# -- answers


def answers(run: Callable[[Mapping[str, Any]], dict[str, Any]], samples: Iterable[Answer], names: Iterable[str]
            ) -> list[dict[str, Any]]:  # fmt: skip
    """The answers of `run` (a session's) to each sample; what is not an input stays out of the feeds."""
    inputs = list(names)
    return held(run({name: sample[name] for name in inputs}) for sample in samples)

"""What was found on the way to a mixed engine: for the engine file, for a file beside it, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ingot.precision.metric import Answer
from ingot.precision.sensitivity import Group, Sensitivity

SUFFIX = ".precision.json"
_SHOWN = 12


@dataclass(frozen=True)
class Proof:
    """An engine on held-out samples, beside float32."""

    score: float
    decibels: float
    cosine: float
    samples: int
    answers: Sequence[Answer] = field(default=(), repr=False)

    @property
    def shown(self) -> dict[str, float]:
        """Without the answers."""
        return {"score": self.score, "decibels": self.decibels, "lowest_cosine": self.cosine, "samples": self.samples}


@dataclass(frozen=True)
class Trial:
    """One choice that was tried: how many layers are narrow, in which formats; `best`: no other is both faster and
    better."""

    narrow: int
    kinds: tuple[str, ...]
    rest: str
    score: float
    margin: float
    microseconds: float | None
    within: bool
    heldout: float | None
    best: bool


@dataclass(frozen=True)
class Report:
    """Everything; `layers` from the cheapest noise to the dearest, empty where no budget asked for it."""

    formats: tuple[str, ...]
    rest: str
    metric: str
    budget: str
    samples: int
    reference: float
    reference_microseconds: float
    chosen: Mapping[str, str]
    score: float
    microseconds: float
    heldout: Mapping[str, float]
    heldout_reference: Mapping[str, float]
    layers: tuple[Sensitivity, ...]
    groups: tuple[Group, ...]
    candidates: tuple[str, ...]
    trials: tuple[Trial, ...]
    notes: tuple[str, ...]

    @property
    def wide(self) -> list[str]:
        """Layers that could be narrow and are not."""
        return [name for name in self.candidates if name not in self.chosen]

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {**asdict(self), "speedup": self.reference_microseconds / self.microseconds, "wide": self.wide}

    def lasting(self) -> dict[str, Any]:
        """What belongs into the engine file: nothing that another measurement would change."""
        return {
            "rest": self.rest, "nodes": dict(self.chosen), "wide": self.wide, "metric": self.metric,
            "budget": self.budget, "heldout": dict(self.heldout), "heldout_reference": dict(self.heldout_reference),
        }  # fmt: skip


def as_text(report: Mapping[str, Any]) -> list[str]:
    """The report's JSON for people; notes alone where nothing was searched."""
    notes = [f"note: {note}" for note in report["notes"]]
    if "trials" not in report:
        return notes
    return [*summary(report), *notes, *_front(report), *_blocking(report)]


def summary(report: Mapping[str, Any]) -> list[str]:
    """What is narrow and how fast that is; what it scores on held-out samples."""
    kinds = Counter(report["chosen"].values())
    narrow = ", ".join(f"{count} in {kind}" for kind, count in kinds.items()) or "none narrow"
    held, reference = report["heldout"], report["heldout_reference"]
    return [
        f"precision: of {len(report['candidates'])} layers {narrow}, the rest in {report['rest']}; "
        f"{report['microseconds'] / 1e3:.3f} ms, float32 {report['reference_microseconds'] / 1e3:.3f} ms "
        f"({report['speedup']:.2f}x)",
        f"accuracy: {report['metric']} {held['score']:.6g} on {held['samples']} held-out samples, float32 "
        f"{reference['score']:.6g} (budget {report['budget']}); signal to noise {held['decibels']:.1f} dB, "
        f"lowest cosine {held['lowest_cosine']:.5f}",
    ]


def _front(report: Mapping[str, Any]) -> list[str]:
    timed = [t for t in report["trials"] if t["microseconds"] is not None]
    if len(timed) < 2:
        return []
    lines = ["choices measured, fastest first (* none is both faster and better):",
             "      narrow  rest     ms       score ± margin          within  held out      formats"]  # fmt: skip
    for trial in sorted(timed, key=lambda t: t["microseconds"]):
        held = "" if trial["heldout"] is None else f"{trial['heldout']:.6g}"
        mark, within = "*" if trial["best"] else " ", "yes" if trial["within"] else "no"
        score = f"{trial['score']:<8.6g} ± {trial['margin']:<10.3g}  {within:6}  {held:12}  {', '.join(trial['kinds'])}"
        time = f"{trial['rest']:>5} {trial['microseconds'] / 1e3:8.3f}"
        lines.append(f"    {mark} {trial['narrow']:6} {time}  {score}".rstrip())
    return lines


def _blocking(report: Mapping[str, Any]) -> list[str]:
    """The layers that stay wide because they would cost too much, or gain nothing."""
    wide = set(report["wide"])
    left = [layer for layer in report["layers"] if layer["node"] in wide]
    if not left:
        return []
    noisy = sorted(left, key=lambda layer: -layer["noise"])
    shown = [f"{s['node']} (noise {s['noise']:.1e}, saves {s['gain']:.1f} µs)" for s in noisy[:_SHOWN]]
    more = len(left) - len(shown)
    return [f"kept wide: {', '.join(shown)}" + (f", and {more} more" if more > 0 else "")]

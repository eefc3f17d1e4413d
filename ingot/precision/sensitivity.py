"""What a layer costs and gains in a narrower precision: the error it alone makes at the outputs, the time it saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ingot.precision.trials import Choice, Trials

Tell = Callable[[str, float], None]
_SAMPLES = 64
_GROUPS = 8


@dataclass(frozen=True)
class Sensitivity:
    """One layer alone in `precision`: noise over signal at the worst output, microseconds that it saves."""

    node: str
    precision: str
    noise: float
    gain: float

    @property
    def price(self) -> float:
        """Noise per microsecond saved; infinite where none is."""
        return self.noise / self.gain if self.gain > 0 else float("inf")


@dataclass(frozen=True)
class Group:
    """Several layers at once: their noise, and the sum of what each makes alone."""

    nodes: tuple[str, ...]
    noise: float
    expected: float


def noise_of(trials: Trials, choice: Choice) -> float:
    """Power of the difference to float32 over the signal's, at the worst output; infinite where something is not
    finite."""
    return float(10 ** (-trials.decibels(choice) / 10))


def layers(trials: Trials, narrow: Mapping[str, str], rest: str, tell: Tell) -> list[Sensitivity]:
    """Each node of `narrow` by itself, and what it saves where all of them are narrow; cheapest noise first."""
    few = trials.fewer(_SAMPLES)
    saved = gains(trials, narrow, rest)
    found = []
    for position, (node, precision) in enumerate(narrow.items()):
        tell("sensitivity", position / len(narrow))
        noise = noise_of(few, Choice({node: precision}, rest))
        found.append(Sensitivity(node, precision, noise, saved[node]))
    return sorted(found, key=lambda s: (s.price, s.noise))


def groups(trials: Trials, ranked: Sequence[Sensitivity], rest: str) -> list[Group]:
    """The ranked layers in a few groups, each measured at once: errors that add up or worse than that show here."""
    few, size = trials.fewer(_SAMPLES), max(1, -(-len(ranked) // _GROUPS))
    found = []
    for start in range(0, len(ranked), size):
        members = ranked[start : start + size]
        noise = noise_of(few, Choice({s.node: s.precision for s in members}, rest))
        found.append(Group(tuple(s.node for s in members), noise, sum(s.noise for s in members)))
    return found


def gains(trials: Trials, narrow: Mapping[str, str], rest: str) -> dict[str, float]:
    """Microseconds each node saves: its share of the steps it is part of, wide less narrow."""
    wide = _shares(trials.step_times(Choice({}, rest)), narrow)
    narrowed = _shares(trials.step_times(Choice(narrow, rest)), narrow)
    return {node: wide.get(node, 0.0) - narrowed.get(node, 0.0) for node in narrow}


def _shares(times: Mapping[tuple[str, ...], float], names: Mapping[str, str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for nodes, microseconds in times.items():
        mine = [node for node in nodes if node in names]
        for node in mine:
            shares[node] = shares.get(node, 0.0) + microseconds / len(mine)
    return shares

"""Which layers may be narrow within a budget, and which of the choices tried is the fastest.

The layers stand in the order of their price, noise per microsecond saved. Of the runs from the cheapest on some lengths
are tried, the longest that keeps the budget is looked for beyond by halving, and what lies behind is tried one by one.
Whatever is kept has been measured: score and time of the whole engine, conversions included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ingot.precision.sensitivity import Sensitivity
from ingot.precision.trials import FLOAT32, Choice

Tell = Callable[[str, float], None]
LADDER = (1.0, 15 / 16, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)  # lengths that are tried, of all layers that gain
_EXTRA_TRIES = 6
_EXPECTED = 20  # choices, for the progress that is told
_TIMED = 12  # of what is within the budget, the choices with most that is narrow
_TIMED_OUTSIDE = 3
FASTER = 0.99  # a narrower choice has to be faster than a wider one by more than timing errs


@dataclass(frozen=True)
class Point:
    """A choice that was tried: its score, the error of that for so many samples, whether the score less the error is
    within the budget; and its time where it was worth measuring."""

    choice: Choice
    score: float
    margin: float
    within: bool
    microseconds: float | None = None


@dataclass(frozen=True, eq=False)
class Search:
    """`judge` and `microseconds` measure a choice; whoever gives them has the budget in mind."""

    judge: Callable[[Choice], Point]
    microseconds: Callable[[Choice], float]
    tell: Tell
    forced: Mapping[str, str] = field(default_factory=dict)  # nodes that are narrow whatever it costs
    rest: str = "fp32"
    ladder: Sequence[float] = LADDER
    also: Sequence[Choice] = ()
    _points: dict[Choice, Point] = field(default_factory=dict)

    def run(self, ranked: Sequence[Sensitivity]) -> list[Point]:
        """All points tried, those worth it timed; fastest within the budget first."""
        for choice in (*self._widest(), *self.also):
            self._try(choice)
        useful = [s for s in ranked if s.gain > 0]
        longest = self._longest(useful)
        kept = self._extended(useful[:longest], useful[longest:])
        self._try(self._choice(ranked if len(useful) == longest else kept))
        for choice in self._worth_timing(kept):
            self._time(choice)
        return self.points()

    def points(self) -> list[Point]:
        """Within the budget before outside, fastest first; of two that are equally fast the better score."""
        return sorted(self._points.values(), key=lambda p: (not p.within, p.microseconds is None,
                                                            p.microseconds or 0.0, -p.score))  # fmt: skip

    def _widest(self) -> list[Choice]:
        """Where nothing narrow is asked for by name, float32 is always an answer."""
        wide = Choice(self.forced, self.rest)
        return [wide] if self.forced else [FLOAT32, wide]

    def _choice(self, layers: Iterable[Sensitivity]) -> Choice:
        return Choice({**{s.node: s.precision for s in layers}, **self.forced}, self.rest)

    def _try(self, choice: Choice) -> bool:
        if choice not in self._points:
            self.tell("search", min(len(self._points) / _EXPECTED, 0.99))
            self._points[choice] = self.judge(choice)
        return self._points[choice].within

    def _longest(self, ranked: Sequence[Sensitivity]) -> int:
        """The greatest length of a run from the start found to be within the budget: of those on the ladder, and
        between it and the next."""
        lengths = sorted({round(len(ranked) * share) for share in self.ladder} | {0})
        within = [length for length in lengths if self._try(self._choice(ranked[:length]))]
        low = max(within, default=0)
        high = min((length for length in lengths if length > low), default=low)
        while high - low > 1:
            middle = (low + high) // 2
            if self._try(self._choice(ranked[:middle])):
                low = middle
            else:
                high = middle
        return low

    def _extended(self, kept: Sequence[Sensitivity], left: Sequence[Sensitivity]) -> list[Sensitivity]:
        """Layers behind the one that broke the budget that fit still, one at a time, the largest gain first."""
        chosen = list(kept)
        candidates = sorted(left, key=lambda s: -s.gain)[:_EXTRA_TRIES] if left else []
        for layer in candidates:
            if self._try(self._choice([*chosen, layer])):
                chosen.append(layer)
        return chosen

    def _worth_timing(self, kept: Sequence[Sensitivity]) -> list[Choice]:
        """What may turn out fastest, and what a larger budget would allow."""
        inside = [p.choice for p in self._points.values() if p.within]
        outside = [p.choice for p in self._points.values() if not p.within]
        inside, outside = (sorted(some, key=lambda choice: -len(choice.nodes)) for some in (inside, outside))
        picked = [*self._widest(), self._choice(kept), *inside[:_TIMED], *outside[:_TIMED_OUTSIDE]]
        return list(dict.fromkeys(picked))

    def _time(self, choice: Choice) -> None:
        self.tell("timing", min(sum(p.microseconds is not None for p in self._points.values()) / _TIMED, 0.99))
        self._points[choice] = replace(self._points[choice], microseconds=self.microseconds(choice))


def never_slower(points: Sequence[Point]) -> list[Point]:
    """Points within the budget in the order in which they may be taken: the fastest first, but a narrower one only
    where it is measured faster than every wider one that is in the list."""
    timed = sorted((p for p in points if p.within and p.microseconds is not None), key=_time)
    wider = [[q for q in timed if _is_wider(q.choice, p.choice)] for p in timed]
    good = [p for p, others in zip(timed, wider, strict=True)
            if all(_time(p) < FASTER * _time(q) for q in others)]  # fmt: skip
    return good or timed


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both time and score, fastest first."""
    best: list[Point] = []
    for point in sorted((p for p in points if p.microseconds is not None), key=lambda p: (_time(p), -p.score)):
        if not best or point.score > best[-1].score:
            best.append(point)
    return best


def _time(point: Point) -> float:
    assert point.microseconds is not None
    return point.microseconds


def _is_wider(one: Choice, other: Choice) -> bool:
    """Whether `one` keeps more in a wide precision than `other`, and nothing narrow that the other has wide."""
    if one == other:
        return False
    if one == FLOAT32:
        return True
    return one.rest == other.rest and set(one.nodes) < set(other.nodes)

"""A step between its beginning and its end. One that fails is computed again, share by share: what fails alone too is
at fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ingot.errors import IngotError
from ingot.llm.batch import Begun, Copy, Floats, Integers, Runner, Wanted
from ingot.llm.scheduler import Share, Step, batch_of
from ingot.runtime.group import GroupLost


class Spoiled(IngotError):
    """The step before failed, this one continued it."""


@dataclass(eq=False)
class Flight:
    """A step that was begun at `since`. asked: how the runner draws its tokens, where nothing else is wanted of it.
    copies: of the step's those that were not made."""

    step: Step
    asked: Mapping[str, Integers] | None
    since: float
    begun: Begun | Exception
    copies: Sequence[Copy] = ()
    spoiled: bool = False

    @property
    def told(self) -> list[int]:
        """The rows whose log-probabilities come with it."""
        return [] if self.asked is None else list(self.asked["told"].tolist())

    def result(self) -> Mapping[str, Any]:
        """What the runner gives. Whatever was wrong is raised here, at its beginning too."""
        if isinstance(self.begun, Exception):
            raise self.begun
        found = self.begun.result()
        if self.spoiled:
            raise Spoiled("the step before has failed")
        return found


@dataclass(frozen=True, eq=False)
class Landed:
    """Shares that were computed; `rows`: logits or drawn tokens, `states`: hidden ones, at the shares' places. likely:
    of tokens that were drawn what the operator Likely says, by row, where that was asked for."""

    shares: Sequence[Share]
    rows: Floats | Integers
    states: Floats | None = None
    likely: Mapping[int, Integers] = field(default_factory=dict)

    @classmethod
    def of(cls, shares: Sequence[Share], found: Mapping[str, Any], told: Sequence[int] = ()) -> Landed:
        """What a runner gave; told: the rows that "likely" is about."""
        rows = found["chosen"] if "chosen" in found else found["logits"]
        return cls(shares, rows, found.get("hidden"), dict(zip(told, found.get("likely", ()), strict=True)))

    def own(self, share: Share) -> Any:
        """The share's rows, or states where it is silent."""
        held: Any = self.states if share.sequence.silent else self.rows
        return held[share.row : share.row + share.rows]


def begin(runner: Runner, step: Step, asked: Mapping[str, Integers] | None, now: float) -> Flight:
    """Begin a step, behind what is under way. asked: how its tokens are drawn; None: its logits are wanted."""
    begun: Begun | Exception
    copies = step.copies
    try:
        if copies:
            runner.copy_blocks(copies)
        copies = ()
        begun = _begin(runner, step.shares, asked)
    except GroupLost:
        raise  # no step can be computed any more
    except Exception as error:  # noqa: BLE001 - raised when its result is asked for
        begun = error
    return Flight(step, asked, now, begun, copies)


def _begin(runner: Runner, shares: Sequence[Share], asked: Mapping[str, Integers] | None) -> Begun:
    batch = batch_of(shares, runner.block_size)
    if asked is not None:
        told: tuple[Wanted, ...] = ("likely",) if len(asked["told"]) else ()
        return runner.begin(replace(batch, **asked), "chosen", *told)
    wanted: tuple[Wanted, ...] = ("logits", "hidden") if len(batch.states) else ("logits",)
    return runner.begin(batch, *wanted)


def one_by_one(runner: Runner, flight: Flight, shares: Sequence[Share]) -> Iterator[tuple[Share, Landed | Exception]]:
    """Some shares of a step again, each alone, and what came of it. Copies that were made hold, and who was copied from
    may have ended since, its block be another's: those that were not are made at first."""
    copies = flight.copies
    for share in shares:
        try:
            if copies:
                runner.copy_blocks(copies)
            copies = ()
            yield share, Landed.of([share], _begin(runner, [share], None).result())
        except Exception as own:  # noqa: BLE001 - becomes the request's answer
            yield share, own


def joined(vocabulary: int, found: Sequence[tuple[Share, Landed]]) -> Landed:
    """What was computed one by one, at the places that it has in the whole step."""
    loud, silent = ([(s, each) for s, each in found if s.sequence.silent is kind] for kind in (False, True))
    rows = np.zeros((_end(loud), vocabulary), np.float32)
    states = np.zeros((_end(silent), *(silent[0][1].states.shape[1:] if silent else (0,))), np.float32)  # type: ignore[union-attr]
    for share, each in loud:
        rows[share.row : share.row + share.rows] = each.rows
    for share, each in silent:
        states[share.row : share.row + share.rows] = each.states
    return Landed([share for share, _ in found], rows, states)


def _end(found: Sequence[tuple[Share, Landed]]) -> int:
    return max((share.row + share.rows for share, _ in found), default=0)

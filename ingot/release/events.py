"""What can happen to a rollout: commands of people, findings of the controller. Each becomes one row of the log."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ingot.release.spec import Rollout

Outcome = Literal["Successful", "Failed", "Inconclusive", "Error"]


class Event(msgspec.Struct, frozen=True, tag=True, tag_field="kind", omit_defaults=True):
    """Something that happened."""


class Applied(Event, frozen=True):
    """A rollout was asked for."""

    spec: Rollout


class Promote(Event, frozen=True):
    """Go on to the next step, or straight to the end; `version` chooses among several candidates."""

    full: bool = False
    version: str | None = None


class Pause(Event, frozen=True):
    """Hold everything but the guards and analyses."""


class Resume(Event, frozen=True):
    """Go on."""


class Abort(Event, frozen=True):
    """All traffic back to stable."""


class Retry(Event, frozen=True):
    """An aborted rollout from its first step."""


class Undo(Event, frozen=True):
    """The version that was stable before the last promotion; during a rollout, abort."""


class SetWeight(Event, frozen=True):
    """Weights by hand, in percent; the rollout is held."""

    weights: dict[str, float]


class Tick(Event, frozen=True):
    """Time has passed."""


class Ready(Event, frozen=True):
    """A version is loaded and warm."""

    version: str
    evidence: dict[str, Any] = {}


class NotReady(Event, frozen=True):
    """A version cannot be loaded or warmed."""

    version: str
    reason: str


class Unloaded(Event, frozen=True):
    """A version without traffic was unloaded from its servers, or they refused, which is noted."""

    version: str
    reason: str = ""


class CapacityChecked(Event, frozen=True):
    """Whether every version can carry what it would get."""

    passed: bool
    reason: str
    weights: dict[str, int]


class Judged(Event, frozen=True):
    """One metric's verdict on one version."""

    run: int
    metric: str
    version: str
    outcome: Outcome
    reason: str
    evidence: dict[str, Any] = {}


class Breached(Event, frozen=True):
    """An absolute limit was crossed."""

    version: str
    guard: str
    reason: str
    evidence: dict[str, Any] = {}


Command = Promote | Pause | Resume | Abort | Retry | Undo | SetWeight | Applied
Any_ = Command | Tick | Ready | NotReady | Unloaded | CapacityChecked | Judged | Breached
COMMANDS = {"promote": Promote, "pause": Pause, "resume": Resume, "abort": Abort, "retry": Retry, "undo": Undo}
_ENCODER, _DECODER = msgspec.json.Encoder(), msgspec.json.Decoder(Any_)


def encode(event: Event) -> str:
    """As a row of the log holds it."""
    return _ENCODER.encode(event).decode()


def decode(text: str) -> Event:
    """The event of a row."""
    return _DECODER.decode(text)

"""What happened during a build: nothing is silent. Fallbacks, dropped tactics, rejections, times; none of it is in the
file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_LAST: list[BuildLog] = []


@dataclass(frozen=True)
class Notice:
    """One line of the report: what (`kind`), the user's node, why, what would change it."""

    kind: str
    node: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.node}: {self.reason}" + (f" ({self.remedy})" if self.remedy else "")


@dataclass(eq=False)
class BuildLog:
    """Collects notices, figures and stage times; `progress(stage, share)` is told as the build goes."""

    progress: Callable[[str, float], None] | None = None
    notices: list[Notice] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _LAST[:] = [self]

    def note(self, kind: str, node: str, reason: str, remedy: str = "") -> None:
        """Add a line."""
        self.notices.append(Notice(kind, node, reason, remedy))

    def advance(self, stage: str, share: float) -> None:
        """Tell how far a stage is, 0 to 1."""
        if self.progress is not None:
            self.progress(stage, share)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        self.advance(name, 0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.advance(name, 1.0)


def last_log() -> BuildLog:
    """The log of the latest build in this process."""
    return _LAST[0] if _LAST else BuildLog()

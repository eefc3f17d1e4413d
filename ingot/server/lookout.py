"""Whether to look for input a little longer instead of going to sleep: waking a core takes longer than many models.

Pure but for `Lookout`, which does the looking on an event loop.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from time import monotonic_ns

_TRUST, _TRIED_AGAIN = 16, 64  # looks in vain until none are made; answers after which one is


@dataclass
class Habit:
    """Looking is worth while as long as it usually finds something."""

    trust: int = _TRUST
    passed: int = 0

    def wanted(self) -> bool:
        """After an answer: whether to look for the next request."""
        self.passed = 0 if self.trust else (self.passed + 1) % _TRIED_AGAIN
        return bool(self.trust) or not self.passed

    def looked(self, found: bool) -> None:
        """What came of it."""
        self.trust = min(self.trust + 2, _TRUST) if found else max(self.trust - 1, 0)


class Lookout:
    """Keeps an event loop from sleeping for a moment after an answer; `microseconds` 0, or a single core: never."""

    def __init__(self, microseconds: int = 0) -> None:
        self._window = microseconds * 1000 if len(os.sched_getaffinity(0)) > 1 else 0
        self._habit = Habit()
        self._until, self._looking = 0, False

    def heard(self) -> None:
        """Input came."""
        if self._until:
            self._until = 0
            self._habit.looked(True)

    def answered(self) -> None:
        """Something was sent: there may soon be more to do. On the event loop's thread only."""
        if not self._window or self._until or not self._habit.wanted():
            return
        self._until = monotonic_ns() + self._window
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        if monotonic_ns() < self._until:
            asyncio.get_running_loop().call_soon(self._look)
            return
        self._looking = False
        if self._until:
            self._until = 0
            self._habit.looked(False)

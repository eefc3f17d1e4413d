"""Work from other threads onto an event loop; what comes together wakes the loop once."""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable

log = logging.getLogger("ingot.server")
Action = Callable[[], None]


class Mailbox:
    """`post` from any thread; the action runs on the loop soon, in order."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._posted: collections.deque[Action] = collections.deque()

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on actions run on this loop."""
        self._loop = loop

    def post(self, action: Action) -> None:
        """Run it on the loop soon; dropped if the loop has ended."""
        first = not self._posted
        self._posted.append(action)
        if first and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        while self._posted:
            try:
                self._posted.popleft()()
            except Exception:
                log.exception("an answer failed")

"""Work from other threads onto an event loop; what comes together wakes the loop once."""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
from collections.abc import Callable

log = logging.getLogger("ingot.server")
Action = Callable[[], None]


class Mailbox:
    """`post` from any thread; the action runs on the loop soon, in order, after the input that is ready by then."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._posted: collections.deque[Action] = collections.deque()
        self._coming = False  # a run is on its way that sees what is posted now

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on actions run on this loop, whose thread this is."""
        self._loop, self._thread = loop, threading.get_ident()
        self._coming = bool(self._posted)
        if self._posted:
            loop.call_soon(self._run)

    def here(self) -> bool:
        """Whether this is the loop's thread."""
        return threading.get_ident() == self._thread

    def post(self, action: Action) -> None:
        """Run it on the loop soon; dropped if the loop has ended."""
        self._posted.append(action)
        if self._coming or self._loop is None or self._loop.is_closed():
            return
        self._coming = True
        if self.here():
            self._loop.call_soon(self._run)
        else:
            self._loop.call_soon_threadsafe(self._run)

    def run(self, action: Action) -> None:
        """Run it now if this is the loop's thread, else soon."""
        if self.here():
            action()
        else:
            self.post(action)

    def watch(self, handle: int, action: Action) -> None:
        """Run an action whenever there is something to read; on the loop's thread only."""
        assert self._loop is not None
        self._loop.add_reader(handle, action)

    def unwatch(self, handle: int) -> None:
        """No longer, before the handle is closed; on the loop's thread only."""
        assert self._loop is not None
        self._loop.remove_reader(handle)

    def post_later(self, action: Action, seconds: float) -> None:
        """Run it on the loop after a while; on the loop's thread only."""
        assert self._loop is not None
        self._loop.call_later(seconds, self.post, action)

    def wait(self, event: threading.Event) -> None:
        """Until the loop has set an event, or has ended and never will; on any thread but the loop's."""
        while not event.wait(1.0) and self._loop is not None and self._loop.is_running():
            pass

    def _run(self) -> None:
        """Everything posted; what an action posts in turn waits until there was a look at the input."""
        self._coming = False  # before the look at what is there: whoever posts later calls again
        for _ in range(len(self._posted)):
            try:
                self._posted.popleft()()
            except Exception:
                log.exception("an answer failed")

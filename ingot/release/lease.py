"""Only one controller acts. No wall clock: a lease whose beat stands still for as long as the challenger
waited is free."""

from __future__ import annotations

from dataclasses import dataclass

from ingot.release.store import Lease, Store

NAME = "controller"


@dataclass
class Keeper:
    """One controller's view of the lease; `now` is its own monotonic time."""

    store: Store
    holder: str
    ttl: float = 3.0
    _seen: Lease | None = None
    _since: float = 0.0
    _beaten: float = float("-inf")
    held: bool = False

    def hold(self, now: float) -> bool:
        """Keep it, or take it if it is free; whether it is held. It is renewed three times as often as needed."""
        if self.held and now - self._beaten < self.ttl / 3:
            return True
        lease = self.store.lease(NAME)
        if lease != self._seen or self._seen is None:
            self._seen, self._since = lease, now
        mine = lease is not None and lease.holder == self.holder
        free = lease is None or mine or now - self._since >= self.ttl
        self.held = free and self.store.beat(NAME, self.holder, lease)
        if self.held:
            self._beaten = now
        return self.held

    def lost(self) -> None:
        """Somebody else has it."""
        self.held = False

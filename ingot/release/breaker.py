"""A circuit breaker: so many failures in a row keep a version's requests away for a while. Pure: the clock
is passed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CircuitBreaker:
    """Closed, open until a moment, or half open: then one request at a time tries."""

    failures: int
    cooldown: float
    in_a_row: int = 0
    open_until: float | None = None
    trying: bool = False

    def allows(self, now: float) -> bool:
        """Whether a request may go; one that may while the breaker is half open is the trial."""
        if self.open_until is None:
            return True
        if now < self.open_until or self.trying:
            return False
        self.trying = True
        return True

    def succeeded(self) -> None:
        """An answer came: closed."""
        self.in_a_row, self.open_until, self.trying = 0, None, False

    def failed(self, now: float) -> None:
        """No answer, or a bad one: open after enough of them, and again after a failed trial."""
        self.in_a_row += 1
        if self.trying or self.in_a_row >= self.failures:
            self.open_until = now + self.cooldown
        self.trying = False

    def given_up(self) -> None:
        """The trial's client left: nothing was learnt."""
        self.trying = False

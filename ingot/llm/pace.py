"""How long a step takes, as far as the last ones tell: the rule that sizes chunks of prompts by a deadline."""

from __future__ import annotations

from dataclasses import dataclass

_KEPT = 0.98  # weight that an observation keeps with each later one: about the last fifty count


@dataclass(slots=True)
class Pace:
    """seconds = fixed + each * tokens, fitted by least squares that forget."""

    _weight: float = 0.0
    _tokens: float = 0.0
    _squares: float = 0.0
    _seconds: float = 0.0
    _products: float = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self._weight = self._weight * _KEPT + 1
        self._tokens = self._tokens * _KEPT + tokens
        self._squares = self._squares * _KEPT + tokens * tokens
        self._seconds = self._seconds * _KEPT + seconds
        self._products = self._products * _KEPT + tokens * seconds

    def line(self) -> tuple[float, float] | None:
        """(fixed, each) in seconds, neither negative; None before anything was observed."""
        if not self._tokens:
            return None
        spread = self._weight * self._squares - self._tokens**2
        each = self._seconds / self._tokens  # no fixed part, where all steps were alike
        if spread > 1e-9 * self._weight * self._squares:
            each = min(max((self._weight * self._products - self._tokens * self._seconds) / spread, 0.0), each)
        return (self._seconds - each * self._tokens) / self._weight, each

    def seconds(self, tokens: int) -> float | None:
        """What a step of so many tokens will take; None if nothing is known."""
        line = self.line()
        return None if line is None else line[0] + line[1] * tokens

    def tokens_within(self, seconds: float) -> int | None:
        """The most tokens that a step of so many seconds can have; None if any number can, or nothing is known."""
        line = self.line()
        if line is None or line[1] <= 0:
            return None
        return max(int((seconds - line[0]) / line[1]), 0)

"""How an engine runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ingot.errors import ConfigError
from ingot.llm.request import between

_RANGES = {"drafts": (0, 64), "requests": (1, math.inf), "interval": (1e-6, math.inf), "patience": (1e-3, math.inf)}


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs.

    drafts: at most so many tokens are proposed at once, 0 for none; from n-grams unless there is a draft model.
    interval: seconds between tokens that chunks of prompts respect. requests: more at once are refused.
    patience: seconds after which a step counts as hung.
    """

    drafts: int = 0
    interval: float = 0.05
    requests: int = 2048
    patience: float = 60.0

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:  # NaN is in no range
                raise ConfigError(f"{name} must be {between(low, high)}, it is {getattr(self, name)}")

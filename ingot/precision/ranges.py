"""What calibration found: the range of every tensor that may become narrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ingot.errors import ConfigError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class TensorRange:
    """low..high is what 8 bits shall cover, always with 0; `calibrator` whose choice it is; `clipped` the share of
    values beyond. Of each channel `lows`, `highs`, and the mean square `energy` (None where a cache does not tell)."""

    low: float
    high: float
    calibrator: str = "minmax"
    clipped: float = 0.0
    lows: Array | None = None
    highs: Array | None = None
    energy: Array | None = None

    @property
    def magnitude(self) -> float:
        """The larger end."""
        return max(-self.low, self.high)


@dataclass(frozen=True, eq=False)
class Ranges(Mapping[str, TensorRange]):
    """Ranges by tensor name. `warnings`: what in the samples makes them doubtful, a sentence each."""

    tensors: Mapping[str, TensorRange]
    samples: int = 0
    warnings: tuple[str, ...] = field(default=())

    def __getitem__(self, name: str) -> TensorRange:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def of(self, name: str, node: str) -> TensorRange:
        """The range a node's input needs; ConfigError where calibration has not seen it."""
        if name not in self.tensors:
            raise ConfigError(f"node {node!r} reads {name!r}, which calibration has not seen: calibrate this model "
                              "with samples that reach it, or leave the node in float32")  # fmt: skip
        return self.tensors[name]

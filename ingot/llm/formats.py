"""How an engine keeps a checkpoint's matrices: float32, bfloat16, or integers of eight or four bits with scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.errors import ConfigError
from ingot.llm.decoder import Array, Matrix

Weights = Mapping[str, Array | None]


@dataclass(frozen=True)
class Format:
    """`bits` of a weight (32: float32, 16: bfloat16); `group` weights along the input share a scale (8 and 4 bits).
    cache: type of keys and values."""

    name: str
    bits: int
    cache: str
    group: int = 0

    def linear(self, matrix: Matrix) -> tuple[str, Weights, dict[str, Any]]:
        """(operator, operands after x by name, attributes) of a product with the matrix."""
        return "Linear", {"weight": joined(matrix)}, {}

    def stack(self, weights: Sequence[Array]) -> Array:
        """Weights [out, in] of experts as [expert, in, out]."""
        return np.stack([np.asarray(weight, np.float32).T for weight in weights])

    def table(self, array: Array) -> Array:
        """A table that rows are gathered from."""
        return np.asarray(array, np.float32)


FORMATS = {
    "fp32": Format("fp32", 32, "float32"),
}


def format_of(name: str) -> Format:
    """The format of a name; ConfigError for an unknown one."""
    if name not in FORMATS:
        raise ConfigError(f"precision {name!r} is not known for language models; use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def joined(matrix: Matrix) -> Array:
    """The weights side by side as float32 [in, out]."""
    parts = [np.asarray(w, np.float32) if matrix.transposed else np.asarray(w, np.float32).T for w in matrix.weights]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

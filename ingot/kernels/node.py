"""What a kernel sees of a graph node: typed ports, static attributes, the epilogue. No onnx in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ingot.dtypes import size_of
from ingot.ir.expression import IDENTITY, Expression
from ingot.plan.extent import Extent, product


@dataclass(frozen=True, eq=False)
class Port:
    """One operand: dtype by numpy name, row-major shape, `constant` when known at build time.

    layout "plain": row-major. "blocked": [N, ceil(C/b), *spatial, b] with b = isa.lanes; the lanes beyond C hold
    anything. "channels_last": [N, *spatial, C].

    given: one of the run's inputs, there before its first launch; no launch but a stateful operator's writes it.
    """

    dtype: str
    shape: tuple[Extent, ...]
    constant: np.ndarray[Any, Any] | None = None
    layout: str = "plain"
    given: bool = False

    @property
    def elements(self) -> Extent:
        """Product of the shape."""
        return product(self.shape)

    @property
    def static(self) -> bool:
        """Whether every extent is known at build time."""
        return all(isinstance(d, int) for d in self.shape)

    @property
    def bytes(self) -> Extent:
        """Size of the row-major form."""
        return product((*self.shape, size_of(self.dtype)))


@dataclass(frozen=True, eq=False)
class Node:
    """A canonical op with its ports. `epilogue` is the parsed epilogue, or the Pointwise expression itself."""

    op: str
    inputs: tuple[Port | None, ...]
    outputs: tuple[Port, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    epilogue: Expression = IDENTITY
    name: str = ""
    origins: tuple[str, ...] = ()

    def input(self, index: int) -> Port:
        """Input `index`, which must be present."""
        port = self.inputs[index] if index < len(self.inputs) else None
        if port is None:
            raise IndexError(f"{self.op} has no input {index}")
        return port

    def has_input(self, index: int) -> bool:
        """Whether input `index` is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    @property
    def dtype(self) -> str:
        """dtype of the first input (of the first output when there is none)."""
        return self.inputs[0].dtype if self.inputs and self.inputs[0] else self.outputs[0].dtype

    @property
    def output(self) -> Port:
        """The first output."""
        return self.outputs[0]

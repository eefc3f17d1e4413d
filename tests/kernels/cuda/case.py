"""One node that CUDA kernels are checked on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ingot.kernels.node import Node, Port
from tests.kernels.harness import node_of

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """One node with inputs; `large` ones are for a GPU alone."""

    name: str
    op: str
    shapes: Sequence[tuple[int, ...] | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    epilogue: str = ""
    constants: Sequence[int] = ()
    dtype: str = "float32"
    large: bool = False
    draw: Callable[[np.random.Generator, int, tuple[int, ...]], Array] | None = None

    def inputs(self) -> list[Array | None]:
        """Drawn from the case's own seed."""
        rng = np.random.default_rng(len(self.name))
        return [None if shape is None else self._drawn(rng, index, shape) for index, shape in enumerate(self.shapes)]

    def _drawn(self, rng: np.random.Generator, index: int, shape: tuple[int, ...]) -> Array:
        x = np.asarray(self.draw(rng, index, shape) if self.draw else rng.standard_normal(shape))
        return x if x.dtype != np.float64 else np.asarray(x * self._scale(index, shape)).astype(self.dtype)

    def _scale(self, index: int, shape: tuple[int, ...]) -> float:
        """Weights keep sums of order one."""
        depths = {"Conv": shape[1:], "Linear": shape[:1]}
        depth = int(np.prod(depths.get(self.op, ()))) if index == 1 else 1
        return float(max(depth, 1) ** -0.5)

    @property
    def tolerance(self) -> tuple[float, float]:
        """(relative, absolute)"""
        return (2e-2, 1e-2) if self.dtype == "float16" else (1e-3, 2e-4)

    def node(self) -> tuple[Node, list[Array | None], list[Array]]:
        """(node, inputs, what is expected)"""
        inputs = self.inputs()
        if self.op == "Reorder":
            (x,) = inputs
            assert x is not None
            port = Port(self.dtype, x.shape)
            return Node("Reorder", (port,), (port,), dict(self.attributes), name="under_test"), inputs, [x]
        node, expected = node_of(self.op, inputs, self.attributes, self.epilogue, self.constants)
        return node, inputs, expected

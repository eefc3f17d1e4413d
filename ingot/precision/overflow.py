"""Which tensors would leave the range of float16 on a user's data, and what becomes of each.

Ranges are observed on the unrewritten model in float32. What a rewritten graph computes inside a step (the square
inside a norm, the sum of a product before its epilogue) is in float32 anyway; a tensor that steps hand to each other
and that does not fit stays in float32, with the steps at both its ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import onnx_ir

from ingot import passes
from ingot.ir.oracle import trace_model
from ingot.precision.half import LIMITS
from ingot.precision.metric import Answer

Range = tuple[float, float]
_SAMPLES = 8
_HEADROOM = 0.8  # samples that nobody has shown us may be larger than those we saw


@dataclass(frozen=True)
class Overflow:
    """A tensor, the user's node that makes it, what was observed; `inside`: of a step that computes it in float32."""

    value: str
    node: str
    low: float
    high: float
    inside: bool

    def __str__(self) -> str:
        fate = "computed in float32 inside a fused step" if self.inside else "kept in float32"
        return f"{self.node}: {self.value} ranges from {self.low:.4g} to {self.high:.4g}; {fate}"


def observe(model: onnx_ir.Model, samples: Iterable[Answer]) -> dict[str, Range]:
    """Smallest and largest finite number of each float32 tensor of the main graph, over the first samples."""
    inputs = [v.name or "" for v in model.graph.inputs]
    ranges: dict[str, Range] = {}
    for sample in islice(samples, _SAMPLES):
        for name, value in trace_model(model, {n: sample[n] for n in inputs}).items():
            if isinstance(value, np.ndarray) and value.dtype == np.float32 and value.size:
                ranges[name] = _joined(ranges.get(name), value)
    return ranges


def _joined(known: Range | None, value: Any) -> Range:
    finite = value[np.isfinite(value)]
    low, high = float(finite.min(initial=0.0)), float(finite.max(initial=0.0))
    return (low, high) if known is None else (min(low, known[0]), max(high, known[1]))


def find(model: onnx_ir.Model, ranges: Mapping[str, Range], dtype: str = "float16") -> list[Overflow]:
    """The tensors whose range leaves `dtype` less some headroom, in the model's order."""
    limit = _HEADROOM * LIMITS[dtype]
    beyond = {name: span for name, span in ranges.items() if max(-span[0], span[1]) > limit}
    if not beyond:
        return []
    makers = {v.name: node.name or "" for node in model.graph for v in node.outputs}
    weights = set(model.graph.initializers)
    rewritten = model.clone()
    passes.run(rewritten)
    left = {v.name for node in rewritten.graph for v in (*node.inputs, *node.outputs) if v is not None}
    return [
        Overflow(name, makers.get(name, f"input {name}"), *beyond[name], inside=name not in left)
        for name in ranges
        if name in beyond and name not in weights
    ]


def kept(found: Iterable[Overflow]) -> dict[str, Range]:
    """What `BuildConfig.overflows` takes."""
    return {o.value: (o.low, o.high) for o in found if not o.inside}

"""What runs in the child processes of a build for a GPU: compiling candidates, and timing them in graphs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ingot.errors import DeviceError
from ingot.kernels.cuda.architecture import Architecture, architecture
from ingot.kernels.cuda.compile import Cubin, compile_unit
from ingot.kernels.cuda.standalone import Standalone, generate
from ingot.kernels.node import Node
from ingot.runtime import cuda
from ingot.tune.measure import Description, candidate_of, draw, with_drawn_weights

Array = np.ndarray[Any, Any]
_RUNS = 5
_ALIKE = 3e-2  # of the largest magnitude: what candidates of one node may differ by
_COMPARED = 1 << 24  # elements of a result; of larger ones every so many


def _target(named: str) -> Architecture:
    return architecture(*named.split())


def compile_candidate(node: Node, described: Description, named: str) -> list[Cubin]:
    """The candidate's cubins, in the order of its launches."""
    target, drawn = _target(named), with_drawn_weights(node)
    build = generate(drawn, candidate_of(drawn, described, target), target)
    return [compile_unit(call.unit, target.name) for call in build.launches]


def time_candidates(
    node: Node, ready: Sequence[tuple[Description, Sequence[Cubin]]], named: str, budget: float, distant: bool
) -> list[float | str]:
    """Microseconds of each candidate, or what is wrong with its results: all must give what most of them give."""
    target, node = _target(named), with_drawn_weights(node)
    context = cuda.context_of(cuda.select("cuda"))
    feeds = [None if p is None or p.constant is not None else draw(p) for p in node.inputs]
    outcomes: list[float | str] = []
    samples: list[Array] = []
    try:
        for described, cubins in ready:
            alone = Standalone(node, candidate_of(node, described, target), target, context, cubins)
            outcomes.append(alone.time(feeds, _RUNS))
            samples.append(_sample(alone(*feeds)[0]))
    except DeviceError:
        if context.fault:  # nothing can be done with this process any more: the parent tries one by one
            os._exit(1)
        raise
    return _judged(outcomes, samples)


def _sample(result: Array) -> Array:
    step = max(result.size // _COMPARED, 1)
    return result.reshape(-1)[::step].astype(np.float32)


def _judged(outcomes: list[float | str], samples: Sequence[Array]) -> list[float | str]:
    """A candidate whose results differ from those of most others is out."""
    middle = np.median(np.stack([s[:: max(s.size // 65536, 1)] for s in samples]), axis=0)
    scale = float(np.abs(middle).max(initial=0.0)) or 1.0
    judged: list[float | str] = []
    for outcome, sample in zip(outcomes, samples, strict=True):
        thin = sample[:: max(sample.size // 65536, 1)]
        gap = float(np.abs(thin - middle).max(initial=0.0)) / scale
        judged.append(outcome if gap <= _ALIKE else f"differs from the other candidates by {gap:.1e}")
    return judged

"""Timing candidates in a child process: cold weights, warm activations, interleaved rounds, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.kernels import Candidate, Ports, kernels_for
from ingot.kernels.cpu.isa import BY_NAME
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node, Port

Array = np.ndarray[Any, Any]
Description = tuple[str, Mapping[str, Any], Ports]
_FLUSH_BYTES = 12 << 20
_LARGE = 4096
_FLUSH: list[Array] = []


def describe(candidate: Candidate) -> Description:
    """A candidate as something a pipe carries."""
    return (candidate.kernel.name, dict(candidate.tactic), candidate.ports)


def without_weights(node: Node) -> Node:
    """The node with large constants replaced by an empty array of their dtype: the child draws its own."""

    def light(port: Port | None) -> Port | None:
        if port is None or port.constant is None or port.constant.size < _LARGE:
            return port
        return replace(port, constant=np.empty(0, port.constant.dtype))

    return replace(node, inputs=tuple(light(p) for p in node.inputs))


def time_candidates(node: Node, described: Sequence[Description], isa_name: str, budget: float) -> list[float]:
    """Microseconds of each candidate on one thread. `budget`: seconds of running to spend on the whole set."""
    isa = BY_NAME[isa_name]
    node = _with_drawn_weights(node)
    entries = {k.name: k for k in kernels_for(node, "cpu", isa)}
    ready = [Standalone(node, Candidate(entries[name], tactic, ports), isa) for name, tactic, ports in described]
    feeds = [None if p is None else _draw(p) for p in node.inputs]
    for alone in ready:
        alone.bind(feeds)
        alone.run()
    samples: list[list[float]] = [[] for _ in ready]
    start = time.perf_counter()
    while len(samples[0]) < 3 or (time.perf_counter() - start < budget and len(samples[0]) < 40):
        for alone, times in zip(ready, samples, strict=True):
            times.append(_once(alone))
    return [statistics.median(times) * 1e6 for times in samples]


def _once(alone: Standalone) -> float:
    _flush()
    alone.warm_inputs()
    start = time.perf_counter()
    alone.run()
    return time.perf_counter() - start


def _flush() -> None:
    """Push weights out of the private caches."""
    if not _FLUSH:
        _FLUSH.append(np.zeros(_FLUSH_BYTES // 8))
    _FLUSH[0] += 1.0


def _with_drawn_weights(node: Node) -> Node:
    def drawn(port: Port | None) -> Port | None:
        emptied = port is not None and port.constant is not None and port.constant.shape != port.shape
        return replace(port, constant=_draw(port)) if port is not None and emptied else port

    return replace(node, inputs=tuple(drawn(p) for p in node.inputs))


def _draw(port: Port) -> Array:
    rng = np.random.default_rng(1)
    shape = tuple(int(d) for d in port.shape)
    dtype = numpy_dtype(port.dtype)
    if dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.uniform(0.25, 1.0, shape).astype(np.float32).astype(dtype)

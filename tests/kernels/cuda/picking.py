"""Which candidates a test takes, and how results are compared."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ingot.kernels import Candidate, candidates
from ingot.kernels.cpu.workers import WorkerPool
from ingot.kernels.cuda.architecture import Architecture
from ingot.kernels.cuda.standalone import generate
from ingot.kernels.node import Node
from tests.kernels.cuda.case import Case

Array = np.ndarray[Any, Any]


def picked(node: Node, target: Architecture, limit: int, only: str | None = None) -> list[Candidate]:
    """The first candidate of each choice of layouts and kernel, and up to `limit` more; there must be one."""
    found = [c for c in candidates(node, "cuda", target) if only is None or c.kernel.name == only]
    assert found, f"no kernel for {node.op} {[p and (p.dtype, p.shape) for p in node.inputs]}"
    first = {(c.kernel.name, c.ports): c for c in reversed(found)}.values()
    more = itertools.islice(found, 0, None, max(1, -(-len(found) // limit)))
    return list({id(c): c for c in (*first, *more)}.values())


def compile_ahead(cases: Sequence[Case], target: Architecture, limit: int) -> list[str]:
    """The cubins of all that is picked, on all cores, into the cache where one after the other finds them; what the
    compiler says of those that do not compile."""
    units = {}
    for case in cases:
        node, *_ = case.node()
        for candidate in picked(node, target, limit):
            for call in generate(node, candidate, target).launches:
                units[call.unit.symbol(target)] = call.unit
    with WorkerPool(os.cpu_count() or 1) as pool:
        jobs = [pool.submit("ingot.kernels.cuda.compile:compile_unit", unit, target.name) for unit in units.values()]
        return [str(error) for job in jobs if (error := job.exception())]


def compare(mine: Array, theirs: Array, rtol: float, atol: float, what: str) -> None:
    """Equal integers, floats within the tolerances."""
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, (what, mine.dtype, theirs.dtype, mine.shape,
                                                                       theirs.shape)  # fmt: skip
    if mine.dtype.kind in "biu":
        assert np.array_equal(mine, theirs), f"{what}: {(mine != theirs).sum()} of {mine.size} differ"
    else:
        np.testing.assert_allclose(mine.astype(np.float64), theirs.astype(np.float64), rtol=rtol, atol=atol,
                                   err_msg=what)  # fmt: skip

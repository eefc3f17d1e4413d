"""Checks a kernel against its op's numpy meaning: every candidate (or a drawn few), every ISA this machine has, split
ranges."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from ingot.ir.expression import parse
from ingot.ir.ops import meaning
from ingot.kernels import Candidate, candidates
from ingot.kernels.cpu.isa import AVX2, BEST_FIRST, Isa
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node, Port
from ingot.runtime.machine import cpu_features

Array = np.ndarray[Any, Any]


def isas() -> list[Isa]:
    """The best ISA of this machine and AVX2."""
    best = [isa for isa in BEST_FIRST if isa.machine <= cpu_features()][:1]
    if not best:
        pytest.skip("this machine has no AVX2")
    return [*best, *([AVX2] if best[0] is not AVX2 else [])]


def node_of(
    op: str,
    inputs: Sequence[Array | None],
    attributes: Mapping[str, Any] | None = None,
    epilogue: str = "",
    constants: Sequence[int] = (),
) -> tuple[Node, list[Array]]:
    """A node with static shapes for these inputs (those in `constants` known at build time), and its reference
    outputs."""
    attributes = dict(attributes or {})
    key = "expression" if op in ("Pointwise", "Mixture") or "Projection" in op else "epilogue"
    stated = {**attributes, **({key: epilogue} if epilogue else {})}
    expected = [np.asarray(y) for y in meaning(op)(*inputs, **stated)]
    ports = tuple(
        None if x is None else Port(x.dtype.name, x.shape, x if i in constants else None) for i, x in enumerate(inputs)
    )
    outputs = tuple(Port(y.dtype.name, y.shape) for y in expected)
    return Node(op, ports, outputs, attributes, parse(epilogue), name="under_test"), expected


def check(
    node: Node, inputs: Sequence[Array | None], expected: Sequence[Array], rtol: float = 1e-4, atol: float = 1e-5,
    limit: int = 6, only: str | None = None, level: int = 1,
) -> list[Candidate]:  # fmt: skip
    """Run up to `limit` candidates per ISA, evenly picked; fail if there is none or one differs. Returns those run."""
    ran: list[Candidate] = []
    for isa in isas():
        found = [c for c in candidates(node, "cpu", isa) if only is None or c.kernel.name == only]
        assert found, f"no kernel for {node.op} {[p and (p.dtype, p.shape) for p in node.inputs]} on {isa.name}"
        for candidate in itertools.islice(found, 0, None, max(1, -(-len(found) // limit))):
            alone = Standalone(node, candidate, isa, level=level)
            for chunks in (1, 3):
                for mine, theirs in zip(alone(*inputs, chunks=chunks), expected, strict=True):
                    what = f"{candidate.label} {candidate.ports} on {isa.name}, {chunks} chunks"
                    _compare(mine, theirs, rtol, atol + _allowed(candidate, theirs), what)
            ran.append(candidate)
    return ran


def _allowed(candidate: Candidate, expected: Array) -> float:
    """What a kernel says that it adds, relative to the largest result."""
    stated = candidate.kernel.tolerance
    assert isinstance(stated, float), "a tolerance that depends on the node: ask the kernel's error(node)"
    return 2 * stated * float(np.abs(expected.astype(np.float64)).max(initial=1.0)) if stated else 0.0


def _compare(mine: Array, theirs: Array, rtol: float, atol: float, what: str) -> None:
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, (what, mine.dtype, theirs.dtype, theirs.shape)
    if mine.dtype.kind in "biu":
        assert np.array_equal(mine, theirs), f"{what}: {(mine != theirs).sum()} of {mine.size} differ"
    else:
        wide = np.float64
        np.testing.assert_allclose(mine.astype(wide), theirs.astype(wide), rtol=rtol, atol=atol, err_msg=what)

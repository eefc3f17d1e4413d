"""Every kernel on the GPU gives what its operator means: all layouts, tiles picked evenly."""

from __future__ import annotations

import pytest

from ingot.kernels.cuda.architecture import Architecture, architecture
from ingot.kernels.cuda.standalone import Standalone
from ingot.runtime import cuda
from tests.kernels.cuda.case import Case
from tests.kernels.cuda.cases import CASES
from tests.kernels.cuda.picking import compare, compile_ahead, picked

pytestmark = pytest.mark.gpu


_LIMIT = 6  # candidates of a case


@pytest.fixture(scope="module")
def target() -> Architecture:
    """The GPU's, for which everything is compiled on all cores."""
    found = architecture(f"sm_{cuda.select('cuda').capability}")
    assert compile_ahead(CASES, found, _LIMIT) == []
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel(case: Case, target: Architecture) -> None:
    context = cuda.context_of(cuda.select("cuda"))
    node, inputs, expected = case.node()
    for candidate in picked(node, target, _LIMIT):
        mine = Standalone(node, candidate, target, context)(*inputs)
        for y, wanted in zip(mine, expected, strict=True):
            compare(y, wanted, *case.tolerance, f"{candidate.label} {candidate.ports}")

"""Every kernel on the GPU gives what its operator means: all layouts, tiles picked evenly."""

from __future__ import annotations

import pytest

from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.standalone import Standalone
from ingot.runtime import cuda
from tests.kernels.cuda.case import Case
from tests.kernels.cuda.cases import CASES
from tests.kernels.cuda.picking import compare, picked

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel(case: Case) -> None:
    device = cuda.select("cuda")
    target, context = architecture(f"sm_{device.capability}"), cuda.context_of(device)
    node, inputs, expected = case.node()
    for candidate in picked(node, target, limit=6):
        mine = Standalone(node, candidate, target, context)(*inputs)
        for y, wanted in zip(mine, expected, strict=True):
            compare(y, wanted, *case.tolerance, f"{candidate.label} {candidate.ports}")

"""Every kernel, interpreted, gives what its operator means."""

from __future__ import annotations

import pytest

from tests.kernels.cuda.case import Case
from tests.kernels.cuda.cases import CASES

SMALL = [case for case in CASES if not case.large]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_kernel(case: Case) -> None:
    from tests.kernels.cuda.harness import check

    node, inputs, expected = case.node()
    relative, absolute = case.tolerance
    check(node, inputs, expected, relative, absolute, limit=3)

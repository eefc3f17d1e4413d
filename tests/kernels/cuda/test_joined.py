"""Products whose depth is split: the parts are added by a second launch, or by the last block of a tile."""

from __future__ import annotations

import numpy as np
import pytest

from ingot.kernels import candidates
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.standalone import generate
from tests.kernels.cuda.case import Case
from tests.kernels.cuda.picking import compare

FLAT = {"x_zero_point": 0, "weight_zero_point": 0}
BIASED = "Add %0 %1 -> float32"
CASES = (
    Case("Linear", "Linear", [(20, 512), (512, 40), (40,)], FLAT, BIASED, (1, 2)),
    Case("ParallelLinear", "ParallelLinear", [(20, 512), (512, 40), (40,)], {"sizes": (24, 16)}, "", (1, 2)),
    Case("MatMul", "MatMul", [(2, 20, 512), (2, 512, 40)], {**FLAT, "transpose_a": 0, "transpose_b": 0}),
)


@pytest.mark.parametrize("join", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_split(case: Case, join: int) -> None:
    from tests.kernels.cuda.harness import interpreted

    target = architecture("sm_90")
    node, inputs, expected = case.node()
    split = [c for c in candidates(node, "cuda", target) if c.tactic["split"] == 4 and c.tactic["join"] == join]
    build = generate(node, split[0], target)
    assert len(build.launches) == 2 - join
    for mine, wanted in zip(interpreted(build, inputs, {}), expected, strict=True):
        compare(mine, np.asarray(wanted), 1e-3, 2e-4, split[0].label)

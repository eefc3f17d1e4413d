"""cuBLASLt and cuDNN on the GPU give what an operator means, in every layout, plan by plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ingot.errors import LibraryUnusable
from ingot.kernels import candidates
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.standalone import Standalone
from ingot.runtime import cuda, library
from ingot.tune import draws
from ingot.tune.expected import ALIKE, expected
from tests.kernels.harness import node_of

pytestmark = pytest.mark.gpu
WINDOW = {"strides": (1, 1), "pads": (1,) * 4, "dilations": (1, 1), "group": 1}
ONE = {**WINDOW, "pads": (0,) * 4}
ATTENTION = {"scale": 0.158, "causal": 0, "softcap": 0.0}
SUM = "Cast %0 -> float32; Cast %1 -> float32; Add $0 $1 -> float32"
MORE = f"{SUM}; Cast %2 -> float32; Add $2 $3 -> float32; Cast $4 -> float16"
IMAGE, SQUARE = (1, 320, 24, 24), (320, 320, 3, 3)
Shapes = Sequence[tuple[int, ...]]
HEADS: Shapes = [(4, 12, 128, 64)] * 3
CASES: dict[str, tuple[str, Shapes, dict[str, Any], str, tuple[int, ...]]] = {
    "relu": ("Conv", [IMAGE, SQUARE, (320, 1, 1)], WINDOW, f"{SUM}; Relu $2 -> float32; Cast $3 -> float16", (1, 2)),
    "silu": ("Conv", [IMAGE, SQUARE, (320, 1, 1)], WINDOW,
             f"{SUM}; Sigmoid $2 -> float32; Mul $2 $3 -> float32; Cast $4 -> float16", (1, 2)),
    "given by channel": ("Conv", [IMAGE, SQUARE, (320, 1, 1), (1, 320, 1, 1)], WINDOW, MORE, (1, 2)),
    "residual": ("Conv", [IMAGE, SQUARE, (320, 1, 1), IMAGE], WINDOW, MORE, (1, 2)),
    "one tap": ("Conv", [IMAGE, (320, 320, 1, 1), (320, 1, 1)], ONE, f"{SUM}; Cast $2 -> float16", (1, 2)),
    "attention": ("Attention", [(1, 8, 1024, 40)] * 3, ATTENTION, "", ()),
    "attention to a text": ("Attention", [(1, 8, 1024, 40), (1, 8, 77, 40), (1, 8, 77, 40)], ATTENTION, "", ()),
    "masked attention": ("Attention", [*HEADS, (4, 1, 1, 128)], ATTENTION, "", ()),
    "linear": ("Linear", [(512, 320), (320, 640), (640,), (512, 640)], {}, MORE, (1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_library(case: str) -> None:
    device = cuda.select("cuda")
    target = architecture(f"sm_{device.capability}", "fp16", library.installed(("cublaslt", "cudnn")))
    op, shapes, attributes, text, constants = CASES[case]
    drawn, _ = node_of(op, [np.zeros(s, np.float16) for s in shapes], attributes, text, constants=constants)
    numbers = [draws.number(drawn, k) for k in range(len(shapes))]
    node, _ = node_of(op, numbers, attributes, text, constants=constants)
    feeds = draws.feeds(node)
    wanted, found = expected(node, feeds), [c for c in candidates(node, "cuda", target) if c.kernel.library]
    if not found:
        pytest.skip("no library has anything for it here")
    for candidate in found:
        try:
            alone = Standalone(node, candidate, target, cuda.context_of(device))
        except LibraryUnusable:  # a plan that its library proposes need not build
            continue
        gap = wanted.gap(alone(*feeds))
        assert gap <= ALIKE, f"{candidate.label} {candidate.ports} is wrong by {gap:.1e}"

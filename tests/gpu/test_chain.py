"""A layer's products in one launch, again and again: what one launch leaves behind the next one begins with."""

from __future__ import annotations

import numpy as np
import pytest

from ingot.kernels import candidates
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.standalone import Standalone
from ingot.kernels.node import Node
from ingot.runtime import cuda
from tests.kernels.cuda.test_chain import BF, layer, results_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("wide", "inner"), [(3072, 9216), (4096, 4096)])
def test_a_chain_gives_what_its_products_mean(wide: int, inner: int) -> None:
    device = cuda.select("cuda")
    target = architecture(f"sm_{device.capability}")
    if not target.hosts_two:
        pytest.skip("this GPU has no chains")
    rng = np.random.default_rng(wide)
    nodes, chain = layer(wide, inner, wide + 2048, rng)
    (candidate,) = candidates(chain, "cuda", target)
    compute = Standalone(chain, candidate, target, cuda.context_of(device))
    assert [call.unit.together for call in compute.build.launches] == [True]
    for _ in range(5):
        row, added = ((rng.standard_normal((1, wide)) * 3).astype(BF) for _ in range(2))
        wanted = results_of(nodes, row[0], added[0])
        for mine, theirs in zip(compute(*_inputs(chain, row, added)), (wanted[2], wanted[3]), strict=True):
            apart = np.linalg.norm(mine[0].astype(np.float64) - theirs.astype(np.float64))
            assert apart < 4e-3 * np.linalg.norm(theirs.astype(np.float64))


def _inputs(chain: Node, row: np.ndarray, added: np.ndarray) -> list[np.ndarray | None]:
    """The row, constants, what is added to the first product."""
    given: list[np.ndarray | None] = [port.constant if port is not None else None for port in chain.inputs]
    varying = [k for k, array in enumerate(given) if array is None]
    given[varying[0]], given[varying[1]] = row, added
    return given

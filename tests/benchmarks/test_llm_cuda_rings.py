"""Rings compile for an H200 without one, have room beside each other, and find weights where bricks have them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks.llm_cuda_rings import Ring, bricks, parted
from ingot.dtypes import numpy_dtype
from ingot.kernels.cpu.workers import WorkerPool
from ingot.kernels.cuda.compile import Cubin
from tests.kernels.cuda.ptx import Module

HALF = 113 << 10  # bytes of shared memory of which a processor has twice as many
GATED = Ring(528, 1152, 2, True, blocks=33)


def _compiled(ring: Ring) -> tuple[Cubin, str]:
    """In a child: a process that interprets Triton cannot compile Gluon."""
    with WorkerPool(1) as pool:
        return pool.submit("benchmarks.llm_cuda_rings:compiled", ring).result()


@pytest.mark.parametrize("barriers", [False, True])
def test_a_ring_compiles_and_its_slots_come_first(barriers: bool) -> None:
    ring = Ring(528, 1152, 2, True, slots=5, barriers=barriers)
    made, ptx = _compiled(ring)
    assert made.threads == 512 and ring.slots * ring.slot < made.shared < HALF
    assert ptx.count("mma.sync") >= 4 * ring.parts and "griddepcontrol.wait" in ptx
    offsets = [int(found) for found in re.findall(r"global_smem\+(\d+)", ptx)]
    assert barriers or (offsets and min(offsets) >= ring.slots * ring.slot)


def test_bricks_have_what_lanes_ask_for() -> None:
    """By the addresses that the kernel computes: part, tile, brick, half of the columns, lane, byte."""
    columns, depth, parts = 32, 192, 2
    weight = np.arange(parts * columns * depth, dtype=np.int64).reshape(depth, parts * columns).astype(np.uint8)
    flat = bricks(weight, parts).reshape(-1)
    rng = np.random.default_rng(0)
    for _ in range(200):
        part, tile, brick, half, lane, byte = (int(rng.integers(n)) for n in (parts, 2, 3, 2, 32, 16))
        word = ((part * 2 + tile) * 3 + brick) * 256 + half * 128 + lane * 4
        column = part * columns + tile * 16 + half * 8 + lane // 4
        assert flat[4 * word + byte] == weight[brick * 64 + lane % 4 * 16 + byte, column]


def _block(ring: Ring, ptx: str, shared: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """What a block of a gated product writes, and what numpy says."""
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((ring.depth, 2 * ring.columns)) * 0.1).astype(numpy_dtype("float8_e4m3fn"))
    scales = rng.uniform(0.5, 1.5, ring.depth).astype(np.float32)
    x = (rng.standard_normal(ring.depth) * 30).astype(numpy_dtype("bfloat16"))
    y = np.full(ring.columns, np.nan, x.dtype)
    given = {"x": x, "weights": bricks(weight, 2), "scales": parted(scales), "y": y}
    Module(ptx).run(block, [given[name].reshape(-1).view(np.uint8) for name in ring.operands], shared)
    wide = x.astype(np.float64)
    sums = wide / np.sqrt((wide * wide).mean() + 1e-5) * scales @ weight.astype(np.float64)
    left, right = sums[: ring.columns], sums[ring.columns :]
    columns = np.arange(16 * block, 16 * block + 16)
    assert np.isnan(np.delete(y.astype(np.float32), columns)).all()
    return y[columns].astype(np.float64), (left / (1 + np.exp(-left)) * right)[columns]


def test_free_threads_compute_the_product() -> None:
    """Its PTX, every thread, copies that arrive as late as they may."""
    made, ptx = _compiled(GATED)
    y, wanted = _block(GATED, ptx, made.shared, 32)
    np.testing.assert_allclose(y, wanted, rtol=8e-3, atol=1e-3)


def test_a_wait_for_one_round_too_few_is_found() -> None:
    made, ptx = _compiled(GATED)
    with pytest.raises(AssertionError, match="still under way"):
        _block(GATED, ptx.replace("wait_group 3;", "wait_group 4;"), made.shared, 0)

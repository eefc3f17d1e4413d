"""Rings compile for an H200 without one, have room beside each other, and find weights where bricks have them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks.llm_cuda_rings import Ring, bricks, compiled

HALF = 113 << 10  # bytes of shared memory of which a processor has twice as many


@pytest.mark.parametrize("barriers", [False, True])
def test_a_ring_compiles_and_its_slots_come_first(barriers: bool) -> None:
    ring = Ring(528, 1152, 2, True, slots=5, barriers=barriers)
    made, ptx = compiled(ring)
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

"""Attention of heads as wide as checkpoints have them fits the shared memory of every kind of GPU, float32 too."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingot.ir.expression import parse
from ingot.kernels.cpu.workers import WorkerPool
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.build import CudaBuilder, Unit
from ingot.kernels.cuda.paged_attention import paged_attention
from ingot.kernels.node import Node, Port
from ingot.runtime.cpu import usable_threads

ROOT = Path(__file__).parent.parent.parent.parent
TOKENS = 512


def launches(dtype: str, depth: int, name: str) -> list[Unit]:
    """Of tokens that are alone, and of those that follow each other."""
    query, cache = Port(dtype, (TOKENS, 8, depth)), Port(dtype, ("P", 2, 4, 16 * depth))
    facts = Port("int32", (TOKENS,))
    attributes = {"scale": depth**-0.5, "window": 0, "softcap": 0.0}
    node = Node("PagedAttention", (query, cache, facts, facts, Port("int32", ("S", "W"))), (query,), attributes,
                parse(""), name="under_test")  # fmt: skip
    build = CudaBuilder(node, architecture(name))
    paged_attention(build, node)
    return [call.unit for call in build.launches]


@pytest.mark.parametrize(("dtype", "depth", "name"), [
    ("float32", 128, "sm_90"), ("float32", 256, "sm_90"), ("bfloat16", 256, "sm_89"),
])  # fmt: skip
def test_attention_fits(dtype: str, depth: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """compile_unit refuses what asks for more than there is."""
    monkeypatch.setenv("INGOT_CACHE", str(ROOT / "build"))
    units = launches(dtype, depth, name)
    with WorkerPool(usable_threads()) as pool:
        jobs = [pool.submit("ingot.kernels.cuda.compile:compile_unit", unit, name) for unit in units]
        assert len(jobs) == 2 and all(job.result().shared <= architecture(name).shared for job in jobs)


def test_other_tiles_are_as_they_were() -> None:
    """Depths of bfloat16 on a GPU with much memory, and narrow heads of float32, need no smaller tiles."""
    for dtype, depth in (("bfloat16", 256), ("bfloat16", 128), ("float32", 64)):
        assert [(unit.warps, unit.stages) for unit in launches(dtype, depth, "sm_90")] == [(4, 2), (8, 2)]

"""The form of attention of one token that benchmarks.llm_cuda_lone times: right by the interpreter, and it compiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import llm_cuda_lone, llm_cuda_lone_form
from ingot.dtypes import numpy_dtype
from ingot.kernels import candidates
from ingot.kernels.cpu.workers import WorkerPool
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.standalone import generate
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.runner import EngineRunner
from ingot.plan.plan import GraphSegment
from tests.kernels.cuda.test_paged import BLOCK, batch, checked, spoil
from tests.llm import interpreted
from tests.llm.checkpoints import LOGITS, TOKENS, write_family
from tests.llm.test_families import batch_of


@pytest.mark.parametrize(("parts", "joined"), [(2, 32), (8, 4)])
@pytest.mark.parametrize(("before", "padding"), [(37, 0), (0, 0), (64, 0), (7 * BLOCK + 9, 0), (0, 1)])
@pytest.mark.parametrize(("dtype", "kept", "heads", "depth", "window", "softcap"),
                         [("float32", "float32", 4, 32, 0, 0.0), ("bfloat16", "bfloat16", 6, 24, 20, 0.0),
                          ("bfloat16", "float8_e4m3fn", 6, 24, 20, 5.0)])  # fmt: skip
def test_one_token(dtype: str, kept: str, heads: int, depth: int, window: int, softcap: float, before: int,
                   padding: int, parts: int, joined: int, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(llm_cuda_lone_form, "_PARTS", parts)
    monkeypatch.setattr(llm_cuda_lone_form, "_JOINED", joined)
    rng = np.random.default_rng(before)
    positions, owners, tables = batch(rng, [(before, 1 - padding)], padding)
    query = rng.standard_normal((1, heads, depth)).astype(numpy_dtype(dtype))
    cache = rng.standard_normal((tables.size, 2, 2, BLOCK * depth)).astype(numpy_dtype(kept))
    spoil(cache, positions, owners, tables, depth, 0)
    attributes = {"scale": depth**-0.5, "window": window, "softcap": softcap}
    with llm_cuda_lone_form.lone_attention():
        checked("PagedAttention", [query, cache, positions, owners, tables], attributes, {0: "T", 2: "T", 3: "T"}, (),
                1e-4 if dtype == "float32" else 3e-2)  # fmt: skip


@pytest.mark.parametrize("kept", ["bfloat16", "float8_e4m3fn"])
def test_it_compiles_without_spills(kept: str) -> None:
    x, target = llm_cuda_lone.drawn(kept, 512), architecture("sm_90")
    read = [x[name] for name in ("query", "cache", "positions", "owners", "tables")]
    node = llm_cuda_lone.node_of("PagedAttention", read, [x["query"]], llm_cuda_lone.ATTENTION)
    with llm_cuda_lone_form.lone_attention():
        (launch,) = generate(node, next(candidates(node, "cuda", target)), target).launches
    assert launch.unit.warps == 1
    with WorkerPool(1) as pool:
        made = pool.submit("ingot.kernels.cuda.compile:compile_unit", launch.unit, "sm_90").result()
    assert made.spilled == 0 and made.registers <= 168 and made.shared <= 16 << 10


def test_an_engine_of_it_gives_a_familys_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token; all layers hand over by the same words, which each leaves zero."""
    interpreted.use(monkeypatch)
    monkeypatch.setattr(llm_cuda_lone_form, "_LARGE", 1)
    options = BuildOptions("fp32", "cuda:sm_90", context=64, token_budget=16, sequence_budget=2, level=0)
    with llm_cuda_lone_form.lone_attention():
        runner = EngineRunner(build_llm(write_family(tmp_path, "llama"), options))
    with np.load(LOGITS) as known:
        expected = known["llama"]
    for place in range(4):
        found = runner.step(batch_of(runner, [(1, place, TOKENS[place : place + 1])]))
        assert np.abs(found[0] - expected[place]).max() < 5e-4
    (segment,) = runner.session.plan.segments
    assert isinstance(segment, GraphSegment)
    steps = [number for number, step in enumerate(segment.steps) if step.kernel == "paged_attention"]
    touched = [set(next(launch for launch in segment.launches if launch.step == number).pointers) for number in steps]
    assert len(steps) > 1 and len(set.intersection(*touched)) == 5  # positions, owners, tables; results and weights

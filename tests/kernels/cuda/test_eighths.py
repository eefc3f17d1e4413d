"""Attention to keys of eight bits: no byte is loaded by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ingot.ir.expression import parse
from ingot.kernels.cpu.workers import WorkerPool
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.build import NATIVE, OVERLAP, CudaBuilder, Unit
from ingot.kernels.cuda.paged_attention import paged_attention
from ingot.kernels.node import Node, Port


def attending(tokens: int) -> Unit:
    """The first launch for tokens that are alone, of the heads of a Llama of eight billions."""
    query, cache = Port("bfloat16", (tokens, 32, 128)), Port("float8_e4m3fn", ("P", 2, 8, 16 * 128))
    facts = Port("int32", (tokens,))
    attributes = {"scale": 128**-0.5, "window": 0, "softcap": 0.0}
    node = Node("PagedAttention", (query, cache, facts, facts, Port("int32", ("S", "W"))), (query,), attributes,
                parse(""), name="under_test")  # fmt: skip
    build = CudaBuilder(node, architecture("sm_90"))
    paged_attention(build, node)
    return build.launches[0].unit


def instructions(unit: Unit, folder: str) -> str:
    """As the build compiles it; in a child, because Triton decides at its import whether it interprets."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ingot.kernels.cuda.compile import load

    function = load(replace(unit, text=unit.text.replace(NATIVE, "").replace(OVERLAP, "")))
    pointers = [i for i, (_, kind) in enumerate(unit.signature) if kind[0] == "*"]
    source = ASTSource(fn=function, signature=dict(unit.signature), constexprs={},
                       attrs={(i,): [["tt.divisibility", 16]] for i in pointers})  # fmt: skip
    knobs.cache.dir = folder
    options = {"num_warps": unit.warps, "num_stages": unit.stages}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


@pytest.mark.parametrize("tokens", [1, 512])
def test_keys_are_taken_apart_in_registers(tokens: int, tmp_path: Path) -> None:
    with WorkerPool(1) as pool:
        job = pool.submit("tests.kernels.cuda.test_eighths:instructions", attending(tokens), str(tmp_path))
        words = job.result()
    assert "ldmatrix.sync.aligned.m8n8.x4.trans" in words and "cvt.rn.f16x2.e4m3x2" in words
    assert not [line for line in words.splitlines() if "ld.shared" in line and (".b8" in line or ".u8" in line)]
    assert "cp.async.cg.shared.global" in words, "sixteen bytes at a time"

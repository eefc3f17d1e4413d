"""Chains of products in one launch: values of their PTX, blocks by turns in a random order; room on a processor."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ingot.dtypes import numpy_dtype
from ingot.ir.expression import parse
from ingot.kernels.cpu.workers import WorkerPool
from ingot.kernels.cuda import projection_chain
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.build import CudaBuilder, Handle
from ingot.kernels.cuda.compile import Cubin
from ingot.kernels.cuda.projection_chain import Link, chain
from ingot.kernels.cuda.projection_ring import bricks
from ingot.kernels.node import Node, Port
from tests.kernels.cuda.ptx import Module

Array = np.ndarray
BF, F8 = numpy_dtype("bfloat16"), numpy_dtype("float8_e4m3fn")
GATED = "Sigmoid %0 -> float32; Mul $0 %0 -> float32; Mul $1 %1 -> float32; Cast $2 -> bfloat16"
JOINED = "Cast %1 -> float32; Add %0 $0 -> float32; Cast $1 -> bfloat16"
PLAIN = "Cast %0 -> bfloat16"


def _nodes(wide: int, inner: int, last: int, rng: np.random.Generator, stored: bool = True) -> list[Node]:
    """output, gate, down, projection of a layer."""
    made = []
    for depth, columns, parts, text in ((wide, wide, 1, JOINED), (wide, inner, 2, GATED), (inner, wide, 1, JOINED),
                                        (wide, last, 1, PLAIN)):  # fmt: skip
        normed = text is not JOINED
        shape = (parts * columns, depth)
        weight = (rng.standard_normal(shape) / depth**0.5 if stored else np.zeros(shape)).astype(F8).T
        scale = rng.uniform(0.5, 1.5, depth).astype(np.float32)
        ports = [Port("bfloat16", (1, depth)), Port("float8_e4m3fn", weight.shape, weight),
                 Port("float32", (depth,), scale) if normed else None]  # fmt: skip
        ports += [Port("bfloat16", (1, columns))] * (text is JOINED)
        made.append(Node("Projection", tuple(ports), (Port("bfloat16", (1, columns)),),
                         {"parts": parts, "epsilon": 1e-5, "expression": text, "early": 1}, parse(text)))  # fmt: skip
    return made


def layer(wide: int, inner: int, last: int, rng: np.random.Generator) -> tuple[list[Node], Node]:
    """The products, and the ProjectionChain that they are: inputs that vary are the row and the residual."""
    nodes = _nodes(wide, inner, last, rng)
    inputs = [nodes[0].input(0)]
    for k, node in enumerate(nodes):
        inputs += [node.input(1), *([node.input(2)] if node.has_input(2) else []), *([node.input(3)] if k == 0 else [])]
    of_each = [node.attributes for node in nodes]
    stated = {"parts": [a["parts"] for a in of_each], "norms": [int(node.has_input(2)) for node in nodes],
              "epsilons": [1e-5] * 4, "expressions": [a["expression"] for a in of_each], "reads": [1, 0, 1, 0],
              "sources": [-1, 0], "results": [2, 3], "early": 1}  # fmt: skip
    return nodes, Node("ProjectionChain", tuple(inputs), (nodes[2].output, nodes[3].output), stated, name="layer")


def _built(nodes: list[Node], blocks: int) -> CudaBuilder:
    """Input 0 is the row, input 3 the residual; outputs are down's and the projection's results."""
    build = CudaBuilder(nodes[0], replace(architecture("sm_90"), processors=blocks))
    links = list[Link]()
    for k, node in enumerate(nodes):
        weight = node.input(1).constant
        assert weight is not None
        joined: dict[int, Handle | int] = {3: Handle("input", 3, "bfloat16") if k == 0 else 0} if k in (0, 2) else {}
        output = Handle("output", k // 2 - 1 if k == 2 else 1, "bfloat16") if k >= 2 else None
        links.append(Link(node, build.pack(bricks(weight, int(node.attributes["parts"]))), joined, output))
    chain(build, Handle("input", 0, "bfloat16"), links)
    return build


def _compiled(build: CudaBuilder) -> tuple[Cubin, str]:
    """In a child: what interprets here would not let Gluon compile."""
    (call,) = build.launches
    with WorkerPool(1) as pool:
        return pool.submit("ingot.kernels.cuda.compile:assembled", call.unit, 90).result()


def results_of(nodes: list[Node], row: Array, added: Array) -> list[Array]:
    """All results, bfloat16 between products."""
    found = list[Array]()
    for node in nodes:
        x = (found[-1] if found else row).astype(np.float64)
        weight = node.input(1).constant
        assert weight is not None
        if node.has_input(2):
            x = x / np.sqrt((x * x).mean() + 1e-5) * node.input(2).constant
        y = x @ weight.astype(np.float64)
        if node.attributes["parts"] == 2:
            a, b = np.split(y, 2)
            y = a / (1 + np.exp(-a)) * b
        if len(node.inputs) > 3:
            y = y + (found[0] if found else added).astype(np.float64)
        found.append(y.astype(BF))
    return found


@pytest.mark.parametrize(("blocks", "there", "inner"), [(2, 2, 256), (3, 2, 768)])
def test_a_chains_ptx_computes_all_products_whatever_block_is_ahead(
    blocks: int, there: int, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection_chain, "WARPS", 4)
    monkeypatch.setattr(projection_chain, "_HELD", 2)
    rng, wide = np.random.default_rng(blocks), 256
    nodes = _nodes(wide, inner, 64, rng)
    build = _built(nodes, blocks)
    made, text = _compiled(build)
    (call,) = build.launches
    row, added = ((rng.standard_normal(wide) * 3).astype(BF) for _ in range(2))
    results = [np.full(n, np.nan, BF) for n in (wide, 64)]
    counters = [np.zeros(size, np.uint8) for size in build.counters]
    held: dict[str, Any] = {"constant": build.constants, "input": {0: row, 3: added}, "output": results,
                            "counter": counters}  # fmt: skip
    arguments = [held[h.kind][h.index].reshape(-1).view(np.uint8)
                 for h in call.handles]  # fmt: skip
    for h, a in zip(call.handles, arguments, strict=True):
        assert h.kind in ("constant", "input") or np.shares_memory(a, held[h.kind][h.index])
    wanted = results_of(nodes, row, added)
    for time in range(blocks + 1 if blocks == there else 2):
        for result in results:
            result[:] = np.nan
        if time == 2:  # a row that is no number travels as any other
            row[5] = np.nan
            wanted = results_of(nodes, row, added)
        Module(text).run_together(there, arguments, made.shared, random.Random(time))
        for mine, theirs in zip(results, (wanted[2], wanted[3]), strict=True):
            apart = mine.astype(np.float64) - theirs.astype(np.float64)
            assert np.linalg.norm(apart) < 4e-3 * np.linalg.norm(theirs.astype(np.float64)) or np.isnan(theirs).all()
            assert (np.isnan(mine) == np.isnan(theirs)).all()
        words, turns = counters[0].view(np.int16).reshape(2, -1), counters[1].view(np.int32)
        assert not words[1 - time % 2].any() and words[time % 2].all()
        assert (turns[:there] == 1 - time % 2).all() and not turns[there:].any()


def test_a_chain_leaves_room_for_attention() -> None:
    made, text = _compiled(_built(_nodes(4096, 14336, 6144, np.random.default_rng(0), False), 132))
    assert made.spilled == 0 and made.threads == 512 and made.registers <= 96
    assert made.shared + (38 << 10) + (2 << 10) <= 228 << 10
    assert "membar" not in text and "fence" not in text and "acq" not in text

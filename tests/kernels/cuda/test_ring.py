"""Rings of one row: values of their PTX, room for two beside each other, tiles of more rows over bricks."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from ingot.dtypes import numpy_dtype
from ingot.ir.expression import parse
from ingot.ir.ops import meaning
from ingot.kernels import Candidate, candidates
from ingot.kernels.cpu.workers import WorkerPool
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.build import Unit
from ingot.kernels.cuda.compile import Cubin, beside
from ingot.kernels.cuda.projection import RING
from ingot.kernels.cuda.projection_ring import bricks
from ingot.kernels.cuda.standalone import generate
from ingot.kernels.node import Node, Port
from ingot.runtime.cubins import Code, pack, unpack
from tests.kernels.cuda.harness import interpreted
from tests.kernels.cuda.ptx import Module

Array = np.ndarray
PROCESSOR, RESERVED, REGISTERS = 228 << 10, 1 << 10, 1 << 16
GATED = "Sigmoid %0 -> float32; Mul $0 %0 -> float32; Mul $1 %1 -> float32; Mul $2 %2 -> float32; Cast $3 -> {}"
JOINED = "Cast %1 -> float32; Add %0 $0 -> float32; Cast $1 -> {}"
LLAMA = {"projection": (4096, 6144, 1, True), "output": (4096, 4096, 1, False), "gate": (4096, 14336, 2, True),
         "down": (14336, 4096, 1, False)}  # fmt: skip


def _node(kept: str, dtype: str, depth: int, columns: int, parts: int,
          rows: int = 1) -> tuple[Node, list[Array | None], Array]:  # fmt: skip
    """A gated product with a norm and scales of columns, or one that a residual is added to; inputs and the result."""
    rng = np.random.default_rng(depth + columns)
    x = (rng.standard_normal((rows, depth)) * 30).astype(numpy_dtype(dtype))
    x[:, ::97] *= np.asarray(64, x.dtype)
    weight = (rng.standard_normal((depth, parts * columns)) * 0.1).astype(numpy_dtype(kept))
    if parts == 2:
        inputs = [x, weight, *(rng.uniform(0.5, 1.5, size).astype(np.float32) for size in (depth, columns))]
    else:
        inputs = [x, weight, None, rng.standard_normal((rows, columns)).astype(x.dtype)]
    stated = {
        "parts": parts,
        "epsilon": 1e-5,
        "expression": (GATED if parts == 2 else JOINED).format(dtype),
        "early": 1,
    }
    (y,) = (np.asarray(y) for y in meaning("Projection")(*inputs, **stated))
    constants = (1, 2, 3) if parts == 2 else (1,)
    ports = tuple(None if a is None else Port(a.dtype.name, a.shape, a if k in constants else None)
                  for k, a in enumerate(inputs))  # fmt: skip
    return Node("Projection", ports, (Port(dtype, y.shape),), stated, parse(stated["expression"])), inputs, y


def _compiled(unit: Unit) -> tuple[Cubin, str]:
    """In a child: what interprets here would not let Gluon compile."""
    with WorkerPool(1) as pool:
        return pool.submit("ingot.kernels.cuda.compile:assembled", unit, 90).result()


def _ring(node: Node, processors: int = 132) -> tuple[Candidate, object]:
    target = replace(architecture("sm_90"), processors=processors)
    (found,) = [c for c in candidates(node, "cuda", target) if c.tactic["stream"].startswith(RING)]
    return found, target


@pytest.mark.parametrize(
    ("dtype", "depth", "columns", "parts", "stream"),
    [("bfloat16", 1088, 72, 2, ""), ("float16", 4224, 48, 1, ""), ("bfloat16", 1088, 72, 2, "ring16x5drawn"),
     ("float16", 1088, 96, 1, "ring16x2drawn")],
)  # fmt: skip
def test_a_rings_ptx_computes_the_product(dtype: str, depth: int, columns: int, parts: int, stream: str) -> None:
    """Tiles that are drawn are computed by whoever comes, each once; the counter is as it was."""
    node, inputs, wanted = _node("float8_e4m3fn", dtype, depth, columns, parts)
    candidate, target = _ring(node, processors=2)
    candidate = replace(candidate, tactic={**candidate.tactic, "stream": stream or candidate.tactic["stream"]})
    tickets = np.zeros(4, np.uint8)
    build = generate(node, candidate, target)
    (call,) = build.launches
    made, ptx = _compiled(call.unit)
    y = np.full(columns, np.nan, wanted.dtype)
    held = {"constant": lambda k: build.constants[k], "input": lambda k: inputs[k], "output": lambda k: y,
            "counter": lambda k: tickets}  # fmt: skip
    arguments = [np.ascontiguousarray(held[h.kind](h.index)).reshape(-1).view(np.uint8) for h in call.handles]
    arguments[[h.kind for h in call.handles].index("output")] = y.view(np.uint8)
    for seed in range(1 + bool(stream)):
        y[:] = np.nan
        Module(ptx).run_together(int(call.grid[0]), arguments, made.shared, random.Random(seed))
        assert not tickets.any()
    mine, theirs = y.astype(np.float64), wanted[0].astype(np.float64)
    assert np.linalg.norm(mine - theirs) < (3e-3 if dtype == "bfloat16" else 1e-3) * np.linalg.norm(theirs)


@pytest.mark.parametrize(("parts", "text"), [
    (1, "Cast %1 -> float32; Mul $0 0.5 -> float32; Add %0 $1 -> float32; Cast $2 -> bfloat16"),  # of one of two ranks
    (2, "GeluTanh %0 -> float32; Mul $0 %1 -> float32; Cast $1 -> bfloat16"),
    (2, "Gelu %0 -> float32; Mul $0 %1 -> float32; Cast $1 -> bfloat16"),
    (1, "Div %0 30.0 -> float32; Tanh $0 -> float32; Mul $1 30.0 -> float32; Cast $2 -> bfloat16"),
    (1, "Clip %0 -0.25 0.5 -> float32; Relu $0 -> float32; Cast $1 -> bfloat16"),
])  # fmt: skip
def test_what_products_are_finished_by(parts: int, text: str) -> None:
    """Numbers in expressions, functions: in Gluon as in Triton."""
    rng = np.random.default_rng(parts)
    small = 0.01 if "GeluTanh" in text else 0.3  # all lanes go one way
    x, added = ((rng.standard_normal((1, n)) * small).astype(numpy_dtype("bfloat16")) for n in (64, 16))
    weight = rng.standard_normal((64, parts * 16)).astype(numpy_dtype("float8_e4m3fn"))
    inputs = [x, weight, *([None, added] if "%1 -> float32; Mul $0 0.5" in text else [])]
    stated = {"parts": parts, "epsilon": 1e-5, "expression": text, "early": 1}
    (wanted,) = (np.asarray(y).astype(np.float64) for y in meaning("Projection")(*inputs, **stated))
    ports = tuple(None if a is None else Port(a.dtype.name, a.shape, a if a is weight else None) for a in inputs)
    node = Node("Projection", ports, (Port("bfloat16", (1, 16)),), stated, parse(text))
    candidate, target = _ring(node, processors=1)
    build = generate(node, candidate, target)
    (call,) = build.launches
    made, ptx = _compiled(call.unit)
    y = np.full(16, np.nan, x.dtype)
    held = {"constant": lambda k: build.constants[k], "input": lambda k: inputs[k], "output": lambda k: y}
    arguments = [np.ascontiguousarray(held[h.kind](h.index)).reshape(-1).view(np.uint8) for h in call.handles]
    arguments[[h.kind for h in call.handles].index("output")] = y.view(np.uint8)
    Module(ptx).run(0, arguments, made.shared)
    assert np.linalg.norm(y.astype(np.float64) - wanted[0]) < 5e-3 * np.linalg.norm(wanted)


def test_rings_of_a_layer_lie_beside_each_other_and_never_two_of_one_behind_attention() -> None:
    sizes = {}
    for name, (depth, columns, parts, normed) in LLAMA.items():
        weight = np.zeros((parts * columns, depth), numpy_dtype("float8_e4m3fn")).T
        norm = Port("float32", (depth,), np.ones(depth, np.float32)) if normed else None
        text = "Cast %0 -> bfloat16" if parts == 1 else "Mul %0 %1 -> float32; Cast $0 -> bfloat16"
        node = Node("Projection", (Port("bfloat16", (1, depth)), Port("float8_e4m3fn", weight.shape, weight), norm),
                    (Port("bfloat16", (1, columns)),),
                    {"parts": parts, "epsilon": 1e-5, "expression": text, "early": 1}, parse(text))  # fmt: skip
        candidate, target = _ring(node)
        (call,) = generate(node, candidate, target).launches
        made, ptx = _compiled(call.unit)
        assert made.spilled == 0 and call.grid == (132,) and beside(call.unit, 90)
        assert 2 * made.threads * made.registers <= REGISTERS
        assert ptx.count("bar.sync") == 2 and "global_smem+" not in ptx
        assert ptx.index("launch_dependents") < ptx.index("cp.async") < ptx.index("griddepcontrol.wait")
        sizes[name] = made.shared + RESERVED
    order = [*LLAMA, next(iter(LLAMA))]
    assert all(sizes[a] + sizes[b] <= PROCESSOR for a, b in itertools.pairwise(order))
    assert all(2 * sizes[name] > PROCESSOR for name in ("output", "down"))


@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", 5), ("float16", 150)])
def test_more_rows_find_weights_in_bricks(dtype: str, rows: int) -> None:
    symbolic, inputs, wanted = _node("float8_e4m3fn", dtype, 1088, 72, 2, rows)
    ports = (Port(dtype, ("N", 1088)), *symbolic.inputs[1:])
    node = replace(symbolic, inputs=ports, outputs=(Port(dtype, ("N", 72)),))
    candidate, target = _ring(node)
    lines = next(c for c in candidates(node, "cuda", target) if c.tactic != candidate.tactic)
    mine, theirs = (interpreted(generate(node, c, target), inputs, {"N": rows})[0].astype(np.float64)
                    for c in (candidate, lines))  # fmt: skip
    assert np.linalg.norm(mine - theirs) < 1e-3 * np.linalg.norm(theirs)
    assert np.linalg.norm(mine - wanted.astype(np.float64)) < 0.06 * np.linalg.norm(theirs)


@pytest.mark.parametrize(("rows", "early", "rings"), [(1, 1, 1), (512, 1, 0), (1, 0, 0)])
def test_rings_are_for_one_row_of_steps_that_stream(rows: int, early: int, rings: int) -> None:
    node, _, _ = _node("float8_e4m3fn", "bfloat16", 1088, 64, 2, rows)
    node = replace(node, attributes=node.attributes | {"early": early})
    found = candidates(node, "cuda", architecture("sm_90"))
    assert sum(c.tactic["stream"].startswith(RING) for c in found if "stream" in c.tactic) == rings


def test_columns_that_fill_a_tile_are_zeros() -> None:
    weight = np.arange(1, 64 * 40 + 1, dtype=np.int64).reshape(64, 40).astype(np.uint8)
    held = bricks(weight, 2)
    assert held.shape == (2, 2, 1, 16, 64) and not held[:, 1, :, 4:].any()
    assert (held[1, 1, 0, 3] == weight[:, 39]).all()


def test_the_code_section_says_what_is_meant_to_be_beside() -> None:
    codes = {name: Code(b"x", "f", 32, 64, overlaps, both) for name, overlaps, both in
             (("a", False, False), ("b", True, False), ("c", True, True))}  # fmt: skip
    assert unpack(pack(codes)) == codes


def test_very_long_products_have_drawn_tiles() -> None:
    text = "Cast %0 -> bfloat16"
    for columns, drawn in ((128256, True), (14336, False)):
        weight = np.broadcast_to(np.zeros((), numpy_dtype("float8_e4m3fn")), (4096, columns))
        ports = (Port("bfloat16", (1, 4096)), Port("float8_e4m3fn", weight.shape, weight))
        stated = {"parts": 1, "epsilon": 1e-5, "expression": text, "early": 1}
        node = Node("Projection", ports, (Port("bfloat16", (1, columns)),), stated, parse(text))
        assert str(_ring(node)[0].tactic["stream"]).endswith("drawn") == drawn

"""Chains of more rows than one, and of products that have no launch of all: product by product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ingot.dtypes import numpy_dtype
from ingot.ir.ops import meaning
from ingot.kernels import candidates
from ingot.kernels.cuda import projection_chain
from ingot.kernels.cuda.architecture import Architecture, architecture
from ingot.kernels.cuda.build import CudaBuilder
from ingot.kernels.cuda.projection_chain import fits, parts_of, shapes
from ingot.kernels.cuda.projection_row import Work
from ingot.kernels.cuda.standalone import generate
from ingot.kernels.node import Node, Port
from ingot.kernels.work import flops_of
from ingot.plan.extent import evaluate
from tests.kernels.cuda.harness import interpreted

Array = np.ndarray[Any, Any]
GATED = "Sigmoid %0 -> float32; Mul $0 %0 -> float32; Mul $1 %1 -> float32; Mul $2 %2 -> float32; Cast $3 -> {}"
JOINED = "Cast %1 -> float32; Add %0 $0 -> float32; Cast $1 -> {}"
PLAIN = "Cast %0 -> {}"
PROCESSORS, WIDE, INNER, LAST = 2, 256, 512, 96


class Layer:
    """output with a residual, gate with scales of its columns, down with the first's result, projection."""

    def __init__(self, rows: int = 3, dtype: str = "bfloat16", kept: str = "float8_e4m3fn", wide: int = WIDE,
                 inner: int = INNER, last: int = LAST, extent: int | str = "N", **changes: Any) -> None:  # fmt: skip
        rng = np.random.default_rng(rows)
        numbers = [(rows, wide), (wide, wide), (rows, wide), (wide, 2 * inner), (wide,), (inner,), (inner, wide),
                   (wide, last), (wide,)]  # fmt: skip
        self.inputs = list[Array]()
        for place, shape in enumerate(numbers):
            x = rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.standard_normal(shape)
            weight = place in (1, 3, 6, 7)
            name = kept if weight else "float32" if len(shape) == 1 else dtype
            self.inputs.append((x / shape[0] ** 0.5 if weight else x).astype(numpy_dtype(name)))
        texts = [text.format(dtype) for text in (JOINED, GATED, JOINED, PLAIN)]
        stated = {"parts": (1, 2, 1, 1), "norms": (0, 1, 0, 1), "epsilons": (1e-5,) * 4, "expressions": texts,
                  "reads": (1, 1, 1, 0), "sources": (-1, -1, 0), "results": (2, 3), "early": 1}  # fmt: skip
        self.stated: dict[str, Any] = stated | changes
        self.wanted = [np.asarray(y) for y in meaning("ProjectionChain")(*self.inputs, **self.stated)]
        ports = [Port(x.dtype.name, (extent, *x.shape[1:])) if k in (0, 2) else Port(x.dtype.name, x.shape, x)
                 for k, x in enumerate(self.inputs)]  # fmt: skip
        outputs = [Port(y.dtype.name, (extent, *y.shape[1:])) for y in self.wanted]
        self.node = Node("ProjectionChain", tuple(ports), tuple(outputs), self.stated, name="under_test")

    def built(self, target: Architecture) -> CudaBuilder:
        (candidate,) = candidates(self.node, "cuda", target)
        assert candidate.kernel.name == "projection_chain"
        return generate(self.node, candidate, target)


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """Of few processors: small products make a chain."""
    monkeypatch.setattr(projection_chain, "WARPS", 4)
    return replace(architecture("sm_90"), processors=PROCESSORS)


def _together(build: CudaBuilder) -> list[bool]:
    return [call.unit.together for call in build.launches]


def _near(found: Sequence[Array], wanted: Sequence[Array], within: float) -> None:
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        apart = mine.astype(np.float64) - theirs.astype(np.float64)
        assert np.linalg.norm(apart) < within * np.linalg.norm(theirs.astype(np.float64))


@pytest.mark.parametrize(("rows", "results"), [(3, (2, 3)), (40, (3, 1))])
def test_rows_that_a_run_decides(rows: int, results: tuple[int, ...], target: Architecture) -> None:
    """One launch of all for one row, none of it for more; both read the same weights."""
    layer = Layer(rows, results=results)
    build = layer.built(target)
    assert _together(build) == [True] + [False] * (len(build.launches) - 1)
    runs = [[0 not in [evaluate(e, {"N": n}) for e in call.grid] for call in build.launches] for n in (1, rows)]
    assert runs[0] == _together(build) and not runs[1][0] and sum(runs[1]) >= 4
    assert build.launches[0].grid[1:] == () and evaluate(build.launches[0].grid[0], {"N": 1}) == PROCESSORS
    assert sum(c.nbytes for c in build.constants) < 1.1 * sum(layer.inputs[k].nbytes for k in (1, 3, 6, 7)) + (1 << 14)
    _near(interpreted(build, layer.inputs, {"N": rows}), layer.wanted, 0.06)


@pytest.mark.parametrize(("dtype", "kept", "rows", "within"), [
    ("bfloat16", "float8_e4m3fn", 1, 0.02), ("bfloat16", "float8_e4m3fn", 20, 0.06), ("float16", "float16", 1, 4e-3),
    ("float16", "float8_e4m3fn", 5, 0.06), ("float32", "float32", 1, 1e-4), ("float32", "bfloat16", 3, 2e-2),
])  # fmt: skip
def test_products_without_a_chain(dtype: str, kept: str, rows: int, within: float) -> None:
    """Too small for a chain, or of types that have none: of one row and more."""
    layer = Layer(rows, dtype, kept, wide=64, inner=96, last=80)
    build = layer.built(architecture("sm_90"))
    assert not any(_together(build))
    _near(interpreted(build, layer.inputs, {"N": rows}), layer.wanted, within)


@pytest.mark.parametrize(("changes", "together"), [
    ({}, True), ({"results": (0, 1, 2, 3)}, True), ({"extent": 1}, True),
    ({"dtype": "float16"}, False), ({"kept": "bfloat16"}, False), ({"early": 0}, False),
    ({"rows": 2, "extent": 2}, False),  # never one row
    ({"wide": WIDE + 64}, False),  # warps of a block have no whole rounds
    ({"last": LAST + 8}, False),  # no whole tiles
    ({"last": 16}, False),  # a block has no tile
])  # fmt: skip
def test_which_chains_are_one_launch(changes: dict[str, Any], together: bool, target: Architecture) -> None:
    layer = Layer(**{"rows": 1, **changes})
    assert any(_together(layer.built(target))) == together


def test_what_a_processor_has_no_room_for_is_no_chain(target: Architecture) -> None:
    works = [Work.of(node) for node in parts_of(Layer(1).node)]
    need = max(shape.bytes for shape in shapes(works, target))
    assert [fits(works, replace(target, shared=shared)) for shared in (need, need - 1)] == [True, False]


@pytest.mark.parametrize(("source", "number", "together"), [(0, 2, True), (0, 1, False), (1, 2, False)])
def test_a_row_that_is_an_operand_too(source: int, number: int, together: bool, target: Architecture) -> None:
    """A link's own row as its operand may not be stored yet when it is read; what lies two before it is."""
    texts, sources = [PLAIN.format("bfloat16")] * 3, [source]
    texts[number] = JOINED.format("bfloat16")
    reads = tuple(int(k == number) for k in range(3))
    rng = np.random.default_rng(1)
    row = rng.standard_normal((1, WIDE)).astype(numpy_dtype("bfloat16"))
    weights = [(rng.standard_normal((WIDE, WIDE)) / 16).astype(numpy_dtype("float8_e4m3fn")) for _ in range(3)]
    stated = {"parts": (1,) * 3, "norms": (0,) * 3, "epsilons": (1e-5,) * 3, "expressions": texts, "reads": reads,
              "sources": sources, "results": (2,), "early": 1}  # fmt: skip
    ports = (Port("bfloat16", row.shape), *(Port(w.dtype.name, w.shape, w) for w in weights))
    node = Node("ProjectionChain", ports, (Port("bfloat16", row.shape),), stated)
    (candidate,) = candidates(node, "cuda", target)
    build = generate(node, candidate, target)
    assert any(_together(build)) == together
    if not together:
        small = replace(architecture("sm_90"), processors=WIDE)  # one row in registers, which can be interpreted
        wanted = [np.asarray(y) for y in meaning("ProjectionChain")(row, *weights, **stated)]
        _near(interpreted(generate(node, candidate, small), [row, *weights], {}), wanted, 0.02)


def test_operands_are_what_a_block_has_stored_itself(target: Architecture) -> None:
    """The same columns of as many: others are another block's."""
    node = Layer(1).node
    for source, together in ((0, False), (1, False)):
        more = node.attributes | {"reads": (1, 1, 1, 1), "sources": (-1, -1, 0, source)}
        assert projection_chain._together(parts_of(node), replace(node, attributes=more), target) == together


def test_operations_are_those_of_all_products() -> None:
    for rows, extent in ((3, 3), (5, "N")):
        layer = Layer(rows, extent=extent)
        counted = flops_of(layer.node)
        every = 2 * rows * (WIDE * WIDE + 2 * WIDE * INNER + INNER * WIDE + WIDE * LAST)
        assert evaluate(counted, {"N": rows}) == every

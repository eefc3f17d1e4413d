"""ProjectionChain means what Projections mean one by one, and has their types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ingot.dtypes import numpy_dtype
from ingot.errors import GraphError
from ingot.ir.ops import meaning
from ingot.ir.ops_projection import Chained, chained
from ingot.ir.ops_table import TensorType, infer

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(4)
GATED = "Sigmoid %0 -> float32; Mul $0 %0 -> float32; Mul $1 %1 -> float32; Cast $2 -> {}"
JOINED = "Mul %0 %2 -> float32; Cast %1 -> float32; Add $0 $1 -> float32; Cast $2 -> {}"
PLAIN = "Cast %0 -> {}"
# output and residual, gate and up, down and the residual stream of the first, the next layer's projection
STATED = {"parts": (1, 2, 1, 1), "norms": (0, 1, 0, 1), "epsilons": (1e-6, 1e-2, 1e-6, 1e-3),
          "reads": (2, 0, 2, 0), "sources": (-1, -1, 0, -1)}  # fmt: skip
ONE_BY_ONE = [Chained(1, None, (2, 3), 1, 1e-6, JOINED), Chained(4, 5, (), 2, 1e-2, GATED),
              Chained(6, None, (~0, 7), 1, 1e-6, JOINED), Chained(8, 9, (), 1, 1e-3, PLAIN)]  # fmt: skip


def _drawn(dtype: str, rows: tuple[int, ...]) -> list[Array]:
    shapes = [(*rows, 6), (6, 8), (*rows, 8), (8,), (8, 20), (8,), (10, 8), (8,), (8, 12), (8,)]
    kinds = [dtype, "float8_e4m3fn", dtype, "float32", "float8_e4m3fn", "float32", "float8_e4m3fn", "float32",
             "float8_e4m3fn", "float32"]  # fmt: skip
    return [np.asarray(RNG.standard_normal(shape)).astype(numpy_dtype(kind))
            for shape, kind in zip(shapes, kinds, strict=True)]  # fmt: skip


def _stated(dtype: str, **changes: Any) -> dict[str, Any]:
    return STATED | {"expressions": [text.format(dtype) for text in (JOINED, GATED, JOINED, PLAIN)]} | changes


@pytest.mark.parametrize("results", [(0, 1, 2, 3), (2, 3), (3,), (3, 0)])
@pytest.mark.parametrize(("dtype", "rows"), [("float32", (3,)), ("bfloat16", (2, 1)), ("float16", (1,))])
def test_a_chain_means_its_products_one_by_one(dtype: str, rows: tuple[int, ...], results: tuple[int, ...]) -> None:
    given, made = _drawn(dtype, rows), list[Array]()
    for link in ONE_BY_ONE:
        operands = [made[~k] if k < 0 else given[k] for k in link.operands]
        norm = given[link.norm] if link.norm is not None else None
        stated = {"parts": link.parts, "epsilon": link.epsilon, "expression": link.expression.format(dtype)}
        made += meaning("Projection")(made[-1] if made else given[0], given[link.weight], norm, *operands, **stated)
    found = meaning("ProjectionChain")(*given, **_stated(dtype, results=results))
    known_inputs = [TensorType(x.dtype.name, x.shape) for x in given]
    types = infer("ProjectionChain", known_inputs, _stated(dtype, results=results))
    assert len(found) == len(types) == len(results)
    for k, y, known in zip(results, found, types, strict=True):
        assert known == TensorType(y.dtype.name, y.shape) == TensorType(dtype, (*rows, (8, 10, 8, 12)[k]))
        np.testing.assert_array_equal(y, made[k])


def test_where_products_of_a_chain_find_what_they_read() -> None:
    links = list(chained(_stated("float32")))
    assert [link.expression for link in links] == _stated("float32")["expressions"]
    places = [(link.weight, link.norm, link.operands, link.parts, link.epsilon) for link in links]
    assert places == [(link.weight, link.norm, link.operands, link.parts, link.epsilon) for link in ONE_BY_ONE]


def test_rows_that_a_run_decides_stay_so() -> None:
    types = [TensorType(x.dtype.name, ("N", *x.shape[1:]) if k in (0, 2) else x.shape)
             for k, x in enumerate(_drawn("bfloat16", (5,)))]  # fmt: skip
    found = infer("ProjectionChain", types, _stated("bfloat16", results=(0, 3)))
    assert found == (TensorType("bfloat16", ("N", 8)), TensorType("bfloat16", ("N", 12)))


@pytest.mark.parametrize(("place", "shape", "changes", "reason"), [
    (1, (7, 8), {}, r"product 0 of 4: Projection: x \(3, 6\) and 1 parts do not fit weight \(7, 8\)"),
    (4, (9, 20), {}, r"product 1 of 4: Projection: x \(3, 8\) and 2 parts do not fit weight \(9, 20\)"),
    (4, (8, 21), {}, r"product 1 of 4: Projection: x \(3, 8\) and 2 parts do not fit weight \(8, 21\)"),
    (8, (12, 8), {}, r"product 3 of 4: Projection: x \(3, 8\)"),
    (0, (3, 6), {"norms": (1, 1, 0, 1)}, "its products read 10 inputs beside x, not 9"),
    (0, (3, 6), {"reads": (2, 1, 2, 0)}, "5 operands are read, of 4 it says where"),
    (0, (3, 6), {"sources": (-1, -1, 2, -1)}, "reads the result of one that is not before it"),
])  # fmt: skip
def test_what_does_not_fit_is_named(place: int, shape: tuple[int, ...], changes: dict[str, Any], reason: str) -> None:
    types = [TensorType(x.dtype.name, x.shape) for x in _drawn("float32", (3,))]
    types[place] = TensorType(types[place].dtype, shape)
    with pytest.raises(GraphError, match=reason):
        infer("ProjectionChain", types, _stated("float32", results=(3,), **changes))

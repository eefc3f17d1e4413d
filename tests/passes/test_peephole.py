"""Expressions are simplified an instruction at a time, and compute the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.ir import expression as expressions
from ingot.passes.peephole import simpler

F, J, U = "float32", "int32", "uint8"

CASES: list[tuple[str, tuple[str, ...], str]] = [
    ("Add %0 0.0 -> float32", (F,), ""),
    ("Add 0.0 %0 -> float32", (F,), ""),
    ("Sub %0 0.0 -> float32", (F,), ""),
    ("Mul 1.0 %0 -> float32", (F,), ""),
    ("Div %0 1.0 -> float32", (F,), ""),
    ("Pow %0 1.0 -> float32", (F,), ""),
    ("Neg %0 -> float32; Neg $0 -> float32", (F,), ""),
    ("Relu %0 -> float32; Relu $0 -> float32", (F,), "Relu %0 -> float32"),
    ("Floor %0 -> float32; Floor $0 -> float32", (F,), "Floor %0 -> float32"),
    ("Sigmoid %0 -> float32; Relu $0 -> float32", (F,), "Sigmoid %0 -> float32"),
    ("Relu %0 -> float32; Clip $0 -1.0 6.0 -> float32", (F,), "Clip %0 0 6.0 -> float32"),
    ("Clip %0 -1.0 6.0 -> float32; Relu $0 -> float32", (F,), "Clip %0 0 6.0 -> float32"),
    ("Max %0 0 -> float32", (F,), "Relu %0 -> float32"),
    ("Cast %0 -> float32", (F,), ""),
    ("Cast %0 -> float64; Cast $0 -> float32", (F,), ""),
    ("Cast %0 -> float32; Cast $0 -> float64", (U,), "Cast %0 -> float64"),
    ("Mul 2.0 3.0 -> float32; Add %0 $0 -> float32", (F,), "Add %0 6.0 -> float32"),
    ("Dequantize %0 0.5 3 -> float32; Quantize $0 0.5 3 -> uint8", (U,), ""),
    ("Relu %0 -> float32; Quantize $0 0.5 0 -> uint8", (F,), "Quantize %0 0.5 0 -> uint8"),
    ("Clip %0 0.0 200.0 -> float32; Quantize $0 0.5 0 -> uint8", (F,), "Quantize %0 0.5 0 -> uint8"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "dtypes", "wanted"), CASES)
def test_simpler(text: str, dtypes: tuple[str, ...], wanted: str) -> None:
    simple = expressions.format(simpler(text, dtypes))
    assert simple == wanted
    operands = [np.linspace(-9, 9, 37).astype(dtype) for dtype in dtypes]
    before = expressions.evaluate(expressions.parse(text), operands)
    after = expressions.evaluate(expressions.parse(simple), operands) if simple else operands[0]
    np.testing.assert_array_equal(before, after)


UNTOUCHED: list[tuple[str, tuple[str, ...]]] = [
    ("Add %0 0.5 -> float32", (F,)),
    ("Sub 0.0 %0 -> float32", (F,)),
    ("Div 1.0 %0 -> float32", (F,)),
    ("Add %0 0 -> float32", (J,)),
    ("Neg %0 -> float32; Relu $0 -> float32", (F,)),
    ("Tanh %0 -> float32; Relu $0 -> float32", (F,)),
    ("Relu %0 -> float32; Clip $0 -3.0 -1.0 -> float32", (F,)),
    ("Cast %0 -> int32; Cast $0 -> float32", (F,)),
    ("Cast %0 -> int8; Cast $0 -> int32", (J,)),
    ("Dequantize %0 0.5 3 -> float32; Quantize $0 0.25 3 -> uint8", (U,)),
    ("Clip %0 0.0 100.0 -> float32; Quantize $0 0.5 0 -> uint8", (F,)),
]


@pytest.mark.parametrize(("text", "dtypes"), UNTOUCHED)
def test_what_would_compute_something_else_stays(text: str, dtypes: tuple[str, ...]) -> None:
    assert simpler(text, dtypes) == expressions.parse(text)


STEPS = ["Relu {} -> float32", "Neg {} -> float32", "Add {} 0.0 -> float32", "Mul {} 1.0 -> float32",
         "Abs {} -> float32", "Clip {} -2.0 3.0 -> float32", "Max {} 0 -> float32", "Cast {} -> float64",
         "Cast {} -> float32", "Sigmoid {} -> float32", "Floor {} -> float32", "Sub {} %1 -> float32"]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=7))
def test_any_chain_computes_the_same(steps: list[str]) -> None:
    text = "; ".join(step.format("%0" if index == 0 else f"${index - 1}") for index, step in enumerate(steps))
    simple = simpler(text, (F, F))
    operands = [np.linspace(-4, 4, 33, dtype=np.float32), np.linspace(3, -1, 33, dtype=np.float32)]
    before = expressions.evaluate(expressions.parse(text), operands)
    after = expressions.evaluate(simple, operands) if simple.instructions else operands[0]
    assert len(simple.instructions) <= len(steps)
    np.testing.assert_allclose(before, after, rtol=1e-6, atol=1e-7)

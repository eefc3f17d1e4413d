"""Bounds hold for every value that an expression takes; code without guards is used only where they do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.ir.expression import evaluate, parse, without_first
from ingot.kernels.cpu import bounds

RESIDUAL = (
    "Add %0 %2 -> int32; Cast $0 -> float32; Mul $1 %3 -> float32; Quantize $2 1.0 125 -> uint8; "
    "Dequantize %1 0.9 126 -> float32; Dequantize $3 1.8 125 -> float32; Add $4 $5 -> float32; Relu $6 -> float32"
)


def operands(random: np.random.Generator, channels: int) -> list[np.ndarray]:
    shape = (50, channels)
    return [
        random.integers(-90_000, 90_000, shape).astype(np.int32),
        random.integers(0, 256, shape).astype(np.uint8),
        random.integers(-5_000, 5_000, channels).astype(np.int32),
        random.normal(0, 0.01, channels).astype(np.float32),
    ]


@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_values_lie_within(seed: int, channels: int) -> None:
    random = np.random.default_rng(seed)
    values, expression = operands(random, channels), parse(RESIDUAL)
    known = [
        bounds.interval(values[0].min(axis=0), values[0].max(axis=0)), bounds.of_dtype("uint8"),
        *map(bounds.of_constant, values[2:]),
    ]  # fmt: skip
    taken = bounds.ranges(expression, known)
    for index, instruction in enumerate(expression.instructions[1:], 1):
        result = evaluate(type(expression)(expression.instructions[:index]), values).astype(np.float64)
        reading = [i for i, o in enumerate(instruction.operands) if getattr(o, "index", None) == index - 1]
        if not reading or not isinstance(instruction.operands[reading[0]], type(expression.result)):
            continue
        bound = taken[index][reading[0]]
        assert bound is not None
        slack = 1e-6 * bound.largest
        assert (result >= bound.low - slack).all() and (result <= bound.high + slack).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(["uint8", "int8"]), st.integers(0, 255))
def test_sums_of_products_lie_within(seed: int, dtype: str, zero: int) -> None:
    random = np.random.default_rng(seed)
    zero -= 128 if dtype == "int8" else 0
    limits = np.iinfo(dtype)
    weight, bias = random.integers(-255, 256, (3, 4, 2)), random.integers(-1000, 1000, 3)
    known = bounds.of_products(weight, dtype, zero, bias)
    x = random.choice([limits.min, limits.max, zero], (200, 8)).astype(np.int64)
    sums = (x - zero) @ weight.reshape(3, -1).T + bias
    assert (sums >= known.low).all() and (sums <= known.high).all()
    extreme = np.where(weight.reshape(3, -1) > 0, limits.max, limits.min) - zero
    assert np.array_equal((extreme * weight.reshape(3, -1)).sum(axis=1) + bias, known.high)


@pytest.mark.parametrize("text", [
    "Mul %0 %1 -> float32",
    "Cast %0 -> int32; Mul $0 $0 -> int32",
    "Cast %0 -> float32; Div $0 %1 -> float32; Add $1 1.0 -> float32",
    "Cast %0 -> float32; Mul $0 inf -> float32; Add $1 1.0 -> float32",
])  # fmt: skip
def test_what_is_not_known(text: str) -> None:
    """Floats from outside, integers that may wrap, quotients, infinities."""
    expression = parse(f"{text}; Cast ${text.count(';')} -> float32")
    known = [bounds.interval(-(2.0**20), 2.0**20), None]
    assert bounds.ranges(expression, known)[-1] == (None,)


def test_constants_that_are_no_numbers() -> None:
    assert bounds.of_constant(np.array([1.0, np.nan])) is None
    assert bounds.of_constant(np.array([1.0, np.inf])) is None
    assert bounds.of_constant(None) is None


def test_without_the_first() -> None:
    values, expression = operands(np.random.default_rng(3), 5), parse(RESIDUAL)
    assert np.array_equal(
        evaluate(without_first(expression), [values[0] + values[2], *values[1:]]), evaluate(expression, values)
    )

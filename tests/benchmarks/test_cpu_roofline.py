"""Rooflines: what a kernel is held against, and the shares of a network."""

import pytest

from benchmarks.cpu_roofline import row, totals, unit_of
from benchmarks.peaks import Peaks
from ingot.runtime.profiler import StepTime

PEAKS = Peaks({"fma": 200_000, "tiles bfloat16": 3_000_000, "tiles uint8": 6_000_000}, 20_000)


@pytest.mark.parametrize(
    "kernel, unit",
    [
        ("conv_direct", ("fma", 1)),
        ("conv_split_near", ("tiles bfloat16", 3)),
        ("linear_rounded", ("tiles bfloat16", 1)),
        ("linear_rounded_weights", ("fma", 1)),
        ("conv_tiles_bytes", ("tiles uint8", 1)),
        ("depthwise_bytes", ("fma", 1)),
    ],
)
def test_unit(kernel: str, unit: tuple[str, int]) -> None:
    assert unit_of(kernel, PEAKS) == unit
    assert unit_of(kernel, Peaks({"fma": 1.0}, 1.0)) == ("fma", 1)


def step(kernel: str, microseconds: float, size: int, flops: int) -> StepTime:
    return StepTime("step", ("a", "b"), kernel, microseconds, size, flops)


def test_the_longer_time_is_the_limit() -> None:
    bound = row(step("conv_direct", 100.0, 20_000, 10_000_000), 100.0, PEAKS)
    assert (bound.bound, bound.limit, bound.share) == ("fma", 50.0, 0.5)
    waiting = row(step("conv_split", 10.0, 100_000, 1_000_000), 10.0, PEAKS)
    assert (waiting.bound, waiting.limit) == ("memory", 5.0)


def test_shares_of_a_network() -> None:
    rows = [
        row(step("conv_split", 30.0, 0, 10_000_000), 30.0, PEAKS),
        row(step("conv_direct", 70.0, 0, 7_000_000), 70.0, PEAKS),
    ]
    total = totals(rows, PEAKS, "fp32")
    assert total["of_vector_peak"] == pytest.approx(0.85)
    assert total["of_chosen_peak"] == pytest.approx((10 + 35) / 100)

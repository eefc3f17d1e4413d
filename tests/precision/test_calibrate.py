"""Calibration: histograms of constant size, calibrators by their definitions, doubts about samples."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import parser

from ingot.errors import ConfigError
from ingot.precision import calibrators, data
from ingot.precision.calibrate import calibrate
from ingot.precision.histogram import HALF, Histogram
from tests.precision.networks import INPUTS, imported, perceptron, rows


def histogram(*batches: Any) -> Histogram:
    found = Histogram()
    for batch in batches:
        found.add(np.asarray(batch, np.float32))
    return found


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), min_size=1, max_size=6))
def test_nothing_is_lost_however_the_range_grows(batches: list[list[float]]) -> None:
    found = histogram(*batches)
    every = np.concatenate([np.asarray(b, np.float32) for b in batches])
    assert found.total == len(every)
    assert (found.low, found.high) == (min(0.0, every.min()), max(0.0, every.max()))
    assert found.zeros == int((every == 0).sum())


def test_a_stream_is_as_long_as_it_likes() -> None:
    """Ten thousand batches leave what one does: 2 * HALF counts."""
    found, random = Histogram(), np.random.default_rng(0)
    batch = random.normal(size=64).astype(np.float32)
    for _ in range(10_000):
        found.add(batch)
    assert found.total == 640_000 and found.counts.size == 2 * HALF


def test_calibrators_by_their_definitions() -> None:
    random = np.random.default_rng(0)
    values = np.append(random.normal(size=100_000), 50.0)
    found = histogram(values)
    assert calibrators.minmax(found) == (pytest.approx(values.min(), rel=1e-6), 50.0)
    low, high = calibrators.percentile(found, 0.999)
    assert low == pytest.approx(np.quantile(values, 0.001), abs=0.05)
    assert high == pytest.approx(np.quantile(values, 0.999), abs=0.05)
    low, high = calibrators.entropy(found)
    assert -6 < low < -2 and 2 < high < 25


def test_least_squares_is_no_worse_than_any_other() -> None:
    random = np.random.default_rng(1)
    found = histogram(random.laplace(size=50_000))
    best = calibrators.square_error(found, calibrators.mse(found))
    for other in (calibrators.minmax, calibrators.entropy, calibrators.percentile):
        assert best <= calibrators.square_error(found, other(found)) * 1.0001


def test_ranges_of_a_network() -> None:
    ranges = calibrate(imported(perceptron()), rows(64), "minmax")
    seen = np.concatenate([feeds["x"] for feeds in rows(64)])
    assert ranges.samples == 256 and ranges.warnings == ()
    assert (ranges["x"].low, ranges["x"].high) == (pytest.approx(seen.min()), pytest.approx(seen.max()))
    np.testing.assert_allclose(ranges["x"].highs, np.maximum(seen.max(0), -np.inf), rtol=1e-6)
    assert ranges["r"].low == 0.0 and ranges["r"].clipped < 1e-4


def test_a_generator_is_gone_through_once_and_progress_is_told() -> None:
    told: list[str] = []
    calibrate(imported(perceptron()), (x for x in rows(40)), "auto", lambda stage, share: told.append(stage))
    assert {"calibrate", "choose calibrators"} <= set(told)


def few() -> Iterator[dict[str, Any]]:
    return rows(1, batch=1)


def idle() -> Iterator[dict[str, Any]]:
    for feeds in rows(40):
        feeds["x"][:, 3] = 0
        yield feeds


def drifting() -> Iterator[dict[str, Any]]:
    for number, feeds in enumerate(rows(40)):
        yield {"x": feeds["x"] + (3 if number > 20 else 0)}


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (few, "one sample only"),
        (idle, "channels that are 0 in every sample: x (1)"),
        (drifting, "difference between the first half of the samples and the second"),
    ],
)
def test_doubtful_samples_are_called_so(samples: Any, said: str) -> None:
    ranges = calibrate(imported(perceptron()), samples(), "minmax")
    assert any(said in warning for warning in ranges.warnings), ranges.warnings


def test_a_clipped_share_is_named() -> None:
    spread = ({"x": feeds["x"] ** 5} for feeds in rows(40))
    ranges = calibrate(imported(perceptron()), spread, "entropy")
    assert any("values beyond the range" in warning and "x (" in warning for warning in ranges.warnings)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "there are no samples"),
        ([{"x": np.zeros((1, 3), np.float32)}], "has shape [1, 3], the model takes ['N', 32]"),
        ([{"x": np.zeros((1, INPUTS))}], "is float64, the model takes float32"),
        ([{"x": np.full((1, INPUTS), np.nan, np.float32)}], "holds 32 NaN or infinities"),
        ([{"x": np.full((1, INPUTS), 3e38, np.float32)}], "is not finite for sample 0"),
        ([{"z": 1}], "sample 0 has no array for input 'x'"),
        ([7], "sample 0 is a int, not a dictionary"),
    ],
)
def test_samples_that_teach_nothing(samples: Any, said: str) -> None:
    with pytest.raises(ConfigError) as found:
        calibrate(imported(perceptron()), samples)
    assert said in str(found.value)


def test_an_unknown_calibrator() -> None:
    with pytest.raises(ConfigError, match="there is no calibrator 'max'; choose from auto, minmax"):
        calibrate(imported(perceptron()), rows(1), "max")


def test_a_branch_that_the_samples_decide_is_seen() -> None:
    proto = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        branching (float[N, 2] x, int64 rate) => (float[N, 2] y)
        <int64 known = {8000}, float[2, 2] w = {1.0, 2.0, 3.0, 4.0}> {
            slow = Equal(rate, known)
            y = If (slow) <then_branch = a () => (float[N, 2] u) { u = MatMul(x, w) },
                           else_branch = b () => (float[N, 2] v) { s = Sigmoid(x) v = MatMul(s, w) }>
        }""")
    feeds = [{"x": np.ones((3, 2), np.float32), "rate": np.array(16000)}]
    ranges = calibrate(imported(proto), feeds, "minmax")
    assert [round(known.high, 3) for known in ranges.values()] == [0.731]


def test_images_and_arrays_in_folders(tmp_path: Path) -> None:
    from PIL import Image

    from ingot.plan.plan import TensorSpec

    spec = TensorSpec("image", "float32", ("N", 3, 4, 4))
    for shade in (0, 255):
        Image.new("RGB", (9, 6), (shade, 0, 0)).save(tmp_path / f"{shade}.png")
    described = {"scale": 1 / 255, "mean": [0.5, 0, 0], "deviation": [0.5, 1, 1]}
    found = [sample["image"] for sample in data.samples(tmp_path, [spec], described)]
    assert [x.shape for x in found] == [(1, 3, 4, 4)] * 2
    np.testing.assert_allclose([x[0, 0].mean() for x in found], [-1, 1], atol=1e-6)
    with pytest.raises(ConfigError, match="the images need a description of how input 'image' wants its pixels"):
        list(data.samples(tmp_path, [spec]))
    np.save(tmp_path / "more.npy", np.zeros((1, 3, 4, 4), np.float32))
    with pytest.raises(ConfigError, match="holds images and arrays"):
        data.samples(tmp_path, [spec], described)

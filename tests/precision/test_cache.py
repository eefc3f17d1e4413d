"""Ranges survive a file; a file of another model is refused; TensorRT's are read."""

from pathlib import Path

import numpy as np
import pytest

from ingot.errors import ConfigError
from ingot.precision import cache, formats
from ingot.precision.calibrate import calibrate
from tests.precision.networks import imported, perceptron, rows


def test_what_was_calibrated_comes_back(tmp_path: Path) -> None:
    model = imported(perceptron())
    ranges = calibrate(model, rows(40), "percentile")
    cache.save(tmp_path / "ranges.txt", ranges, model)
    again = cache.load(tmp_path / "ranges.txt", model)
    assert list(again) == list(ranges) == ["x", "r"] and again.samples == 160
    for name, known in ranges.items():
        same = again[name]
        assert (same.low, same.high, same.calibrator, same.clipped) == (
            known.low,
            known.high,
            "percentile",
            known.clipped,
        )
        for mine, wanted in ((same.lows, known.lows), (same.highs, known.highs), (same.energy, known.energy)):
            np.testing.assert_array_equal(mine, wanted)
    assert "\nr: 3" in (tmp_path / "ranges.txt").read_text()


def test_calibrated_once(tmp_path: Path) -> None:
    model, made = imported(perceptron()), []

    def calibrated() -> cache.Ranges:
        made.append(1)
        return calibrate(model, rows(2), "minmax")

    for _ in range(2):
        cache.remembered(tmp_path / "ranges.txt", model, calibrated)
    cache.remembered(None, model, calibrated)
    assert len(made) == 2


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    model = imported(perceptron())
    cache.save(tmp_path / "ranges.txt", calibrate(model, rows(2), "minmax"), model)
    with pytest.raises(ConfigError, match="calibrated for another model, or for other weights"):
        cache.load(tmp_path / "ranges.txt", imported(perceptron(outlier=2)))


def test_a_cache_of_tensorrt(tmp_path: Path) -> None:
    model = imported(perceptron())
    (tmp_path / "calib").write_text("TRT-8601-EntropyCalibration2\nx: 3d010a14\nr: 3c010a14\ny: 3c010a14\n")
    ranges = cache.load(tmp_path / "calib", model)
    assert ranges["x"].high == -ranges["x"].low == pytest.approx(0.0315 * 127, rel=1e-2)
    assert ranges["r"].calibrator == "EntropyCalibration2"
    narrow = formats.apply(model, {"first": "int8", "second": "int8"}, ranges)
    assert sum(node.op_type == "QuantizeLinear" for node in narrow.graph) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TRT-8601-EntropyCalibration2\nelse: 3d010a14\n", "no range for 'x', which node 'first' reads"),
        ("TRT-8601-EntropyCalibration2\nx 3d010a14\n", "line 2: 'x 3d010a14' is no tensor's name with its scale"),
        ("TRT-8601-EntropyCalibration2\nx: 7fc00000\n", "line 2"),
        ('Ingot-1 model 0123456789abcdef samples 3\nx: 3d010a14 {"low": 1}\n', "line 2"),
        ("Ingot-1 model 0123456789abcdef samples 3\nx: 3d010a14\n", "another model"),
        ("\x7fELF", "is no calibration cache"),
        ("", "is no calibration cache"),
    ],
)
def test_files_that_are_no_caches_of_this_model(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "calib").write_text(text)
    with pytest.raises(ConfigError, match="calib") as found:
        cache.load(tmp_path / "calib", imported(perceptron()))
    assert said in str(found.value)


def test_a_folder_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        cache.load(tmp_path, imported(perceptron()))

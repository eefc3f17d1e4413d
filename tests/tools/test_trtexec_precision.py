"""trtexec's flags of precision: each allows what it names, the constraints hold, nothing is silent."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ingot.cli import main
from ingot.tools.precision_flags import of_trtexec
from ingot.tools.trtexec_flags import parse

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
QUICK = ("--iterations=2", "--warmUp=0", "--duration=0", "--builderOptimizationLevel=0", "--shapes=image:1x1x8x8")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "images.npy"
    with np.load(EXAMPLES / "digits" / "heldout.npz") as held:
        np.save(path, held["images"][:64].astype(np.float32))
    return path


def ran(capsys: pytest.CaptureFixture[str], digits: Path, *words: str, passes: bool = True) -> str:
    assert main(["trtexec", f"--onnx={digits}", *QUICK, *words]) == (0 if passes else 1)
    captured = capsys.readouterr()
    return captured.err + captured.out


def test_int8_with_data_is_searched_and_told(digits: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ran(capsys, digits, "--int8", f"--calibrationData={images}")
    assert "[I] precision: of 5 layers" in shown and "drawn inputs" not in shown
    assert shown.splitlines()[-1].startswith("&&&& PASSED")


def test_int8_without_data_says_that_accuracy_is_unknown(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "ranges are those of drawn inputs" in ran(capsys, digits, "--int8")


def test_obeyed_layers_are_narrow_and_others_refused(
    digits: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"--calibrationData={images}"
    shown = ran(capsys, digits, "--int8", data, "--layerPrecisions=*:fp32,hidden:int8", "--precisionConstraints=obey")
    assert "of 5 layers 1 in int8" in shown
    shown = ran(capsys, digits, "--int8", data, "--layerPrecisions=hidden:fp16", "--precisionConstraints=obey",
                passes=False)  # fmt: skip
    assert "layer 'hidden' cannot be computed in fp16 here" in shown


@pytest.mark.parametrize(
    ("words", "rest", "formats", "notes"),
    [
        (["--int8"], "fp32", ("int8",), 0),
        (["--int4", "--bf16"], "bf16", ("int4",), 0),
        (["--best"], "bf16", ("int8",), 0),
        (["--fp16"], "fp32", None, 0),
        (["--best", "--stronglyTyped"], "fp32", None, 1),
    ],
)
def test_flags_allow_what_they_name(
    words: Sequence[str], rest: str, formats: tuple[str, ...] | None, notes: int
) -> None:
    asked = of_trtexec(parse(words))
    assert (asked.rest, asked.request and asked.request.formats, len(asked.notes)) == (rest, formats, notes)


def test_strong_types_win(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ran(capsys, digits, "--stronglyTyped", "--int8", "--fp16")
    assert "[W] --stronglyTyped: the model's types are kept, so --fp16, --int8 is ignored" in shown
    assert "precision: of" not in shown


def test_calibration_data_that_does_not_fit_is_refused(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "wrong.npy", np.zeros((4, 3, 9, 9), np.float32))
    shown = ran(capsys, digits, "--int8", f"--calibrationData={tmp_path / 'wrong.npy'}", passes=False)
    assert "sample 0: input 'image' has shape" in shown


def test_ranges_are_written_and_read_again_and_are_of_one_model(
    digits: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "ranges.cache"
    ran(capsys, digits, "--int8", f"--calibrationData={images}", f"--calib={cache}")
    written = cache.read_text()
    assert written.startswith("Ingot-1 model ") and "relu_14:0: " in written
    assert "calibrate" not in ran(capsys, digits, "--int8", f"--calibrationData={images}", f"--calib={cache}")
    tagger = EXAMPLES / "tagger" / "tagger.onnx"
    assert main(["trtexec", f"--onnx={tagger}", "--shapes=ids:1x5", "--int8", f"--calib={cache}"]) == 1
    assert "was calibrated for another model" in capsys.readouterr().err


def test_ranges_of_tensorrt_do_without_data(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("scale:0", "relu_3:0", "relu_6:0", "flatten_12:0", "relu_14:0")
    lines = ["TRT-8601-EntropyCalibration2", *(f"{name}: {struct.pack('>f', 4 / 127).hex()}" for name in names)]
    assert "there is no calibration cache" in ran(
        capsys, digits, "--int8", f"--calib={tmp_path / 'trt.cache'}", passes=False
    )
    (tmp_path / "trt.cache").write_text("\n".join(lines) + "\n")
    shown = ran(capsys, digits, "--int8", f"--calib={tmp_path / 'trt.cache'}")
    assert "[I] precision: of 5 layers" in shown and f"ranges are those of {tmp_path}" in shown

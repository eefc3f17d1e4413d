"""Samples that cannot be meant: one sentence that names the sample, from every command that takes them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ingot
from ingot.cli import main

DIGITS = Path(__file__).parent.parent.parent / "examples" / "digits" / "digits.onnx"
NAN = np.zeros((6, 1, 8, 8), np.float32)
NAN[4, 0, 2, 3] = np.nan
ARRAYS = {
    "shape": (np.zeros((6, 3, 8, 8), np.float32), "sample 0: input 'image' has shape [1, 3, 8, 8], the model takes"),
    "dtype": (np.zeros((6, 1, 8, 8), np.float64), "sample 0: input 'image' is float64, the model takes float32"),
    "nan": (NAN, "sample 4: input 'image' holds 1 NaN or infinities, the first at [0, 0, 2, 3]"),
    "empty": (np.zeros((0, 1, 8, 8), np.float32), "holds no samples"),
    "text": (np.array(["a", "b"]), "image"),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "digits.engine"
    ingot.build(DIGITS, level=0, verify=False).save(path)
    return path


def build(data: Path, engine: Path) -> list[str]:
    return ["build", str(DIGITS), "-o", str(data) + ".engine", "--int8", "--data", str(data), "--level=0", "--quiet"]


def halve(data: Path, engine: Path) -> list[str]:
    return ["build", str(DIGITS), "-o", str(data) + ".engine", "--fp16", "--target=cuda:sm_90", "--data", str(data),
            "--level=0", "--quiet"]  # fmt: skip


def debug(data: Path, engine: Path) -> list[str]:
    return ["debug", "precision", str(DIGITS), "--int8", "--data", str(data), "--quiet"]


def gate(data: Path, engine: Path) -> list[str]:
    return ["gate", str(engine), str(engine), "--data", str(data)]


Words = Callable[[Path, Path], list[str]]


@pytest.mark.parametrize("words", [build, halve, debug, gate])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_do_not_fit_are_refused_in_a_sentence(
    kind: str, words: Words, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    array, said = ARRAYS[kind]
    np.save(tmp_path / "data.npy", array)
    assert main(words(tmp_path / "data.npy", engine)) == 1
    error = capsys.readouterr().err
    assert error.startswith("ingot: error: ") and said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.engine"))


@pytest.mark.parametrize("words", [build, halve, debug, gate])
@pytest.mark.parametrize(("name", "content"), [("absent.npy", None), ("folder", None), ("torn.npy", b"\x93NUMPY\x01"),
                                               ("raises.py", b"def samples():\n    raise OSError('gone')\n"),
                                               ("no_samples.py", b"x = 1\n")])  # fmt: skip
def test_files_that_hold_no_samples_are_refused_in_a_sentence(
    name: str, content: bytes | None, words: Words, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name == "folder":
        path.mkdir()
    assert main(words(path, engine)) == 1
    error = capsys.readouterr().err
    assert error.startswith("ingot: error: ") and str(path) in error and error.count("\n") == 1


def test_one_sample_is_taken_and_said_to_prove_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "data.npy", np.full((1, 1, 8, 8), 7, np.float32))
    assert main(build(tmp_path / "data.npy", tmp_path)) == 0
    assert "there is one sample only" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [10**6, -(10**6)])
def test_places_of_rows_that_there_are_not_are_refused(
    wrong: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.ones((6, 5), np.int64)
    ids[3, 2] = wrong
    np.save(tmp_path / "ids.npy", ids)
    tagger = DIGITS.parent.parent / "tagger" / "tagger.onnx"
    assert main(["build", str(tagger), "--int8", "--data", str(tmp_path / "ids.npy"), "--quiet"]) == 1
    assert f"sample 3: input 'ids' holds {wrong}, the model looks up one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"), [("hidden:int9", "layer:precision"), ("nowhere:int8", "no layer of the model is called")]
)
def test_layers_that_cannot_be_meant_are_refused(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--precisionConstraints=obey", f"--layerPrecisions={name}", "--quiet"]
    assert main(["build", str(DIGITS), "--int8", "--data", str(DIGITS.parent / "samples.py"), *words]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (["--shapes=image:4x1x8x8"], "sample 0: input 'image' has N=1, the profile is for 4 to 4: widen --shapes, or give"),
    (["--budget=-1%"], "budget '-1%' is not known; write 0.5%"),
    (["--budget=1%", "--metric=nowhere.py"], "metric 'nowhere.py' is neither a Python file that exists"),
    (["--calib=nowhere/ranges.txt"], "cannot write nowhere/ranges.txt: there is no folder nowhere"),
])  # fmt: skip
def test_what_cannot_work_is_said_before_samples_are_gone_through(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(DIGITS.parent / "samples.py")
    assert main(["build", str(DIGITS), "--int8", "--data", data, "--level=0", *words]) == 1
    error = capsys.readouterr().err
    assert said in error and "calibrate" not in error

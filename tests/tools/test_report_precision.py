"""What the report says of an engine whose precisions were searched."""

import json
import shutil
from pathlib import Path

import pytest

from ingot.cli import main

FOLDER = Path(__file__).parent.parent.parent / "examples" / "digits"


@pytest.fixture(scope="module")
def searched(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("searched") / "digits.engine"
    words = ["--int8", "--data", str(FOLDER / "samples.py"), "--metric", str(FOLDER / "accuracy.py"), "--budget", "1%"]
    assert main(["build", str(digits), "-o", str(path), "--level=0", "--calibrator=minmax", "--quiet", *words]) == 0
    return path


def page_of(engine: Path, capsys: pytest.CaptureFixture[str]) -> str:
    target = engine.parent / "report.html"
    assert main(["report", str(engine), "-o", str(target), "--shapes=image:1x1x8x8"]) == 0
    capsys.readouterr()
    return target.read_text()


def test_choices_and_layers_are_drawn(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(Path(f"{searched}.precision.json").read_text())
    page = page_of(searched, capsys)
    timed = [trial for trial in report["trials"] if trial["microseconds"] is not None]
    assert len(timed) > 1 and page.count("<circle") == len(timed)
    assert all(f"<tr><td>{layer['node']}</td>" in page for layer in report["layers"])
    assert "225 held-out samples" in page and "(budget 1%)" in page


def test_without_the_file_beside_it_the_engine_says_what_it_knows(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone.engine"
    shutil.copy(searched, alone)
    page = page_of(alone, capsys)
    assert "225 held-out samples" in page and "is not there" in page and "<circle" not in page


@pytest.mark.parametrize("content", ["{", "[]", '{"rest": "fp32", "chosen": {"another": "int8"}}'])
def test_the_file_of_another_engine_is_not_believed(
    content: str, searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "digits.engine"
    shutil.copy(searched, engine)
    Path(f"{engine}.precision.json").write_text(content)
    assert "is not there" in page_of(engine, capsys)


def test_a_choice_that_is_not_finite_is_listed_and_not_drawn(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "digits.engine"
    shutil.copy(searched, engine)
    report = json.loads(Path(f"{searched}.precision.json").read_text())
    report["trials"][-1] = {**report["trials"][-1], "score": None, "microseconds": 10.0, "best": False}
    report["layers"][0]["noise"] = None
    Path(f"{engine}.precision.json").write_text(json.dumps(report))
    page = page_of(engine, capsys)
    assert "not finite" in page and "none is left" in page

"""The example models as files, and an engine of one."""

from pathlib import Path

import pytest

import ingot

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture(scope="session")
def digits() -> Path:
    return EXAMPLES / "digits" / "digits.onnx"


@pytest.fixture(scope="session")
def tagger() -> Path:
    return EXAMPLES / "tagger" / "tagger.onnx"


@pytest.fixture(scope="session")
def engine(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "digits.engine"
    ingot.build(digits, level=0).save(path)
    return path

"""The shared real models, where INGOT_ASSETS says they lie (continuous integration sets it), untuned."""

import os
from pathlib import Path

import pytest

ASSETS = os.environ.get("INGOT_ASSETS")
if not ASSETS or not Path(ASSETS).is_dir():
    pytest.skip("INGOT_ASSETS does not name the folder of shared models", allow_module_level=True)
pytest.importorskip("onnxruntime")

from benchmarks.assets import ASSETS as MODELS  # noqa: E402  after the skip: Pillow and the data may be missing
from benchmarks.assets import run_one  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model_does_what_onnxruntime_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    passed = run_one(name, Path(str(ASSETS)), target="cpu", level=0)
    assert passed, capsys.readouterr().out

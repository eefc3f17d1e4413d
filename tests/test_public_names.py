"""`import ingot` offers exactly the public names, whichever way they are reached first."""

import subprocess
import sys

import pytest

import ingot

PUBLIC = [
    "BuildConfig", "Engine", "IngotError", "LLM", "Profile", "Session", "StepTime", "TensorSpec", "build", "plugin",
]  # fmt: skip


def test_public_names() -> None:
    assert sorted(ingot.__all__) == PUBLIC
    assert all(getattr(ingot, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="unheard_of"):
        _ = ingot.unheard_of


@pytest.mark.parametrize(
    "first", ["import ingot", "from ingot import build", "from ingot.build import build", "import ingot.build"]
)
def test_build_stays_callable(first: str) -> None:
    script = f"{first}\nimport ingot\nassert callable(ingot.build) and callable(ingot.build)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0

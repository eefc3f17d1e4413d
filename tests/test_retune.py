"""An engine built by estimate is timed where it runs, and stays what it was otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ingot
from ingot.cli import main
from ingot.config import BuildConfig, Profile
from ingot.errors import ConfigError
from ingot.kernels.cpu.standalone import native_isa
from ingot.retune import config_of, retune
from ingot.runtime import session

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "digits.onnx"
TAGGER = Path(__file__).parent.parent / "examples" / "tagger" / "tagger.onnx"
PROFILE = Profile(image=((1, 1, 8, 8), (4, 1, 8, 8), (8, 1, 8, 8)))


def best_isa() -> str:
    isa = native_isa()
    assert isa is not None
    return isa.name


@pytest.fixture(scope="module")
def engine() -> ingot.Engine:
    """By estimate, for this machine and for an older one."""
    names = dict.fromkeys((best_isa(), "avx2"))
    return ingot.build(DIGITS, level=0, variants=tuple(names), profiles=[PROFILE], verify=False)


def test_what_runs_here_is_timed(engine: ingot.Engine, tmp_path: Path) -> None:
    cache = tmp_path / "times.json"
    again = retune(engine, DIGITS, timing_cache=cache)
    assert cache.exists() and again.details["retuned"] == f"cpu {best_isa()}"
    assert [v.isa for v in again.variants] == [v.isa for v in engine.variants]
    assert all(new is old for new, old in zip(again.variants[1:], engine.variants[1:], strict=True))
    assert again.details["evidence"] and again.inputs == engine.inputs
    x = np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)
    results = []
    for one in (engine, again):
        with ingot.Session(one) as opened:
            results.append(opened.run({"image": x})["scores"])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_from_the_command_line(engine: ingot.Engine, tmp_path: Path) -> None:
    path = tmp_path / "digits.engine"
    engine.save(path)
    assert main(["build", str(DIGITS), "-o", str(path), "--retune", "--quiet"]) == 0
    assert "retuned" in ingot.Engine.load(path).details


def test_another_model_is_refused(engine: ingot.Engine) -> None:
    with pytest.raises(ConfigError, match="built from another model"):
        retune(engine, TAGGER)


def test_without_its_machine(engine: ingot.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = replace(engine, variants=tuple(replace(v, target="cuda", isa="sm_90", requires=("sm_90",))
                                               for v in engine.variants))  # fmt: skip
    monkeypatch.setattr("ingot.retune.features", lambda target: session.features(target) - {"sm_90"})
    with pytest.raises(ConfigError, match="it holds cuda sm_90, cuda sm_90, and this machine runs none"):
        retune(elsewhere, DIGITS)


def test_a_configuration_comes_back_from_its_description() -> None:
    config = BuildConfig(target="cuda:sm_80,sm_90", precision="fp16", profiles=[PROFILE], level=0, atol=0.1,
                         overflows={"x": (-1e6, 1e6)})  # fmt: skip
    again = config_of(config.described())
    assert again.described() == config.described() and list(again.profiles) == [PROFILE]

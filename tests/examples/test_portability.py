"""The example models on narrower instruction sets than this machine's: AVX2 alone, AVX-512 without dot products."""

from pathlib import Path

import numpy as np
import pytest

import ingot
from ingot.kernels.cpu.isa import BY_NAME
from ingot.runtime.machine import cpu_features

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
IMAGES, TOKENS = ((1, 1, 8, 8), (5, 1, 8, 8), (16, 1, 8, 8)), ((1, 1), (3, 16), (8, 64))
MODELS = {
    "digits": (EXAMPLES / "digits" / "digits.onnx", ingot.Profile(image=IMAGES)),
    "tagger": (EXAMPLES / "tagger" / "tagger.onnx", ingot.Profile(ids=TOKENS)),
}


def inputs(name: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    if name == "digits":
        return {"image": random.uniform(0, 16, (5, 1, 8, 8)).astype(np.float32)}
    return {"ids": random.integers(0, 20, (3, 16))}


def outputs(name: str, *variants: str) -> dict[str, np.ndarray]:
    """What an engine of these variants computes; it was compared with the reference when it was built."""
    path, profile = MODELS[name]
    engine = ingot.build(path, level=0, profiles=[profile], variants=variants)
    assert all(entry["passed"] for entry in engine.details["evidence"])
    assert not variants or [variant.isa for variant in engine.variants] == list(variants)
    assert not engine.variants[0].plan.host_steps
    with ingot.Session(engine, threads=2) as session:
        assert not variants or session.variant.isa == variants[0]
        return session.run(inputs(name))


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_answers(name: str, isa: str) -> None:
    if not BY_NAME[isa].machine <= cpu_features():
        pytest.skip(f"this machine has no {isa}")
    narrow, native = outputs(name, isa), outputs(name)
    for key, wanted in native.items():
        np.testing.assert_allclose(narrow[key], wanted, rtol=1e-3, atol=1e-3 * float(np.abs(wanted).max()))


def test_an_engine_of_several_runs_on_the_best_there_is() -> None:
    path, profile = MODELS["digits"]
    engine = ingot.build(path, level=0, profiles=[profile], variants=("avx512", "avx2"))
    with ingot.Session(engine) as session:
        assert session.variant.isa == next(
            name for name in ("avx512", "avx2") if BY_NAME[name].machine <= cpu_features()
        )

"""`--bf16`: what a build may round, what it says about it, and that it stays within the tolerance it states."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import ingot
from ingot.errors import ConfigError
from ingot.report import last_log

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "digits.onnx"
SHAPES = [ingot.Profile(image=((1, 1, 8, 8), (16, 1, 8, 8), (64, 1, 8, 8)))]


def kernels(engine: ingot.Engine) -> set[str]:
    return {step.kernel for segment in engine.variants[0].plan.segments for step in segment.steps}


def one_row() -> onnx.ModelProto:
    """A product that waits for its weights."""
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 1024]) for n in "xy")
    weight = numpy_helper.from_array(np.random.default_rng(1).standard_normal((1024, 1024)).astype(np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "one_row", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_rounded_steps_are_noted_and_held_to_the_stated_tolerance() -> None:
    full = ingot.build(one_row(), level=0, variants=("avx2",))
    engine = ingot.build(one_row(), precision="bf16", level=0, variants=("avx2",))
    assert kernels(engine) == {"linear_rounded_weights"}
    assert len(engine.variants[0].weights) < 0.6 * len(full.variants[0].weights)
    assert any("--bf16 asked for it" in str(notice) for notice in last_log().notices)
    evidence = engine.details["evidence"]
    assert {entry["tolerance"] for entry in evidence} == {0.08} and all(entry["passed"] for entry in evidence)


def test_a_build_in_which_rounding_does_not_pay_says_so() -> None:
    ingot.build(DIGITS, profiles=SHAPES, precision="bf16", level=0, variants=("avx2",))
    assert any(notice.kind == "bf16" for notice in last_log().notices)


def test_nothing_is_rounded_unasked() -> None:
    engine = ingot.build(DIGITS, profiles=SHAPES, level=1)
    assert not any("rounded" in kernel for kernel in kernels(engine))
    assert {entry["tolerance"] for entry in engine.details["evidence"]} == {2e-4}


def test_answers_are_those_of_float32_but_for_rounding() -> None:
    image = np.random.default_rng(0).uniform(0, 16, (16, 1, 8, 8)).astype(np.float32)
    both = [ingot.build(DIGITS, profiles=SHAPES, precision=p, level=1) for p in ("fp32", "bf16")]
    full, rounded = (ingot.Session(engine).run({"image": image})["scores"] for engine in both)
    assert np.abs(full - rounded).max() <= 0.03 * np.abs(full).max()


@pytest.mark.parametrize(
    "options", [{"precision": "fp16"}, {"precision": "bf16", "exact": True}, {"precision": "bf16", "target": "host"}]
)
def test_refusals(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"fp16|bfloat16|bf16"):
        ingot.BuildConfig(**options)

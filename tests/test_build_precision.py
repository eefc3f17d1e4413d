"""`--bf16`: what a build may round, what it says about it, and that it stays within the tolerance it states."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import ingot
from ingot.errors import ConfigError
from ingot.kernels.cpu.isa import AMX
from ingot.report import last_log
from ingot.runtime.machine import cpu_features

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


def residual_network(group: int = 1) -> onnx.ModelProto:
    """A first layer, two convolutions with a shortcut, a pool, a mean and scores."""
    random = np.random.default_rng(2)
    sizes = {"a": (32, 3, 3, 3), "b": (64, 32, 1, 1), "c": (64, 64 // group, 3, 3), "d": (64, 32, 1, 1), "f": (64, 5)}
    arrays = {k: random.standard_normal(s).astype(np.float32) / np.sqrt(np.prod(s[1:])) for k, s in sizes.items()}
    weights = [numpy_helper.from_array(array.astype(np.float32), k) for k, array in arrays.items()]
    same = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["x1"], "first", **same), helper.make_node("Relu", ["x1"], ["x2"]),
        helper.make_node("Conv", ["x2", "b"], ["x3"], "wider"), helper.make_node("Relu", ["x3"], ["x4"]),
        helper.make_node("Conv", ["x4", "c"], ["x5"], "window", group=group, **same),
        helper.make_node("Conv", ["x2", "d"], ["x6"], "shortcut"), helper.make_node("Add", ["x5", "x6"], ["x7"]),
        helper.make_node("MaxPool", ["x7"], ["x8"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["x8"], ["x9"]), helper.make_node("Flatten", ["x9"], ["x10"]),
        helper.make_node("MatMul", ["x10", "f"], ["y"]),
    ]  # fmt: skip
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 12, 12])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 5])
    graph = helper.make_graph(nodes, "residual", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.skipif(not AMX.machine <= cpu_features(), reason="needs a processor with AMX")
def test_maps_between_convolutions_are_bfloat16() -> None:
    profiles = [ingot.Profile(x=((1, 3, 12, 12), (2, 3, 12, 12), (4, 3, 12, 12)))]
    engine = ingot.build(residual_network(), profiles=profiles, precision="bf16", level=1)
    assert any("bfloat16" in kernel for kernel in kernels(engine)) and "reduce_spatial" in kernels(engine)
    full = ingot.build(residual_network(), profiles=profiles, level=1)
    x = np.random.default_rng(5).standard_normal((3, 3, 12, 12)).astype(np.float32)
    wanted, mine = (ingot.Session(e).run({"x": x})["y"] for e in (full, engine))
    assert mine.dtype == np.float32 and np.abs(wanted - mine).max() <= 0.03 * np.abs(wanted).max()


def test_maps_stay_where_a_layer_would_convert_them_back() -> None:
    profiles = [ingot.Profile(x=((1, 3, 12, 12), (2, 3, 12, 12), (4, 3, 12, 12)))]
    engine = ingot.build(residual_network(group=64), profiles=profiles, precision="bf16", level=0)
    assert not any("bfloat16" in kernel for kernel in kernels(engine))


@pytest.mark.parametrize(
    "options", [{"precision": "fp16"}, {"precision": "bf16", "exact": True}, {"precision": "bf16", "target": "host"}]
)
def test_refusals(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"fp16|bfloat16|bf16"):
        ingot.BuildConfig(**options)

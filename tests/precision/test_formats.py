"""Formats as transforms: where Q/DQ are put, what stays as it was, that the model still means the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import ingot
from ingot.errors import ConfigError
from ingot.ir import oracle
from ingot.precision import formats, smooth
from ingot.precision.calibrate import calibrate
from ingot.precision.quantize import Float8, Int8
from ingot.precision.scales import affine, per_channel, step_of
from ingot.precision.weight_only import Int4Weights, rounded
from tests.precision.networks import imported, perceptron, rows

LEAST = {"int8": 28, "int8_smooth": 28, "int8_weights": 38, "int4": 14, "int4_awq": 14, "fp8": 20}


def narrowed(assignment: dict[str, Any], proto: Any = None) -> ir.Model:
    model = imported(proto or perceptron())
    return formats.apply(model, assignment, calibrate(model, rows(64), "minmax"))


@pytest.mark.parametrize("name", LEAST)
def test_each_format_says_about_the_same(name: str) -> None:
    """By the reference meaning of the model that it yields."""
    changed = narrowed({"first": name, "second": name})
    x = next(rows(1, seed=5, batch=64))
    found = oracle.evaluate_model(ir.to_proto(changed), x)["y"]
    wanted = oracle.evaluate_model(perceptron(), x)["y"]
    assert 10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum()) > LEAST[name]


@pytest.mark.parametrize(("config", "shape"), [(Float8(), ()), (Float8(per_channel=True), (16,))])
def test_scales_of_float8_weights(config: Float8, shape: tuple[int, ...]) -> None:
    changed = narrowed({"first": config, "second": config})
    assert [tuple(n.inputs[1].shape) for n in changed.graph if n.name == "second.restored_weight"] == [shape]
    x = next(rows(1, seed=5, batch=64))
    found = oracle.evaluate_model(ir.to_proto(changed), x)["y"]
    wanted = oracle.evaluate_model(perceptron(), x)["y"]
    assert 10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum()) > LEAST["fp8"]


def test_every_format_is_tried_here() -> None:
    assert set(formats.FORMATS) == set(LEAST)


def test_the_model_given_is_not_changed_and_names_stay() -> None:
    model = imported(perceptron())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    changed = formats.apply(model, {"first": "int8"}, calibrate(model, rows(4), "minmax"))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert [n.name for n in changed.graph if n.name in ("first", "relu", "second")] == ["first", "relu", "second"]
    assert [v.name for v in changed.graph.outputs] == ["y"]


def test_only_what_is_assigned_is_narrow() -> None:
    changed = narrowed({"first": "fp32", "second": Int8(activations="int8")})
    pairs = [node for node in changed.graph if node.op_type == "QuantizeLinear"]
    assert [node.inputs[0].name for node in pairs] == ["r"]
    assert pairs[0].inputs[2].const_value.dtype == ir.DataType.INT8


def test_integers_all_the_way() -> None:
    """Nothing of a narrow engine is left on the host, and both products are in bytes."""
    engine = ingot.build(narrowed({"first": "int8", "second": "int8"}), level=0)
    plan = engine.variants[0].plan
    assert not plan.host_steps
    kernels = [step.kernel for segment in plan.segments for step in segment.steps if step.op == "Linear"]
    assert len(kernels) == 2 and all("split" not in name for name in kernels)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ({"relu": "int8"}, "node 'relu' cannot be narrow"),
        ({"first": "int3"}, "there is no format 'int3'; choose from fp32, int8"),
        ({"first": 7}, "7 is the configuration of no format"),
    ],
)
def test_what_cannot_be_is_said(assignment: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as found:
        narrowed(assignment)
    assert said in str(found.value)


def test_ranges_are_needed() -> None:
    with pytest.raises(ConfigError, match="int8 needs ranges: calibrate the model"):
        formats.apply(imported(perceptron()), {"first": "int8"})
    assert formats.apply(imported(perceptron()), {"first": "int4"})


@pytest.mark.parametrize("wrong", [{"activations": "int4"}, {"smooth": (2.0,)}, {"shared": "some"}])
def test_configurations_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Int8(**wrong)
    with pytest.raises(ConfigError):
        Int4Weights(block=24)
    assert Float8().shared == "none"


def test_zero_is_exact_whatever_the_range() -> None:
    for low, high in ((-1.0, 3.0), (0.0, 5.0), (-7.0, 0.0), (2.0, 5.0), (0.0, 0.0)):
        scale, zero = affine(low, high)
        assert 0 <= zero <= 255 and scale > 0
        assert (0 - zero) * scale <= min(low, 0) + scale and (255 - zero) * scale >= high - scale


def test_the_step_of_trained_weights_is_kept() -> None:
    random = np.random.default_rng(0)
    whole = random.integers(-100, 101, (64, 32))
    weight = (whole * np.float32(0.0123)).astype(np.float32)
    assert step_of(weight) == pytest.approx(0.0123, rel=1e-4)
    np.testing.assert_allclose(per_channel(weight, 1), 0.0123, rtol=1e-4)
    assert step_of(random.normal(size=(64, 32)).astype(np.float32)) is None


def test_four_bits_in_blocks() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(70, 6)).astype(np.float32)
    weight[32:64] *= 100
    whole, scale = rounded(weight, 0, 32)
    assert whole.shape == weight.shape and scale.shape == (3, 6) and np.abs(whole).max() == 7
    restored = whole * np.repeat(scale, 32, 0)[:70]
    assert np.abs(restored - weight)[:32].max() < 0.5  # a block is not disturbed by its neighbour
    np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))


def test_smoothing_changes_nothing_but_magnitudes() -> None:
    known = calibrate(imported(perceptron(outlier=100)), rows(16), "minmax")["r"]
    factors = np.ones_like(known.energy)
    factors[5] = 10
    after = smooth.divided(known, factors)
    assert after.high == pytest.approx(known.high / 10, rel=1e-3) and after.low == 0.0

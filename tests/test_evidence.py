"""Verification: a wrong kernel is caught, named and dropped; a wrong reference refuses the engine."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import ingot
from ingot import evidence, kernels, stepwise
from ingot.config import BuildConfig
from ingot.errors import VerificationFailed
from ingot.importers import onnx as onnx_importer
from ingot.ir.oracle import compile_model
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.node import Node
from ingot.report import last_log


def model() -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 64]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"], "users_abs")], "evidence", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def wrong_abs(build: KernelBuilder, node: Node) -> None:
    """Forgets to take the absolute value."""
    x, y = build.input(0), build.output(0)

    def body(f: PhaseFunction, begin: Value, end: Value) -> None:
        def one(i: Value) -> None:
            f.store(f.load("float", f.pointer(x), i * 4), f.pointer(y), i * 4)

        f.loop(begin, end, one)  # type: ignore[arg-type]

    build.phase(node.output.elements, body)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The wrong kernel, cheaper than any other."""
    kernels._load("cpu")
    table = {key: list(entries) for key, entries in kernels._TABLE.items()}
    monkeypatch.setattr(kernels, "_TABLE", table)
    kernels.kernel("Pointwise", on="cpu", cost=lambda node, isa, **tactic: 0.0)(wrong_abs)
    yield


def test_a_wrong_kernel_is_dropped_and_named(planted: None) -> None:
    engine = ingot.build(model(), level=0)
    notices = [n for n in last_log().notices if n.kind == "dropped tactic"]
    assert len(notices) == 1 and "wrong_abs" in notices[0].reason and notices[0].node == "users_abs"
    x = np.linspace(-1, 1, 256, dtype=np.float32).reshape(4, 64)
    assert np.array_equal(ingot.Session(engine).run({"x": x})["y"], np.abs(x))
    assert all(d["passed"] for d in engine.details["evidence"]) and engine.details["evidence"]


def test_without_verification_it_would_have_gone_out(planted: None) -> None:
    engine = ingot.build(model(), level=0, verify=False)
    x = -np.ones((4, 64), np.float32)
    assert np.array_equal(ingot.Session(engine).run({"x": x})["y"], x)


def test_a_difference_nobody_explains_refuses_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = evidence.compile_model

    def lying(source: Any) -> Any:
        return lambda feeds: {name: y + 1 for name, y in honest(source)(feeds).items()}

    monkeypatch.setattr(evidence, "compile_model", lying)
    monkeypatch.setattr(evidence, "_store", lambda *_: None)
    with pytest.raises(VerificationFailed, match="'y' differs from the reference"):
        ingot.build(model(), BuildConfig(level=0, seed=12345))


@pytest.mark.parametrize(
    ("mine", "wanted", "good"),
    [
        ([1.0, 2.0], [1.0, 2.00001], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([np.nan, 2.0], [np.nan, 2.0], True),
        ([np.nan, 2.0], [1.0, 2.0], False),
        ([np.inf, 2.0], [np.inf, 2.0], True),
        ([np.inf, 2.0], [-np.inf, 2.0], False),
        ([0.0, 0.0], [0.0, 1e-3], False),
    ],
)
def test_what_counts_as_equal(mine: list[float], wanted: list[float], good: bool) -> None:
    a, b = np.array(mine, np.float32), np.array(wanted, np.float32)
    assert evidence.compare("y", a, b, {}, BuildConfig()).passed is good


def test_the_users_tolerance_is_the_one_that_counts() -> None:
    a, b = np.array([1.0], np.float32), np.array([1.05], np.float32)
    assert evidence.compare("y", a, b, {}, BuildConfig(atol=0.1)).passed
    assert not evidence.compare("y", a, b, {}, BuildConfig(rtol=0.01)).passed


@pytest.mark.parametrize(("precision", "good"), [("fp32", False), ("tf32", True), ("fp16", True), ("bf16", True)])
def test_a_narrow_engine_has_the_narrow_tolerance(precision: str, good: bool) -> None:
    a, b = np.array([1.0, 0.5], np.float32), np.array([1.0015, 0.5], np.float32)
    config = BuildConfig(target="cuda:sm_90", precision=precision)
    assert evidence.compare("y", a, b, {}, config).passed is good


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_models_that_quantize_on_the_way_may_differ_by_steps(dtype: str) -> None:
    a = np.array([100, 3, 200, 50, 8, 90, 31, 7], dtype)
    b = a + np.array([0, 0, 0, 4, 0, 0, 0, 0], dtype)
    assert not evidence.compare("y", a, b, {}, BuildConfig()).passed
    found = evidence.compare("y", a, b, {}, BuildConfig(), steps=True)
    assert found.passed
    assert not evidence.compare("y", a, b[::-1], {}, BuildConfig(), steps=True).passed


@pytest.mark.parametrize(("apart", "good"), [(0.2, True), (0.4, False), (np.nan, False)])
def test_roundings_drawn_anew_may_differ_as_much_as_they_disturb(apart: float, good: bool) -> None:
    random = np.random.default_rng(0)
    wanted = random.normal(size=1000).astype(np.float32)
    mine, unrounded = (wanted + np.float32(d) * random.uniform(-1, 1, 1000).astype(np.float32) for d in (apart, 0.2))
    found = evidence.compare("y", mine, wanted, {}, BuildConfig(), steps=True)
    assert not found.passed
    judged = evidence.within_rounding(found, mine, wanted, unrounded, BuildConfig())
    assert judged.passed is good
    strict = evidence.within_rounding(found, mine, wanted, unrounded, BuildConfig(rtol=1e-3))
    assert not strict.passed


def test_a_model_without_its_roundings() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        quantized (float[N] x) => (float[N] y, float[N] z)
        <float scale = {1.0}, uint8 zero = {3}> {
            q = QuantizeLinear(x, scale, zero)
            d = DequantizeLinear(q, scale, zero)
            y = Neg(d)
            z = DequantizeLinear(q, scale, zero)
        }""")
    x = np.array([0.4, 1.6, -9.0], np.float32)
    found = compile_model(stepwise.without_rounding(onnx_importer.load(proto)))({"x": x})
    np.testing.assert_array_equal(found["y"], -x)
    np.testing.assert_array_equal(found["z"], [0, 2, -3])  # an output keeps its name, and so its meaning

"""A small fault in one step of a quantized model is found, though roundings blur the outputs as much."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import ingot
from ingot import evidence, kernels
from ingot.errors import VerificationFailed
from ingot.importers import onnx as importer
from ingot.ir import expression as expressions
from ingot.ir import shapes
from ingot.kernels import Kernel
from ingot.passes import fuse_quant
from ingot.plan.plan import NativeSegment
from ingot.precision import formats
from ingot.precision.calibrate import calibrate
from ingot.report import last_log

WIDTH, DEPTH, WRONG = 48, 6, "product_3"


def deep() -> ir.Model:
    """Products with a Relu and a residual each, all in bytes."""
    random = np.random.default_rng(0)
    weights = [numpy_helper.from_array((random.normal(size=(WIDTH, WIDTH)) / 8).astype(np.float32), f"w{i}")
               for i in range(DEPTH)]  # fmt: skip
    nodes = []
    for i in range(DEPTH):
        nodes += [
            helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"p{i}"], f"product_{i}"),
            helper.make_node("Relu", [f"p{i}"], [f"r{i}"], f"relu_{i}"),
            helper.make_node("Add", [f"r{i}", f"x{i}"], [f"x{i + 1}"], f"sum_{i}"),
        ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [16, WIDTH]) for name in ("x0", f"x{DEPTH}"))
    graph = helper.make_graph(nodes, "deep", [x], [y], weights)
    model = importer.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    shapes.infer(model)
    samples = [{"x0": random.normal(size=(16, WIDTH)).astype(np.float32)} for _ in range(4)]
    ranges = calibrate(model, samples, "minmax")
    return formats.apply(model, dict.fromkeys(formats.quantizable(model), "int8"), ranges)


def spoiled(entry: Kernel) -> Kernel:
    """A kernel that takes the sums of one layer for 2 % larger than they are."""

    def generate(build: Any, node: Any, **tactic: Any) -> None:
        if WRONG in node.origins:
            larger = expressions.parse("Cast %0 -> float32; Mul $0 1.02 -> float32; Cast $1 -> int32")
            names = ["sums", *range(len(node.inputs) - 2)]
            whole, _ = expressions.compose(node.epilogue, larger, 0, names, ["sums"])
            node = build.node = replace(node, epilogue=whole)
        entry.generate(build, node, **tactic)

    generate.__module__ = entry.generate.__module__
    return replace(entry, generate=generate)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that are chosen for these products, spoiled."""
    plan = ingot.build(deep(), level=0, verify=False).variants[0].plan
    chosen = {step.kernel for part in plan.segments if isinstance(part, NativeSegment) for step in part.steps}
    table = {key: [spoiled(e) if key[0] == "Linear" and e.name in chosen else e for e in entries]
             for key, entries in kernels._TABLE.items()}  # fmt: skip
    monkeypatch.setattr(kernels, "_TABLE", table)


def test_a_sound_engine_passes() -> None:
    engine = ingot.build(deep(), level=0)
    assert all(found["passed"] for found in engine.details["evidence"])
    assert not [notice for notice in last_log().notices if notice.kind == "dropped tactic"]


def test_a_wrong_kernel_is_dropped_and_named(planted: None) -> None:
    engine = ingot.build(deep(), level=0)
    dropped = [notice for notice in last_log().notices if notice.kind == "dropped tactic"]
    assert dropped and all(WRONG in notice.node and "the model's own numbers" in notice.reason for notice in dropped)
    assert all(found["passed"] for found in engine.details["evidence"])


def test_from_end_to_end_it_would_have_passed(planted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is no larger than what other roundings do."""
    monkeypatch.setattr(evidence, "compare_steps", lambda *_: None)
    engine = ingot.build(deep(), level=0)
    assert all(found["passed"] for found in engine.details["evidence"])


def test_a_wrong_rewrite_refuses_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fuse_quant.scaled_epilogue

    def wrong(op: Any, node: ir.Node, scales: Any, per_channel: bool) -> Any:
        spoilt = node.outputs[0].name == WRONG.replace("product_", "p")
        return honest(op, node, scales * np.float32(1.02 if spoilt else 1.0), per_channel)

    monkeypatch.setattr(fuse_quant, "scaled_epilogue", wrong)
    with pytest.raises(VerificationFailed, match=rf"{WRONG}.*given the model's own numbers, what this step computes"):
        ingot.build(deep(), level=0)

"""Kernels that round more than a build allows are not offered, node by node; what is taken of the others is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ingot
from ingot import kernels
from ingot.kernels.cpu.standalone import native_isa
from ingot.kernels.node import Node
from ingot.report import last_log

pytestmark = pytest.mark.skipif(native_isa() is None, reason="needs AVX2")


def two_layers() -> onnx.ModelProto:
    """The weights of the first are small, of the second large."""
    weights = [numpy_helper.from_array(np.full((16, 16), n, np.float32), f"w{n}") for n in (1, 5)]
    nodes = [helper.make_node("MatMul", [x, w], [y], name)
             for x, w, y, name in (("x", "w1", "h", "small"), ("h", "w5", "y", "large"))]  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 16]) for n in "xy"]
    graph = helper.make_graph(nodes, "two_layers", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def largest_weight(node: Node) -> float:
    constant = node.input(1).constant
    assert constant is not None
    return float(constant.max()) * 1e-5


def test_an_error_may_depend_on_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._load("cpu")
    exact = [k for k in kernels._TABLE["Linear", "cpu"] if not k.tolerance]
    rough = [replace(k, name=f"rough_{k.name}", tolerance=largest_weight, cost=lambda *_, **__: 1e-3) for k in exact]
    monkeypatch.setitem(kernels._TABLE, ("Linear", "cpu"), [*exact, *rough])
    for allowed in (True, False):
        ingot.build(two_layers(), level=0, exact=not allowed)
        told = [n for n in last_log().notices if n.kind == "approximation"]
        assert [n.node.startswith("rough_") for n in told] == [True] * allowed
        assert all("within 1e-05 of the magnitudes multiplied, in 1 steps" in n.reason for n in told)


def test_a_kernel_may_stand_in_the_place_of_others_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the estimates say; where its error is too large the others are there."""
    kernels._load("cpu")
    exact = [k for k in kernels._TABLE["Linear", "cpu"] if not k.tolerance]
    names = tuple(k.name for k in exact)
    rough = [replace(k, name=f"rough_{k.name}", tolerance=1e-5, cost=lambda *_, **__: 1e9, instead_of=names)
             for k in exact]  # fmt: skip
    monkeypatch.setitem(kernels._TABLE, ("Linear", "cpu"), [*exact, *rough])
    for allowed in (True, False):
        plan = ingot.build(two_layers(), level=0, exact=not allowed).variants[0].plan
        taken = [step.kernel for segment in plan.segments for step in getattr(segment, "steps", ())]
        assert taken and all(name.startswith("rough_") == allowed for name in taken), taken

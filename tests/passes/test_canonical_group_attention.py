"""com.microsoft's GroupQueryAttention in canonical operators, beside the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from ingot.importers.onnx import load
from ingot.ir import oracle, shapes
from ingot.ir.verify import verify
from ingot.passes.canonical import canonicalise
from tests.passes.canonical_harness import Array, check, rejection, same, values

B, H, G, S, D = 2, 4, 2, 5, 8
OP, MICROSOFT = "GroupQueryAttention", "com.microsoft"
ANGLES = np.outer(np.arange(16), 1 / 3 ** np.arange(D // 2)).astype(np.float32)
CACHES = [np.cos(ANGLES), np.sin(ANGLES)]


def projections(new: int = S) -> list[Any]:
    widths = (H * D, G * D, G * D)
    return [values((B, new, width), seed=seed) for seed, width in enumerate(widths)]


def past(held: int) -> list[Array]:
    return [values((B, G, held, D), seed=seed) for seed in (7, 8)]


def lengths(*ends: int) -> Array:
    return np.array([end - 1 for end in ends], np.int32)


def total(number: int) -> Array:
    return np.array(number, np.int32)


def grouped(inputs: list[Any], **given: Any) -> ir.Node:
    settings = {"num_heads": H, "kv_num_heads": G, "outputs": 3, "constants": [6], "rtol": 1e-4, "atol": 1e-5, **given}
    model = check(OP, inputs, domain=MICROSOFT, **settings)
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    return node


@pytest.mark.parametrize("rotary", [{}, {"do_rotary": 1}, {"do_rotary": 1, "rotary_interleaved": 1}])
def test_a_prompt_is_causal(rotary: dict[str, int]) -> None:
    caches = CACHES if rotary else []
    node = grouped([*projections(), None, None, lengths(S, S), total(S), *caches], **rotary)
    assert node.attributes["causal"].value == 1 and len(node.inputs) == 3


@pytest.mark.parametrize("held", [6, 9])
@pytest.mark.parametrize("new", [1, 3])
def test_new_tokens_go_to_the_place_of_their_sequence(held: int, new: int) -> None:
    """A cache that is as long as the longest sequence (6), and one with room for more"""
    inputs = [*projections(new), *past(held), lengths(6, 4), total(6), *CACHES]
    node = grouped(inputs, do_rotary=1)
    assert node.inputs[1].shape == (B, G, held, D) and len(node.inputs) == 4


def test_a_cache_that_grows() -> None:
    node = grouped([*projections(1), *past(5), lengths(6, 6), total(6)])
    assert node.inputs[1].shape == (B, G, 6, D)


def test_settings() -> None:
    packed = values((B, S, (H + 2 * G) * D))
    inputs = [packed, None, None, None, None, lengths(S, S), total(S)]
    node = grouped(inputs, local_window_size=3, softcap=5.0, scale=0.3)
    assert node.attributes["softcap"].value == 5.0 and len(node.inputs) == 4


def test_positions_and_an_added_bias() -> None:
    places = np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])
    bias = values((1, H, S, S), seed=9)
    grouped([*projections(), None, None, lengths(S, S), total(S), *CACHES, places, bias], do_rotary=1)


@pytest.mark.parametrize(
    ("inputs", "given", "reason"),
    [([None, None, lengths(S, S), total(S)], {"constants": []}, "known only at run time"),
     ([None, None, lengths(S, S), total(S)], {"smooth_softmax": 1}, "has a sink"),
     ([None, None, lengths(7, 7), total(7)], {}, "no cache"),
     ([None, None, lengths(S, S), total(S), None, None, None, values((1, H, S, 9))], {}, "its bias is for 9 keys")],
)  # fmt: skip
def test_what_is_refused_by_name(inputs: list[Any], given: dict[str, Any], reason: str) -> None:
    settings = {"constants": [6], "num_heads": H, "kv_num_heads": G, "outputs": 3, **given}
    assert reason in rejection(OP, [*projections(), *inputs], domain=MICROSOFT, **settings)


def step() -> onnx.ModelProto:
    """One step of a decoder as ONNX Runtime's builder writes it: lengths come from the attention mask."""
    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Shape", ["mask"], ["sizes"]), node("Gather", ["sizes", "one"], ["longest"]),
        node("Cast", ["longest"], ["total"], to=onnx.TensorProto.INT32),
        node("ReduceSum", ["mask", "axis"], ["ends"], keepdims=0), node("Sub", ["ends", "one"], ["last"]),
        node("Cast", ["last"], ["lengths"], to=onnx.TensorProto.INT32),
        node(OP, ["q", "k", "v", "pk", "pv", "lengths", "total"], ["y", "key", "value"], domain=MICROSOFT, name="step",
             num_heads=H, kv_num_heads=G),
    ]  # fmt: skip
    float_, int_ = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    inputs = [info("mask", int_, ["B", "T"]), info("q", float_, ["B", 1, H * D])]
    inputs += [info(name, float_, ["B", 1, G * D]) for name in "kv"]
    inputs += [info(name, float_, ["B", G, "P", D]) for name in ("pk", "pv")]
    outputs = [info("y", float_, ["B", 1, H * D])]
    outputs += [info(name, float_, ["B", G, None, D]) for name in ("key", "value")]
    weights = [helper.make_tensor("one", int_, [], [1]), helper.make_tensor("axis", int_, [1], [1])]
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    graph = helper.make_graph(nodes, "step", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def test_lengths_that_come_from_the_mask() -> None:
    model = load(step())
    shapes.infer(model)
    report = canonicalise(model)
    verify(model)
    assert not report.remaining, report.remaining
    assert shapes.shape_of(model.graph.outputs[1]) == ("B", G, "max(P,T)", D)
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
    feeds = dict(zip(("mask", "q", "k", "v", "pk", "pv"), [mask, *projections(1), *past(5)], strict=True))
    bound = shapes.specialize(model, {name: array.shape for name, array in feeds.items()})
    same(oracle.evaluate_model(bound, feeds), oracle.evaluate_model(step(), feeds), 1e-4, 1e-5)

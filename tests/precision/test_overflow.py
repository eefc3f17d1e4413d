"""float16 that would overflow: observed on data, kept in float32, named with its range."""

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import ingot
from ingot.compiler import optimise
from ingot.config import BuildConfig
from ingot.importers import onnx as importer
from ingot.ir import shapes
from ingot.ir.oracle import compile_model, trace_model
from ingot.precision import overflow
from ingot.report import BuildLog

NODES = [
    ("MatMul", ["x", "w"], "h"), ("ReduceMean", ["h", "last"], "mean"), ("Sub", ["h", "mean"], "centred"),
    ("Pow", ["centred", "two"], "squares"), ("ReduceMean", ["squares", "last"], "variance"),
    ("Add", ["variance", "epsilon"], "sum"), ("Sqrt", ["sum"], "deviation"), ("Div", ["centred", "deviation"], "norm"),
    ("MatMul", ["norm", "v"], "y"),
]  # fmt: skip


def layer_norm() -> onnx.ModelProto:
    """A product, a norm written out as exporters do, a product."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((64, 64)) * 40, "v": rng.standard_normal((64, 8)) / 8, "two": 2.0, "epsilon": 1e-5,
    }  # fmt: skip
    weights = [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in constants.items()]
    weights.append(numpy_helper.from_array(np.array([-1]), "last"))
    nodes = [helper.make_node(op, inputs, [output], f"the_{output}") for op, inputs, output in NODES]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])
    graph = helper.make_graph(nodes, "layer_norm", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def imported() -> onnx_ir.Model:
    model = importer.load(layer_norm())
    shapes.infer(model)
    return model


def samples(scale: float) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": (rng.standard_normal((4, 64)) * scale).astype(np.float32)} for _ in range(3)]


def naively_cast(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything in float16, as converters do."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


def halved(model: onnx_ir.Model, overflows: dict[str, overflow.Range], log: BuildLog) -> onnx_ir.Model:
    """The model as a GPU computes it in float16."""
    config = BuildConfig(target="cuda:sm_90", precision="fp16", overflows=overflows)
    rewritten = optimise(model, config, log)
    assert rewritten is not None
    return rewritten


@pytest.mark.parametrize(("scale", "kept"), [(2.0, []), (100.0, ["h"])])
def test_naive_casting_overflows_and_ingot_holds(scale: float, kept: list[str]) -> None:
    model, data = imported(), samples(scale)
    wanted = compile_model(model)(data[0])["y"]
    half = {"x": data[0]["x"].astype(np.float16)}
    assert np.isinf(trace_model(naively_cast(layer_norm()), half)["squares"]).any()

    found = overflow.find(model, overflow.observe(model, data))
    log = BuildLog()
    mine = compile_model(halved(model, overflow.kept(found), log))(data[0])["y"]
    assert np.isfinite(mine).all() and np.abs(mine - wanted).max() < 0.01 * np.abs(wanted).max()

    assert "the_squares" in [o.node for o in found if o.inside]
    assert [o.value for o in found if not o.inside] == kept
    assert [n.node for n in log.notices if n.kind == "kept in float32"] == [f"the_{name}" for name in kept]


def test_without_the_analysis_the_large_tensor_is_lost() -> None:
    model, data = imported(), samples(100.0)
    mine = compile_model(halved(model, {}, BuildLog()))(data[0])["y"]
    assert not np.isfinite(mine).all()


def test_the_range_is_that_of_the_samples_and_said() -> None:
    model, data = imported(), samples(100.0)
    ranges = overflow.observe(model, data)
    h = np.concatenate([trace_model(model, sample)["h"] for sample in data])
    assert ranges["h"] == (h.min(), h.max())
    said = [str(o) for o in overflow.find(model, ranges) if o.value == "h"]
    assert said == [f"the_h: h ranges from {h.min():.4g} to {h.max():.4g}; kept in float32"]


def test_small_numbers_keep_everything_narrow() -> None:
    model = imported()
    assert overflow.find(model, overflow.observe(model, samples(0.01))) == []


def test_an_engine_for_a_gpu_says_what_it_keeps() -> None:
    model, data = imported(), samples(100.0)
    overflows = overflow.kept(overflow.find(model, overflow.observe(model, data)))
    engine = ingot.build(model, target="cuda:sm_90", precision="fp16", overflows=overflows, level=0, verify=False,
                         profiles=[ingot.Profile(x=(4, 64))])  # fmt: skip
    assert any(notice.startswith("kept in float32: the_h: h ranges from") for notice in engine.details["notices"])
    assert engine.details["config"]["overflows"].keys() == {"h"}

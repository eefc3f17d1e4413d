"""What the ONNX importer accepts, what it makes of it, and how it refuses the rest."""

import json
import os
import time
import warnings

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from ingot.errors import ImportFailure, UnsupportedOperator
from ingot.importers.onnx import ModelWarning, load
from ingot.ir import oracle, shapes
from ingot.ir.provenance import merged_origins, origins, set_origins

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
WEIGHT = np.arange(4096, dtype=np.float32).reshape(64, 64) / 4096


def parsed(text, header=HEADER):
    return onnx.parser.parse_model(f"{header} {text}")


def with_weight(weight=WEIGHT, ir_version=8):
    """y = x @ w"""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64])],
        [numpy_helper.from_array(weight, "w")])  # fmt: skip
    if ir_version < 4:
        graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, list(weight.shape)))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)


def result(model):
    x = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 64)
    return oracle.evaluate_model(model, {"x": x})["y"], x @ WEIGHT


# sources


@pytest.mark.parametrize("form", ["path", "text path", "bytes", "proto", "ir"])
def test_every_source_gives_the_same_graph(form, tmp_path):
    proto = with_weight()
    onnx.save(proto, tmp_path / "m.onnx")
    before = proto.SerializeToString()
    source = {"path": tmp_path / "m.onnx", "text path": str(tmp_path / "m.onnx"), "bytes": before, "proto": proto,
              "ir": onnx_ir.from_proto(proto)}[form]  # fmt: skip
    model = load(source)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert list(model.graph.initializers) == ["w"]
    np.testing.assert_allclose(*result(model))
    assert proto.SerializeToString() == before
    if form == "ir":
        assert list(source.graph.initializers) == ["w"]
        np.testing.assert_array_equal(source.graph.initializers["w"].const_value.numpy(), WEIGHT)


@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_are_no_inputs_whatever_the_ir_version(ir_version):
    model = load(with_weight(ir_version=ir_version))
    assert [value.name for value in model.graph.inputs] == ["x"]
    np.testing.assert_allclose(*result(model))
    np.testing.assert_allclose(*result(load(model)))


def test_weights_are_views_of_the_file(tmp_path):
    onnx.save(with_weight(), tmp_path / "m.onnx")
    array = load(tmp_path / "m.onnx").graph.initializers["w"].const_value.numpy()
    assert not array.flags.owndata and not array.flags.writeable


def test_an_imported_model_can_be_saved_and_imported_again(tmp_path):
    onnx_ir.save(load(with_weight()), tmp_path / "again.onnx")
    np.testing.assert_allclose(*result(load(tmp_path / "again.onnx")))


def test_a_resnet_sized_model_loads_in_a_blink(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(50)], "g",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["N", 716])],
        [helper.make_tensor_value_info("h50", TensorProto.FLOAT, ["N", 716])],
        [numpy_helper.from_array(np.zeros((716, 716), np.float32), f"w{i}") for i in range(50)])  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        load(tmp_path / "m.onnx")
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


# external data


def external(folder, **changes):
    proto = with_weight()
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    proto = onnx.load(folder / "m.onnx", load_external_data=False)
    tensor = proto.graph.initializer[0]
    entries = {entry.key: entry.value for entry in tensor.external_data} | changes
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def test_external_data_is_mapped(tmp_path):
    model = load(external(tmp_path))
    assert isinstance(model.graph.initializers["w"].const_value, onnx_ir.ExternalTensor)
    np.testing.assert_allclose(*result(model))


def test_external_data_beyond_two_gigabytes(tmp_path):
    size = 2**31 + 4096
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(size)  # sparse: nothing is written, and loading must not read it either
    tensor = TensorProto(name="w", data_type=TensorProto.INT8, dims=[size // 4096, 4096], data_location=1)
    tensor.external_data.add(key="location", value="w.bin")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["w", "i"], ["y"])], "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, ["N", 4096])], [tensor])  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    outputs = oracle.evaluate_model(model, {"i": np.array([size // 4096 - 1])})
    assert outputs["y"].shape == (1, 4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"location": "gone.bin"}, "missing"),
        ({"location": "../w.bin"}, "outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": ""}, "outside the model's folder"),
        ({"offset": 16384}, "does not fit"),
        ({"length": 7}, "does not fit"),
        ({"offset": -8}, "does not fit"),
        ({"offset": "many"}, "damaged external_data"),
    ],
)
def test_external_data_that_cannot_be_right(tmp_path, changes, message):
    with pytest.raises(ImportFailure, match=message) as caught:
        load(external(tmp_path, **changes))
    assert "'w'" in str(caught.value)


def test_external_data_behind_a_link_is_outside(tmp_path):
    (tmp_path / "inside").mkdir()
    path = external(tmp_path / "inside")
    os.rename(tmp_path / "inside" / "w.bin", tmp_path / "w.bin")
    os.symlink(tmp_path / "w.bin", tmp_path / "inside" / "w.bin")
    with pytest.raises(ImportFailure, match="outside"):
        load(path)


def test_external_data_needs_a_path(tmp_path):
    with pytest.raises(ImportFailure, match="give the model's path"):
        load(external(tmp_path).read_bytes())


# what the graph looks like afterwards

FUNCTIONS = """
g (float[N,4] x) => (float[N,4] y) {
  a = local.Twice<factor = 3.0>(x)
  y = local.Twice(a)
}
<domain: "local", opset_import: ["" : 17]>
Twice <factor: float = 2.0>(v) => (r) { f = Constant<value_float: float = @factor>() r = Mul(v, f) }
"""


def test_local_functions_disappear():
    model = load(parsed(FUNCTIONS, '<ir_version: 9, opset_import: ["" : 17, "local" : 1]>'))
    assert not model.functions
    assert {node.op_type for node in model.graph} == {"Constant", "Mul"}
    x = np.float32([[1, 2, 3, 4]])
    np.testing.assert_allclose(oracle.evaluate_model(model, {"x": x})["y"], x * 6)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert all(origins(node) for node in model.graph)


def test_a_function_of_another_opset_is_fine_while_its_operators_are_the_same():
    text = FUNCTIONS.replace('opset_import: ["" : 17]', 'opset_import: ["" : 16]')
    model = load(parsed(text, '<ir_version: 9, opset_import: ["" : 17, "local" : 1]>'))
    x = np.float32([[1, 2, 3, 4]])
    np.testing.assert_allclose(oracle.evaluate_model(model, {"x": x})["y"], x * 6)


def test_a_function_whose_operators_differ_is_refused_by_name():
    text = """g (float[N,4] x) => (float[1] y) { y = local.Total(x) }
      <domain: "local", opset_import: ["" : 11]> Total (v) => (r) { r = ReduceSum<axes = [0, 1], keepdims = 0>(v) }"""
    with pytest.raises(ImportFailure, match=r"Total.*ReduceSum|ReduceSum"):
        load(parsed(text, '<ir_version: 9, opset_import: ["" : 17, "local" : 1]>'))


def test_every_node_has_a_unique_name_and_is_its_own_origin():
    proto = parsed("g (float[4] x) => (float[4] y) { a = Relu(x) b = Relu(a) y = Relu(b) }")
    for node, name in zip(proto.graph.node, ["", "twin", "twin"], strict=True):
        node.name = name
    nodes = list(load(proto).graph)
    assert [node.name for node in nodes] == ["Relu_0", "twin", "twin_2"]
    assert [origins(node) for node in nodes] == [("Relu_0",), ("twin",), ("twin_2",)]
    set_origins(nodes[0], ["b", "a", "b"])
    assert json.loads(nodes[0].metadata_props["ingot.nodes"]) == ["b", "a"]
    assert merged_origins(nodes[:2]) == ("b", "a", "twin")


def test_dimensions_become_legal_symbols():
    text = "g (float[?,unk__3,batch size,u0,-1,2*N,max] x) => (float[A,B,C,D,E,F,G] y) { y = Relu(x) }"
    proto = parsed("g (float[a,b,c,d,e,f,h] x) => (float[A,B,C,D,E,F,G] y) { y = Relu(x) }")
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    for dim, value in zip(dims, text.split("[")[1].split("]")[0].split(","), strict=True):
        dim.Clear()
        if value == "-1":
            dim.dim_value = -1
        elif value != "?":
            dim.dim_param = value
    model = load(proto)
    (x,) = model.graph.inputs
    assert shapes.shape_of(x) == ("x_0", "unk__3", "batch_size", "d_u0", "x_4", "N*2", "d_max")


def test_sparse_constants_become_dense():
    dense = np.float32([0, 5, 0, 7])
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(np.float32([5, 7]), "s"),
                                       numpy_helper.from_array(np.int64([1, 3]), "i"), [4])  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], sparse_value=sparse), helper.make_node("Add", ["x", "c"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])])  # fmt: skip
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    np.testing.assert_array_equal(oracle.evaluate_model(model, {"x": dense})["y"], dense * 2)


def test_nan_weights_are_named():
    weight = WEIGHT.copy()
    weight[3, 5] = np.nan
    with pytest.warns(ModelWarning, match="initializer 'w' holds 1 NaN"):
        load(with_weight(weight))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(with_weight(np.where(np.eye(64), np.inf, -np.inf).astype(np.float32)))


# refusals

BAD = {
    "cyclic": ("g (float[4] x) => (float[4] y) { a = Add(x, b) b = Relu(a) y = Relu(b) }", "topologically sorted.*'b'"),
    "undefined": ("g (float[4] x) => (float[4] y) { y = Add(x, nowhere) }", "nowhere"),
    "duplicate": ("g (float[4] x) => (float[4] y) { y = Relu(x) y = Abs(x) }", "'y' has been used"),
    "no producer": ("g (float[4] x) => (float[4] y) { z = Relu(x) }", "'y' is not an output"),
    "contradicting shapes": ("g (float[2,3] x) => (float[2,4] y) { y = Relu(x) }", r"Relu.*\(3\) vs \(4\)"),
    "incompatible product": ("g (float[2,3] x, float[4,5] w) => (float[2,5] y) { y = MatMul(x, w) }", "MatMul"),
    "wrong type": ("g (float[2] x) => (int64[2] y) { y = Relu(x) }", "Relu"),
    "unknown operator": ("g (float[2] x) => (float[2] y) { y = NoSuchThing(x) }", "NoSuchThing"),
    "missing attribute": ("g (float[2] x) => (int64[2] y) { y = Cast(x) }", "Cast.*to|to.*Cast"),
    "unknown attribute": ("g (float[2] x) => (float[2] y) { y = Relu<slope=1>(x) }", "slope"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_malformed_graphs(text, message):
    with pytest.raises(ImportFailure, match=message) as caught:
        load(parsed(text))
    assert "\n" not in str(caught.value)


def test_unknown_domains_are_refused_by_name():
    proto = parsed("g (float[2] x) => (float[2] y) { a = acme.Foo(x) b = acme.Bar(a) y = acme.Foo(b) }",
                   '<ir_version: 8, opset_import: ["" : 17, "acme" : 1]>')  # fmt: skip
    with pytest.raises(UnsupportedOperator, match=r"acme::Foo \(node 'Foo_0'\), acme::Bar \(node 'Bar_1'\).*plugin"):
        load(proto)


@pytest.mark.parametrize("version", [5, 29, 0, -3])
def test_other_opsets(version):
    proto = parsed("g (float[2] x) => (float[2] y) { y = Add(x, x) }")
    proto.opset_import[0].version = version
    with pytest.raises(ImportFailure, match=f"opset {version}, Ingot reads 6 to 28"):
        load(proto)


def test_old_opsets_are_fine_while_nothing_changed():
    proto = parsed("g (bool[2] x) => (bool[2] y) { y = Not(x) }")
    proto.opset_import[0].version = 1
    assert len(load(proto).graph) == 1


def test_two_versions_of_a_domain():
    proto = parsed("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    proto.opset_import.add(domain="ai.onnx", version=13)
    with pytest.raises(ImportFailure, match="two versions: 17 and 13"):
        load(proto)


def test_files_that_are_no_models(tmp_path):
    whole = with_weight().SerializeToString()
    for name, content in {"truncated": whole[:-100], "random": np.random.default_rng(0).bytes(500), "text": b"hello\n",
                          "empty": b"", "another message": helper.make_opsetid("", 3).SerializeToString()}.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(ImportFailure, match=name):
            load(path)
        with pytest.raises(ImportFailure):
            load(content)
    with pytest.raises(ImportFailure, match=r"gone\.onnx cannot be read: No such file"):
        load(tmp_path / "gone.onnx")
    with pytest.raises(ImportFailure, match="cannot be read"):
        load(tmp_path)
    with pytest.raises(ImportFailure, match="cannot import a int"):
        load(3)


def test_raw_data_of_the_wrong_size():
    proto = with_weight()
    proto.graph.initializer[0].raw_data += b"1234"
    with pytest.raises(ImportFailure, match="w"):
        load(proto)


def test_a_tensor_with_two_kinds_of_data():
    proto = with_weight()
    proto.graph.initializer[0].float_data.append(1.0)
    with pytest.raises(ImportFailure, match="w"):
        load(proto)

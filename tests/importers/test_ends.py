"""Inputs and outputs in another floating type than the model's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import ingot
from ingot.config import BuildConfig
from ingot.errors import ConfigError
from ingot.tools.build_engine import types_from


def model(nodes: list[onnx.NodeProto], inputs: dict[str, int], outputs: dict[str, int]) -> onnx.ModelProto:
    def values(kinds: dict[str, int]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, kind, [3, 4]) for name, kind in kinds.items()]

    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def summed() -> onnx.ModelProto:
    nodes = [helper.make_node("Add", ["x", "x"], ["s"]), helper.make_node("Relu", ["s"], ["y"]),
             helper.make_node("Identity", ["k"], ["l"])]  # fmt: skip
    integers = TensorProto.INT64
    return model(nodes, {"x": TensorProto.FLOAT, "k": integers}, {"y": TensorProto.FLOAT, "l": integers})


@pytest.mark.parametrize("target", ["cpu", "host"])
def test_one_type_for_all_leaves_integers_alone(target: str) -> None:
    config = BuildConfig(target=target, level=0, input_types=("float16",), output_types=("float16",))
    engine = ingot.build(summed(), config)
    assert [(s.name, s.dtype) for s in engine.inputs] == [("x", "float16"), ("k", "int64")]
    assert [(s.name, s.dtype) for s in engine.outputs] == [("y", "float16"), ("l", "int64")]
    x = np.linspace(-2, 2, 12, dtype=np.float16).reshape(3, 4)
    with ingot.Session(engine) as session:
        y = session.run({"x": x, "k": np.zeros((3, 4), np.int64)})["y"]
    np.testing.assert_array_equal(y, np.maximum(x + x, 0))


def test_a_16_bit_engine_has_no_conversion_at_its_ends() -> None:
    """Each would be a launch of its own."""
    config = BuildConfig(target="cuda:sm_90", precision="fp16", level=0, verify=False)
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=1)]
    one = model(nodes, {"x": TensorProto.FLOAT}, {"y": TensorProto.FLOAT})
    plain = ingot.build(one, config)
    ends = {"input_types": ("float16",), "output_types": ("float16",)}
    narrow = ingot.build(one, replace(config, **ends))  # type: ignore[arg-type]
    steps = [[s.op for segment in e.variants[0].plan.segments for s in segment.steps] for e in (plain, narrow)]  # type: ignore[union-attr]
    assert len(steps[0]) > len(steps[1])
    assert steps[1] == ["Softmax"]


def test_one_for_each() -> None:
    config = BuildConfig(level=0, input_types=("float16", ""), output_types=())
    engine = ingot.build(summed(), config)
    assert [s.dtype for s in engine.inputs] == ["float16", "int64"]
    assert [s.dtype for s in engine.outputs] == ["float32", "int64"]


@pytest.mark.parametrize("types, said", [(("float16",) * 3, "3 types are given for 2 inputs"),
                                         (("float16", "float16"), "'k' is int64 and cannot be float16")])  # fmt: skip
def test_what_does_not_fit_is_refused(types: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ingot.build(summed(), BuildConfig(level=0, input_types=types))


def test_what_is_no_floating_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be given as 'int8'"):
        BuildConfig(output_types=("int8",))


def test_what_is_handed_on_stays() -> None:
    handing = model([helper.make_node("Relu", ["x"], ["y"])], {"x": TensorProto.FLOAT},
                    {"x": TensorProto.FLOAT, "y": TensorProto.FLOAT})  # fmt: skip
    config = BuildConfig(level=0, target="host", input_types=("float16",), output_types=("float16",))
    engine = ingot.build(handing, config)
    assert [s.dtype for s in engine.inputs] == ["float32"]
    assert [(s.name, s.dtype) for s in engine.outputs] == [("x", "float32"), ("y", "float16")]


def test_trtexecs_formats() -> None:
    assert types_from("fp16:chw,int64:chw,fp32") == ("float16", "", "float32")
    assert types_from("") == ()
    for wrong in ("fp16:hwc8", "fp61:chw"):
        with pytest.raises(ConfigError, match="there is no format"):
            types_from(wrong)


def test_the_command_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ingot.cli import main

    onnx.save(summed(), tmp_path / "m.onnx")
    words = ["trtexec", f"--onnx={tmp_path / 'm.onnx'}", f"--saveEngine={tmp_path / 'm.engine'}", "--skipInference",
             "--inputIOFormats=fp16:chw,int64:chw", "--outputIOFormats=fp16:chw,int64:chw"]  # fmt: skip
    assert main(words) == 0, capsys.readouterr().err
    assert ingot.Engine.load(tmp_path / "m.engine").inputs[0].dtype == "float16"


def test_an_input_that_is_read_twice_needs_no_conversion_either() -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["s"], axis=1), helper.make_node("Relu", ["s"], ["r"]),
             helper.make_node("Softmax", ["r"], ["t"], axis=1), helper.make_node("Add", ["t", "x"], ["y"])]  # fmt: skip
    one = model(nodes, {"x": TensorProto.FLOAT}, {"y": TensorProto.FLOAT})
    config = BuildConfig(target="cuda:sm_90", precision="fp16", level=0, verify=False, input_types=("float16",))
    steps = [s.op for segment in ingot.build(one, config).variants[0].plan.segments for s in segment.steps]  # type: ignore[union-attr]
    assert steps == ["Softmax", "Pointwise", "Softmax", "Pointwise"]

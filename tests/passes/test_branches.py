"""If: decided conditions, and branches that the allowed shapes make impossible."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import ingot
from ingot.errors import InputError


def model(channels: int) -> onnx.ModelProto:
    """y = flag ? conv(x) with weights for 3 channels : 2 x"""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(9).astype(np.float32)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 3, 1], values.tobytes(), raw=True)
    two = helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])

    def branch(name: str, op: str, inputs: list[str]) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, inputs, [name], name=f"{name}_{op}")], name, [], [out])

    node = helper.make_node("If", ["flag"], ["y"], name="choice", then_branch=branch("t", "Conv", ["x", "w"]),
                            else_branch=branch("e", "Mul", ["x", "two"]))  # fmt: skip
    graph = helper.make_graph(
        [node], "branches",
        [helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
         helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, channels, 4])], [weight, two],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_a_branch_is_taken_at_run_time() -> None:
    engine = ingot.build(model(3), level=0)
    assert not engine.variants[0].plan.host_steps
    x = np.ones((1, 3, 4), np.float32)
    with ingot.Session(engine) as session:
        np.testing.assert_array_equal(session.run({"flag": np.array(False), "x": x})["y"], 2 * x)
        assert session.run({"flag": np.array(True), "x": x})["y"].shape == (1, 3, 4)


def test_an_impossible_branch_is_one_error() -> None:
    x = np.ones((1, 5, 4), np.float32)
    engine = ingot.build(model(5), level=0, inputs={"flag": np.array(False), "x": x})
    assert not engine.variants[0].plan.host_steps
    with ingot.Session(engine) as session:
        np.testing.assert_array_equal(session.run({"flag": np.array(False), "x": x})["y"], 2 * x)
        with pytest.raises(InputError, match=r"then branch of 'choice' cannot run.*'t_Conv' \(Conv\)"):
            session.run({"flag": np.array(True), "x": x})

"""Operators that move elements against the oracle, static and symbolic."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from tests.passes.canonical_harness import canonical_model, check, check_symbolic, node_model, rejection, values


def ints(*numbers: int) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.int64)


@pytest.mark.parametrize("target", [(6, 4), (-1, 4), (0, 12), (2, 3, 2, -1), (24,), (1, 24)])
def test_reshape(target: tuple[int, ...]) -> None:
    check("Reshape", [values((2, 3, 4)), ints(*target)], constants=[1], only={"View"})
    check_symbolic("Reshape", [values((2, 3, 4)), ints(-1, 4)], {0: ["N", 3, 4]}, constants=[1])


def test_views() -> None:
    x = values((2, 1, 3, 1))
    check("Flatten", [x], axis=2)
    check("Flatten", [x], version=8, axis=0)
    check("Squeeze", [x, ints(1, 3)], constants=[1])
    check("Squeeze", [x], version=11, axes=[1])
    check("Squeeze", [x])
    check("Unsqueeze", [x, ints(0, -1)], constants=[1])
    check("Unsqueeze", [x], version=9, axes=[0, 3])
    check_symbolic("Unsqueeze", [values((2, 3)), ints(1)], {0: ["N", "M"]}, constants=[1])


def test_a_view_that_changes_nothing_disappears() -> None:
    model = check("Reshape", [values((2, 3)), ints(2, 3)], constants=[1])
    assert [node.op_type for node in model.graph] == ["View"]  # the graph's output needs a value of its own


@pytest.mark.parametrize("perm", [None, [0, 2, 1], [2, 0, 1], [0, 1, 2]])
def test_transpose(perm: list[int] | None) -> None:
    check("Transpose", [values((2, 3, 4))], **({} if perm is None else {"perm": perm}))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slice(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    axes = data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, unique=True))
    bound = st.integers(-8, 8) | st.sampled_from([2**31 - 1, -(2**63), 2**63 - 1])
    starts, ends = ([data.draw(bound) for _ in axes] for _ in range(2))
    steps = [data.draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in axes]
    signed = [axis - len(sizes) if data.draw(st.booleans()) else axis for axis in axes]
    check("Slice", [values(sizes), ints(*starts), ints(*ends), ints(*signed), ints(*steps)], constants=[1, 2, 3, 4])


@pytest.mark.parametrize(("starts", "ends", "axes", "steps"), [
    ((1,), (2**31 - 1,), (0,), (1,)), ((-2,), (2**63 - 1,), (0,), (1,)), ((0,), (-1,), (0,), (1,)),
    ((1,), (3,), (1,), (1,)),
    ((0,), (2**31 - 1,), (0,), (2,)), ((-1,), (-(2**63),), (0,), (-1,)),
])  # fmt: skip
def test_slice_of_symbolic_axes(starts: Any, ends: Any, axes: Any, steps: Any) -> None:
    inputs = [values((5, 4)), ints(*starts), ints(*ends), ints(*axes), ints(*steps)]
    check_symbolic("Slice", inputs, {0: ["N", "M"]}, constants=[1, 2, 3, 4])


def test_slice_with_attributes() -> None:
    proto = node_model("Slice", [values((4, 5)), ints(1, 0), ints(3, -1)], version=13, constants=[1, 2])
    old = node_model("Neg", [values((4, 5))], version=13)
    old.opset_import[0].version = 9
    old.graph.node[0].CopyFrom(helper.make_node("Slice", ["x0"], ["y0"], name="old", starts=[1, 0], ends=[3, -1]))
    (new_node,), (old_node,) = (list(canonical_model(model)[0].graph) for model in (proto, old))
    assert {name: a.value for name, a in new_node.attributes.items()} == {
        name: a.value for name, a in old_node.attributes.items()
    }


def test_slice_bounds_at_run_time_stay() -> None:
    assert "bounds vary" in rejection("Slice", [values((4, 5)), ints(1), ints(3)])


@pytest.mark.parametrize("version", [6, 11, 13, 28])
def test_split(version: int) -> None:
    if version < 13:
        check("Split", [values((6, 4))], version=version, outputs=3, axis=0, split=[1, 2, 3])
        check("Split", [values((6, 4))], version=version, outputs=2, axis=-1)
    else:
        check("Split", [values((6, 4)), ints(1, 2, 3)], version=version, constants=[1], outputs=3, axis=0)
    if version >= 18:
        check("Split", [values((7, 4))], version=version, outputs=3, axis=0, num_outputs=3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_concat(count: int) -> None:
    check("Concat", [values((2, i + 1, 3), seed=i) for i in range(count)], axis=-2)
    dims = {i: ["N", f"M{i}", 3] for i in range(count)}
    check_symbolic("Concat", [values((2, i + 1, 3), seed=i) for i in range(count)], dims, axis=1)


def test_empty_parts_are_left_out() -> None:
    model = check("Concat", [values((2, 0)), values((2, 3)), values((2, 2))], axis=1)
    assert len(model.graph[0].inputs) == 2


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("pads", [(1, 0, 0, 2), (0, 0, 0, 0), (2, 2, 2, 2)])
def test_pad(mode: str, pads: tuple[int, ...]) -> None:
    check("Pad", [values((4, 5)), ints(*pads)], constants=[1], mode=mode)


def test_pad_forms() -> None:
    x, fill = values((4, 5)), np.array(1.5, np.float32)
    check("Pad", [x], version=8, pads=[1, 0, 0, 2], value=2.5)
    check("Pad", [x, ints(1, 2), fill, ints(-1)], constants=[1, 2, 3])
    check("Pad", [x, ints(1, 0, 0, 2), fill], constants=[1])
    check("Pad", [values((4, 5), "int64"), ints(1, 1, 1, 1), np.array(2**40)], constants=[1, 2])
    check_symbolic("Pad", [x, ints(1, 0, 0, 2)], {0: ["N", 5]}, constants=[1])
    assert "pads vary" in rejection("Pad", [x, ints(1, 0, 0, 2)])


def test_expand_and_tile() -> None:
    check("Expand", [values((3, 1)), ints(2, 1, 4)], constants=[1], only={"Expand"})
    check("Expand", [values((3, 1)), ints(3, 1)], constants=[1])
    check("Tile", [values((2, 3)), ints(2, 1)], constants=[1], only={"Tile"})
    check("Tile", [values((2, 3)), ints(1, 1)], constants=[1])
    check_symbolic("Tile", [values((2, 3)), ints(2, 3)], {0: ["N", 3]}, constants=[1])


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space(mode: str) -> None:
    check("DepthToSpace", [values((2, 8, 3, 2))], version=13, blocksize=2, mode=mode, only={"View", "Transpose"})
    check("DepthToSpace", [values((2, 8, 3, 2))], version=9, blocksize=2)
    check("SpaceToDepth", [values((2, 3, 4, 6))], version=13, blocksize=2, only={"View", "Transpose"})
    check_symbolic("DepthToSpace", [values((2, 8, 3, 2))], {0: ["N", 8, "H", "W"]}, version=13, blocksize=2, mode=mode)


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("diagonal", [None, 0, 2, -1, -100])
def test_trilu(upper: int, diagonal: int | None) -> None:
    x, k = values((2, 4, 5)), None if diagonal is None else np.array(diagonal)
    inputs = [x] if k is None else [x, k]
    check("Trilu", inputs, constants=[1], upper=upper)
    check_symbolic("Trilu", inputs, {0: ["B", "N", "M"]}, constants=[1], upper=upper)
    check("Trilu", inputs, upper=upper)


def test_reverse_sequence() -> None:
    x = values((4, 3, 2))
    check("ReverseSequence", [x, ints(4, 2, 1)])
    check("ReverseSequence", [x, ints(1, 3, 2, 3)], time_axis=1, batch_axis=0)
    check_symbolic("ReverseSequence", [x, ints(4, 2, 1)], {0: ["T", "B", 2], 1: ["B"]})


def test_center_crop_pad_and_col2im() -> None:
    check("CenterCropPad", [values((5, 8)), ints(8, 5)], constants=[1])
    check("CenterCropPad", [values((5, 8)), ints(4)], constants=[1], axes=[1])
    check("Col2Im", [values((1, 5, 5)), ints(5, 5), ints(1, 5)], constants=[1, 2])
    check("Col2Im", [values((2, 8, 9)), ints(5, 5), ints(2, 2)], constants=[1, 2], dilations=[2, 2])
    check("Col2Im", [values((1, 9, 9)), ints(5, 5), ints(3, 3)], constants=[1, 2], strides=[2, 2], pads=[1, 1, 1, 1])


def test_dropout_in_inference() -> None:
    x = values((3, 4))
    check("Dropout", [x])
    check("Dropout", [x], outputs=2)
    check("Dropout", [x, np.array(0.3, np.float32), np.array(False)], constants=[1, 2], outputs=2)
    assert "at random" in rejection("Dropout", [x, np.array(0.3, np.float32), np.array(True)], constants=[1, 2])


def shape_model(*nodes: Any, output: Any, dims: list[str | int], constants: dict[str, Any]) -> Any:
    """A model over x[dims]."""
    graph = helper.make_graph(
        list(nodes), "graph", [helper.make_tensor_value_info("x", 1, dims)], [output],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def run_symbolic(proto: Any, x: np.ndarray[Any, Any]) -> list[str]:
    """Compares with the oracle; returns the canonical operators."""
    from ingot.ir import oracle, shapes
    from tests.passes.canonical_harness import same

    model, report = canonical_model(proto)
    assert not report.remaining, report.remaining
    bound = shapes.specialize(model, {"x": x.shape})
    same(oracle.evaluate_model(bound, {"x": x}), oracle.evaluate_model(proto, {"x": x}), 1e-6, 1e-6)
    return [node.op_type for node in model.graph]


def test_shape_arithmetic_dies_in_a_view() -> None:
    proto = shape_model(
        helper.make_node("Shape", ["x"], ["s"], name="s"),
        helper.make_node("Gather", ["s", "zero"], ["n"], name="n"),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"], name="u"),
        helper.make_node("Concat", ["n1", "rest"], ["target"], axis=0, name="c"),
        helper.make_node("Reshape", ["x", "target"], ["y"], name="r"),
        output=helper.make_tensor_value_info("y", 1, [None, None]),
        dims=["N", 3, 4],
        constants={"zero": np.array(0), "axes": ints(0), "rest": ints(-1)},
    )
    assert run_symbolic(proto, values((2, 3, 4))) == ["View"]


def test_sizes_become_elements() -> None:
    proto = shape_model(
        helper.make_node("Shape", ["x"], ["y"], name="s"),
        output=helper.make_tensor_value_info("y", 7, [2]),
        dims=["N", "M"],
        constants={},
    )
    assert set(run_symbolic(proto, values((2, 3)))) <= {"Range", "Concat", "View"}


def test_positions_of_a_symbolic_axis() -> None:
    proto = shape_model(
        helper.make_node("Shape", ["x"], ["s"], name="s", start=1, end=2),
        helper.make_node("Squeeze", ["s"], ["n"], name="q"),
        helper.make_node("Range", ["zero", "n", "one"], ["y"], name="r"),
        output=helper.make_tensor_value_info("y", 7, [None]),
        dims=["N", "M"],
        constants={"zero": np.array(0), "one": np.array(1)},
    )
    assert run_symbolic(proto, values((2, 5))) == ["Range"]


def test_constant_of_symbolic_shape() -> None:
    proto = shape_model(
        helper.make_node("Shape", ["x"], ["s"], name="s"),
        helper.make_node(
            "ConstantOfShape", ["s"], ["y"], name="c", value=numpy_helper.from_array(np.array([2.5], np.float32))
        ),
        output=helper.make_tensor_value_info("y", 1, [None, None]),
        dims=["N", "M"],
        constants={},
    )
    assert run_symbolic(proto, values((2, 5))) == ["Expand"]


def test_eye_of_symbolic_shape() -> None:
    proto = shape_model(
        helper.make_node("EyeLike", ["x"], ["y"], name="e", k=1),
        output=helper.make_tensor_value_info("y", 1, [None, None]),
        dims=["N", "M"],
        constants={},
    )
    run_symbolic(proto, values((3, 5)))

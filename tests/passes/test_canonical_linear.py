"""Products, convolutions and pools against the oracle, with drawn shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.canonical_harness import check, check_symbolic, rejection, values


@pytest.mark.parametrize(("a", "b"), [
    ((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)), ((2, 3, 4), (2, 4, 5)),
    ((2, 1, 3, 4), (5, 4, 2)), ((4,), (2, 4, 5)),
])  # fmt: skip
@pytest.mark.parametrize("constant", [True, False])
def test_matmul(a: tuple[int, ...], b: tuple[int, ...], constant: bool) -> None:
    model = check("MatMul", [values(a), values(b, seed=1)], constants=[1] if constant else [])
    wanted = "Linear" if constant and len(b) <= 2 else "MatMul"
    assert wanted in {node.op_type for node in model.graph}


def test_matmul_of_symbolic_batch() -> None:
    check_symbolic("MatMul", [values((2, 3, 4)), values((4, 5), seed=1)], {0: ["N", "S", 4]}, constants=[1])
    check_symbolic("MatMul", [values((2, 3, 4)), values((2, 4, 3), seed=1)], {0: ["N", "S", 4], 1: ["N", 4, "S"]})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32"])
def test_matmul_types(dtype: str) -> None:
    coarse = 3e-2 if dtype == "bfloat16" else 5e-3
    check("MatMul", [values((3, 8), dtype), values((8, 5), dtype, seed=1)], rtol=coarse, atol=coarse)


@pytest.mark.parametrize("transposed", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("bias", [None, (5,), (1, 5), (3, 1), (3, 5), ()])
@pytest.mark.parametrize("constants", [[], [1], [1, 2]])
def test_gemm(transposed: tuple[int, int], bias: tuple[int, ...] | None, constants: list[int]) -> None:
    a, b = values((4, 3) if transposed[0] else (3, 4)), values((5, 4) if transposed[1] else (4, 5), seed=1)
    inputs = [a, b, *([] if bias is None else [values(bias, seed=2)])]
    check("Gemm", inputs, constants=constants, transA=transposed[0], transB=transposed[1], alpha=0.5, beta=1.5)
    check("Gemm", inputs, constants=constants, transA=transposed[0], transB=transposed[1])


@pytest.mark.parametrize(("equation", "shapes"), [
    ("ij,jk->ik", [(2, 3), (3, 4)]), ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
    ("bhqd,bhkd->bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)]),
    ("ij->ji", [(2, 3)]), ("ij->", [(2, 3)]), ("ij->i", [(2, 3)]), ("i,j->ij", [(2,), (3,)]), ("i,i->", [(3,), (3,)]),
    ("...ij,...jk->...ik", [(2, 3, 4), (2, 4, 5)]), ("...i->...", [(2, 3, 4)]), ("ij,jk", [(2, 3), (3, 4)]),
    ("ijk,j->ik", [(2, 3, 4), (3,)]), ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)]), ("bi,bj->bij", [(2, 3), (2, 4)]),
    ("bnd,hd->bhn", [(2, 3, 4), (5, 4)]), ("ij,ij->", [(2, 3), (2, 3)]),
])  # fmt: skip
def test_einsum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    check("Einsum", [values(shape, seed=i) for i, shape in enumerate(shapes)], equation=equation)


def test_einsum_with_a_diagonal_stays() -> None:
    assert "diagonal" in rejection("Einsum", [values((3, 3))], equation="ii->i")


@st.composite
def windows(draw: st.DrawFn) -> dict[str, object]:
    """A window over one to three axes that fits its input."""
    rank = draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    dilations = draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    return {
        "sizes": [span + draw(st.integers(0, 4)) for span in spans],
        "kernel_shape": kernel,
        "dilations": dilations,
        "strides": draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)),
        "pads": [draw(st.integers(0, k - 1)) for k in kernel * 2],
        "auto_pad": draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])),
    }


def attributes_of(window: dict[str, object]) -> dict[str, object]:
    names = ["kernel_shape", "dilations", "strides", "auto_pad", *(["pads"] if window["auto_pad"] == "NOTSET" else [])]
    return {name: window[name] for name in names}


@settings(max_examples=60, deadline=None)
@given(windows(), st.integers(1, 2), st.booleans(), st.booleans(), st.sampled_from([9, 11, 22]))
def test_conv(window: dict[str, object], group: int, bias: bool, constant: bool, version: int) -> None:
    x = values((2, 2 * group, *window["sizes"]))
    weight = values((3 * group, 2, *window["kernel_shape"]), seed=1)
    inputs = [x, weight, *([values((3 * group,), seed=2)] if bias else [])]
    constants = [1, 2] if constant else []
    attributes = {"group": group, **attributes_of(window)}
    check(
        "Conv", inputs, version=version, constants=constants, rtol=1e-4, atol=1e-4, only={"Conv", "View"}, **attributes
    )


@pytest.mark.parametrize("auto_pad", ["NOTSET", "VALID", "SAME_UPPER"])
def test_conv_of_symbolic_size(auto_pad: str) -> None:
    inputs = [values((2, 3, 6, 7)), values((4, 3, 3, 3), seed=1)]
    pads = {"pads": [1, 1, 1, 1]} if auto_pad == "NOTSET" else {}
    check_symbolic("Conv", inputs, {0: ["N", 3, "H", "W"]}, constants=[1], auto_pad=auto_pad, **pads)


@settings(max_examples=60, deadline=None)
@given(windows(), st.integers(1, 2), st.booleans(), st.data())
def test_conv_transpose(window: dict[str, object], group: int, bias: bool, data: st.DataObject) -> None:
    x = values((2, 2 * group, *window["sizes"]))
    weight = values((2 * group, 3, *window["kernel_shape"]), seed=1)
    inputs = [x, weight, *([values((3 * group,), seed=2)] if bias else [])]
    attributes = attributes_of(window)
    if window["auto_pad"] == "NOTSET" and data.draw(st.booleans()):
        attributes["output_padding"] = [data.draw(st.integers(0, s - 1)) for s in window["strides"]]
    if attributes["auto_pad"] in ("SAME_UPPER", "SAME_LOWER"):
        attributes["auto_pad"] = "VALID"  # its shape is defined by the strides alone, see the next test
    check("ConvTranspose", inputs, constants=[1], group=group, rtol=1e-4, atol=1e-4, **attributes)


def test_conv_transpose_to_an_output_shape() -> None:
    inputs = [values((1, 2, 3, 3)), values((2, 2, 3, 3), seed=1)]
    check("ConvTranspose", inputs, rtol=1e-4, atol=1e-5, strides=[3, 2], output_shape=[10, 8])
    check("ConvTranspose", inputs, rtol=1e-4, atol=1e-5, strides=[2, 2], auto_pad="SAME_UPPER")
    check_symbolic("ConvTranspose", inputs, {0: ["N", 2, "H", "W"]}, constants=[1], strides=[2, 2], pads=[1, 1, 1, 1])


@settings(max_examples=80, deadline=None)
@given(windows(), st.sampled_from(["MaxPool", "AveragePool", "LpPool"]), st.integers(0, 1), st.integers(0, 1))
def test_pools(window: dict[str, object], op: str, ceil_mode: int, counted: int) -> None:
    attributes = {**attributes_of(window), "ceil_mode": ceil_mode}
    attributes |= {"count_include_pad": counted} if op == "AveragePool" else {}
    if op == "LpPool":
        attributes |= {"p": 3}
    outputs = 2 if op == "MaxPool" and counted else 1
    check(
        op,
        [values((2, 3, *window["sizes"]))],
        outputs=outputs,
        rtol=1e-4,
        atol=1e-5,
        only={"Pool", "Pad"},
        **attributes,
    )


def test_pool_versions_and_types() -> None:
    check("MaxPool", [values((1, 2, 6, 6))], version=7, kernel_shape=[2, 2], strides=[2, 2])
    check("MaxPool", [values((1, 2, 6, 6), "uint8")], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    check("MaxPool", [values((1, 2, 6, 5))], kernel_shape=[2, 2], strides=[2, 2], storage_order=1, outputs=2)
    check("AveragePool", [values((1, 2, 6, 6), "float16")], kernel_shape=[2, 2], rtol=2e-3, atol=2e-3)
    check("GlobalAveragePool", [values((2, 3, 4, 5))], only={"Reduce"})
    check("GlobalMaxPool", [values((2, 3, 4, 5))], only={"Reduce"})
    for p in (1, 2, 3):
        check("GlobalLpPool", [values((2, 3, 4, 5))], p=p, rtol=1e-4)
    check_symbolic("MaxPool", [values((2, 3, 6, 6))], {0: ["N", 3, "H", "W"]}, kernel_shape=[3, 3], strides=[2, 2])


def test_max_unpool() -> None:
    x = np.array([[[[5, 6], [7, 8]]]], np.float32)
    places = np.array([[[[5, 7], [13, 15]]]], np.int64)
    check("MaxUnpool", [x, places], kernel_shape=[2, 2], strides=[2, 2])
    check("MaxUnpool", [x, places, np.array([1, 1, 5, 5])], constants=[2], kernel_shape=[2, 2], strides=[2, 2])


def test_ceil_mode_of_symbolic_size_stays() -> None:
    settings = {"dims": {0: [1, 1, "H", "W"]}, "kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}
    assert "symbolic size H" in rejection("MaxPool", [values((1, 1, 7, 7))], **settings)

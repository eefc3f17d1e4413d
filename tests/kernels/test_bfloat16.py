"""Products that a build may round to bfloat16: the numpy meaning of rounded factors, exactly as far as sums go."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.config import BFLOAT16_ERROR
from ingot.dtypes import numpy_dtype
from ingot.ir.expression import parse
from ingot.ir.ops import meaning
from ingot.kernels import Candidate, candidates
from ingot.kernels.cpu.gemm_tiles import rounded
from ingot.kernels.cpu.isa import AMX, BEST_FIRST, Isa
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node, Port
from ingot.runtime.machine import cpu_features
from tests.kernels.harness import node_of

Array = np.ndarray
ISAS = [isa for isa in BEST_FIRST if isa.machine <= cpu_features()]
BIAS = "Add %0 %1 -> float32; Relu $0 -> float32"


def nearest(x: Array) -> Array:
    """float32 numbers that are bfloat16 numbers."""
    return (rounded(x).astype(np.uint32) << 16).view(np.float32)


def rounding(node: Node, isa: Isa) -> list[Candidate]:
    return [c for c in candidates(node, "cpu", isa) if c.kernel.tolerance == BFLOAT16_ERROR]


def check(op: str, inputs: Sequence[Array], attributes: dict[str, object], epilogue: str = "") -> set[str]:
    """Every rounding candidate on every instruction set beside the meaning; returns the kernels that ran."""
    stated = attributes | ({"epilogue": epilogue} if epilogue else {})
    factors = [nearest(inputs[0]), nearest(inputs[1]), *inputs[2:]]
    (expected,) = meaning(op)(*factors, **stated)
    (unrounded,) = meaning(op)(inputs[0], *factors[1:], **stated)
    ports = tuple(Port("float32", x.shape, x if i == 1 else None) for i, x in enumerate(inputs))
    node = Node(op, ports, (Port("float32", expected.shape),), attributes, parse(epilogue), name="under_test")
    ran = set()
    for isa in ISAS:
        for candidate in rounding(node, isa):
            (mine,) = Standalone(node, candidate, isa, level=1)(*inputs)
            kept = {*candidate.ports.inputs, *candidate.ports.outputs} & {"rounded"}
            wanted = unrounded if candidate.kernel.name == "linear_rounded_weights" else expected
            scale = float(np.abs(wanted).max())
            np.testing.assert_allclose(mine, wanted, 1e-2 if kept else 1e-4, (4e-3 if kept else 2e-5) * scale,
                                       err_msg=f"{candidate.label} {candidate.ports} on {isa.name}")  # fmt: skip
            ran.add(candidate.kernel.name)
    return ran


def draw(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape).astype(np.float32)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 200), st.integers(1, 90), st.booleans())
def test_linear(rows: int, depth: int, columns: int, bias: bool) -> None:
    random = np.random.default_rng(rows * depth)
    inputs = [draw(random, rows, depth), draw(random, depth, columns), *([draw(random, columns)] if bias else [])]
    ran = check("Linear", inputs, {}, BIAS if bias else "")
    assert "linear_rounded_weights" in ran
    for feature, kernel in (("amx_bf16", "linear_rounded"), ("avx512_bf16", "linear_rounded_pairs")):
        assert kernel in ran or not any(isa.has(feature) for isa in ISAS)


def test_infinity_and_nan_stay() -> None:
    x, weight = np.ones((4, 8), np.float32), np.ones((8, 16), np.float32)
    x[1, 2], x[2, 3] = np.inf, np.nan
    ports = Port("float32", x.shape), Port("float32", weight.shape, weight)
    node = Node("Linear", ports, (Port("float32", (4, 16)),))
    for isa in ISAS:
        for candidate in rounding(node, isa):
            (mine,) = Standalone(node, candidate, isa)(x, weight)
            assert np.isinf(mine[1]).all() and np.isnan(mine[2]).all(), candidate.label
            assert (mine[[0, 3]] == 8).all(), candidate.label


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 2), st.sampled_from([32, 48, 64]), st.integers(3, 12), st.integers(3, 12)),
    st.sampled_from([32, 40, 64, 96]),
    st.sampled_from([(1, 1), (3, 3), (1, 3)]),
    st.integers(1, 2),
    st.booleans(),
)
def test_conv(shape: tuple[int, ...], outputs: int, kernel: tuple[int, int], stride: int, residual: bool) -> None:
    if not any(isa.has("amx_bf16") for isa in ISAS):
        pytest.skip("needs a processor with AMX")
    random = np.random.default_rng(outputs + shape[1])
    pads = [kernel[0] // 2, kernel[1] // 2] * 2
    attributes = {"strides": [stride] * 2, "pads": pads, "dilations": [1, 1], "group": 1}
    inputs = [draw(random, *shape), draw(random, outputs, shape[1], *kernel) / 16, draw(random, outputs, 1, 1)]
    epilogue = BIAS
    if residual:
        (like,) = meaning("Conv")(*inputs[:2], **attributes)
        inputs.append(nearest(draw(random, *like.shape)))
        epilogue = "Add %0 %1 -> float32; Add $0 %2 -> float32; Relu $1 -> float32"
    assert "conv_rounded" in check("Conv", inputs, attributes, epilogue)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 5), st.sampled_from([32, 64, 96]), st.integers(3, 9), st.integers(3, 9)),
    st.sampled_from([32, 64, 160]),
    st.sampled_from([(1, 1), (3, 3)]),
    st.integers(1, 2),
    st.booleans(),
)
def test_maps_of_bfloat16(
    shape: tuple[int, ...], outputs: int, kernel: tuple[int, int], stride: int, residual: bool
) -> None:
    if not any(isa.has("amx_bf16") for isa in ISAS):
        pytest.skip("needs a processor with AMX")
    random, narrow = np.random.default_rng(outputs + shape[1]), numpy_dtype("bfloat16")
    pads = [kernel[0] // 2, kernel[1] // 2] * 2
    attributes = {"strides": [stride] * 2, "pads": pads, "dilations": [1, 1], "group": 1}
    inputs = [draw(random, *shape), draw(random, outputs, shape[1], *kernel) / 16, draw(random, outputs, 1, 1)]
    epilogue = "Cast %0 -> float32; Cast %1 -> float32; Add $0 $1 -> float32"
    if residual:
        (like,) = meaning("Conv")(*inputs[:2], **attributes)
        inputs.append(draw(random, *like.shape))
        epilogue += "; Cast %2 -> float32; Add $2 $3 -> float32"
    count = epilogue.count(";")
    inputs = [x.astype(narrow) for x in inputs]
    node, expected = node_of("Conv", inputs, attributes, f"{epilogue}; Cast ${count} -> bfloat16", (1, 2))
    ran = set()
    for candidate in candidates(node, "cpu", AMX):
        if "bfloat16" in candidate.kernel.name:
            for chunks in (1, 3):
                (mine,) = Standalone(node, candidate, AMX, level=1)(*inputs, chunks=chunks)
                wanted = expected[0].astype(np.float32)
                np.testing.assert_allclose(mine.astype(np.float32), wanted, 2**-7, 1e-2, err_msg=candidate.label)
            ran.add(candidate.kernel.name)
    assert ran == {"conv_tiles_bfloat16"} | ({"conv_near_bfloat16"} if kernel == (1, 1) and stride == 1 else set())


def test_groups_of_images_pass_the_weights_together() -> None:
    """Weights larger than an image's maps, more images than a group holds: the last group is smaller."""
    if not any(isa.has("amx_bf16") for isa in ISAS):
        pytest.skip("needs a processor with AMX")
    random = np.random.default_rng(3)
    inputs = [draw(random, 7, 1024, 7, 7), draw(random, 320, 1024, 1, 1) / 32, draw(random, 320, 1, 1)]
    attributes = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1}
    assert "conv_rounded" in check("Conv", inputs, attributes, BIAS)

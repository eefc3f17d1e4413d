"""cuDNN's tactics for convolutions: as the operator means, in an engine, and what happens where the library is not."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ingot
from ingot import compiler
from ingot.kernels import Candidate, candidates, with_layouts
from ingot.kernels.cuda import cudnn as kernels
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.standalone import Standalone
from ingot.plan.lower import Work
from ingot.runtime import cuda, cudnn, library
from tests.kernels.harness import node_of
from tests.runtime.fake_cuda import FakeDriver
from tests.runtime.fake_cudnn import FakeCudnn
from tests.runtime.test_cuda import use

Array = np.ndarray[Any, Any]
TARGET = architecture("sm_90", "fp16", ("cudnn",))
WINDOW = {"strides": (2, 1), "pads": (1, 0, 1, 2), "dilations": (1, 1), "group": 1}
HALF = "Cast %0 -> float32; Cast %1 -> float32; Add $0 $1 -> float32; Relu $2 -> float32; Cast $3 -> float16"
ADDED = "Cast %0 -> float32; Cast %1 -> float32; Add $0 $1 -> float32; Cast %2 -> float32; Add $2 $3 -> float32"
SILU = "Cast %0 -> float32; Cast %1 -> float32; Add $0 $1 -> float32; Sigmoid $2 -> float32; Mul $2 $3 -> float32"
BYTES = "Cast %0 -> float32; Mul $0 %1 -> float32; Add $1 %2 -> float32; Relu $2 -> float32; Quantize $3 1.0 0 -> int8"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCudnn:
    driver = FakeDriver()
    use(monkeypatch, driver)
    made = FakeCudnn(driver)
    monkeypatch.setattr(cudnn, "_library", lambda: made)
    monkeypatch.setattr(library, "installed", lambda names: tuple(n for n in names if n == "cudnn"))
    cudnn._open.cache_clear()
    kernels._plans.cache_clear()
    return made


def drawn(*shape: int, dtype: str = "float16") -> Array:
    rng = np.random.default_rng(len(shape) + shape[0])
    return rng.integers(-5, 6, shape).astype(dtype) if dtype == "int8" else rng.uniform(-1, 1, shape).astype(dtype)


def offered(node: Any) -> list[Candidate]:
    return [c for c in candidates(node, "cuda", TARGET) if c.kernel.name == "cudnn_conv"]


def alone(node: Any, candidate: Candidate, *inputs: Array) -> Array:
    (y,) = Standalone(node, candidate, TARGET, cuda.context_of(cuda.select("cuda")))(*inputs)
    return y.astype(np.float32)


def test_sixteen_bits(fake: FakeCudnn) -> None:
    inputs = [drawn(2, 32, 6, 5), drawn(64, 32, 3, 3), drawn(64, 1, 1)]
    node, (expected,) = node_of("Conv", inputs, WINDOW, HALF, constants=(1, 2))
    for candidate in offered(node):
        np.testing.assert_allclose(alone(node, candidate, *inputs), expected.astype(np.float32), atol=2e-2)
    assert fake.convolutions == 2


@pytest.mark.parametrize("shape", [(64, 1, 1), (2, 64, 3, 5)])
def test_what_a_run_adds(fake: FakeCudnn, shape: tuple[int, ...]) -> None:
    """Numbers by channel or a residual, after the bias that is known."""
    inputs = [drawn(2, 32, 6, 5), drawn(64, 32, 3, 3), drawn(64, 1, 1), drawn(*shape)]
    node, (expected,) = node_of("Conv", inputs, WINDOW, f"{ADDED}; Cast $4 -> float16", constants=(1, 2))
    found = alone(node, offered(node)[0], *inputs)
    np.testing.assert_allclose(found, expected.astype(np.float32), atol=2e-2)
    assert fake.convolutions == 1


def test_silu(fake: FakeCudnn) -> None:
    inputs = [drawn(2, 32, 6, 5), drawn(64, 32, 3, 3), drawn(64, 1, 1)]
    node, (expected,) = node_of("Conv", inputs, WINDOW, f"{SILU}; Cast $4 -> float16", constants=(1, 2))
    np.testing.assert_allclose(alone(node, offered(node)[0], *inputs), expected.astype(np.float32), atol=2e-2)


def test_what_is_compiled_is_kept_apart_from_what_is_before_it(fake: FakeCudnn) -> None:
    """It may begin when a kernel says that the next one may: it then read what was not there yet."""
    inputs = [drawn(2, 32, 6, 5), drawn(64, 32, 3, 3), drawn(64, 1, 1)]
    for text, kept_apart in ((HALF, 0), (f"{SILU}; Cast $4 -> float16", 1)):
        fake.driver.calls.clear()
        node, _ = node_of("Conv", inputs, WINDOW, text, constants=(1, 2))
        alone(node, offered(node)[0], *inputs)
        names = ("cuGraphAddEmptyNode", "cuStreamUpdateCaptureDependencies")
        assert [fake.driver.calls[name] for name in names] == [kept_apart] * 2


def test_what_is_not_captured_is_kept_apart_by_a_write(fake: FakeCudnn) -> None:
    cuda.context_of(cuda.select("cuda")).separate(7, fake.driver._cuMemAlloc(256))
    assert fake.driver.calls["cuMemsetD8Async"] == 1 and not fake.driver.calls["cuGraphAddEmptyNode"]


def attention(masked: bool, causal: int = 0, depth: int = 40) -> tuple[Any, list[Array], Array]:
    inputs = [drawn(2, 4, 12, depth), drawn(2, 2, 12, depth), drawn(2, 2, 12, 48), *[drawn(2, 1, 1, 12)] * masked]
    node, (expected,) = node_of("Attention", inputs, {"scale": 0.3, "causal": causal, "softcap": 0.0})
    return node, inputs, expected


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [0, 1])
def test_attention_in_every_layout(fake: FakeCudnn, masked: bool, causal: int) -> None:
    node, inputs, expected = attention(masked, causal)
    found = [c for c in candidates(node, "cuda", TARGET) if c.kernel.name == "cudnn_attention"]
    assert len({c.ports for c in found}) == 4
    for candidate in found:
        np.testing.assert_allclose(alone(node, candidate, *inputs), expected.astype(np.float32), atol=2e-2)
    assert fake.attentions == len(found)


def test_attention_that_is_left_to_generated_kernels(fake: FakeCudnn) -> None:
    node, _, _ = attention(True)
    odd, _, _ = attention(False, depth=36)
    wide = replace(node, inputs=(*node.inputs[:3], replace(node.input(3), dtype="float32")))
    capped = replace(node, attributes={**node.attributes, "softcap": 5.0})
    late = replace(node, attributes={**node.attributes, "causal": 1},
                   inputs=(replace(node.input(0), shape=(2, 4, 6, 40)), *node.inputs[1:]))  # fmt: skip
    assert all(kernels.attention_of(n) is None for n in (odd, wide, capped, late))


def test_what_is_compiled_is_offered_too(fake: FakeCudnn) -> None:
    ordinary = architecture("sm_90", "fp16", ("cudnn",))
    inputs = [drawn(2, 32, 6, 5), drawn(64, 32, 3, 3), drawn(64, 1, 1), drawn(64, 1, 1)]
    given, _ = node_of("Conv", inputs, WINDOW, f"{ADDED}; Cast $4 -> float16", constants=(1, 2))
    known, _ = node_of("Conv", inputs, WINDOW, f"{ADDED}; Cast $4 -> float16", constants=(1, 2, 3))
    names = [{c.kernel.library for c in candidates(n, "cuda", ordinary)} for n in (given, known, attention(False)[0])]
    assert names == [{None, "cudnn"}] * 3
    none = architecture("sm_90", "fp16", ())
    assert not any(c.kernel.library for c in candidates(given, "cuda", none))


def test_bytes(fake: FakeCudnn) -> None:
    scale = np.full((64, 1, 1), 0.02, np.float32)
    x, weight = (drawn(*shape, dtype="int8") for shape in ((2, 32, 6, 5), (64, 32, 3, 3)))
    inputs = [x, weight, scale, drawn(64, 1, 1, dtype="float32")]
    node, (expected,) = node_of("Conv", inputs, WINDOW, BYTES, constants=(1, 2, 3))
    np.testing.assert_allclose(alone(node, offered(node)[0], *inputs), expected.astype(np.float32), atol=1)


def test_what_is_left_to_generated_kernels(fake: FakeCudnn) -> None:
    x, weight, bias = drawn(2, 32, 6, 5), drawn(64, 32, 3, 3), drawn(64, 1, 1)
    tanh = "Cast %0 -> float32; Tanh $0 -> float32; Cast $1 -> float16"
    residual = "Cast %0 -> float32; Cast %1 -> float32; Add $0 $1 -> float32; Cast $2 -> float16"
    one_tap = {**WINDOW, "strides": (1, 1), "pads": (0,) * 4}
    for inputs, text, window in (([x, weight], tanh, WINDOW), ([x[:, :28], weight[:, :28]], "", WINDOW),
                                 ([x, weight[..., :1, :1], drawn(2, 64, 6, 5)], residual, one_tap)):  # fmt: skip
        node, _ = node_of("Conv", inputs, window, text, constants=(1,))
        assert not offered(node)
    fake.refuses = True
    node, _ = node_of("Conv", [x, weight, bias], WINDOW, HALF, constants=(1, 2))
    assert not offered(node)


def test_layouts_are_channels_last(fake: FakeCudnn) -> None:
    node, _ = node_of("Conv", [drawn(2, 32, 6, 5), drawn(64, 32, 3, 3)], WINDOW, "", constants=(1,))
    node = replace(node, outputs=tuple(replace(p, dtype="float16") for p in node.outputs))
    shaped = with_layouts(node, offered(node)[0].ports)
    assert shaped.input(0).layout == shaped.output.layout == "channels_last"


# in engines


def network() -> onnx.ModelProto:
    """relu(x * w) * v, both 3x3"""
    held = [numpy_helper.from_array(drawn(64, 64, 3, 3, dtype="float32") / 9, name) for name in ("w", "v")]
    nodes = [helper.make_node("Conv", ["x", "w"], ["h"], "first", pads=[1] * 4),
             helper.make_node("Relu", ["h"], ["r"], "relu"),
             helper.make_node("Conv", ["r", "v"], ["y"], "second", pads=[1] * 4)]  # fmt: skip
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 64, 4, 4)) for n in "xy")
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], held), opset_imports=[helper.make_opsetid("", 20)])


@pytest.fixture
def engine(fake: FakeCudnn, monkeypatch: pytest.MonkeyPatch) -> ingot.Engine:
    """The network, with the library's tactics preferred."""

    def price(work: Work, candidate: Candidate) -> float:
        return 1.0 - (candidate.kernel.name == "cudnn_conv")

    monkeypatch.setattr(compiler.tuner, "prices", lambda *_: price)
    return ingot.build(network(), target="cuda:sm_90", precision="fp16", verify=False, level=1)


FEEDS = {"x": drawn(1, 64, 4, 4, dtype="float32")}


def run(made: ingot.Engine) -> Array:
    with ingot.Session(made, device="cuda") as session:
        (y,) = session.run(FEEDS).values()
    return y


@pytest.fixture(scope="module")
def expected() -> Array:
    with ingot.Session(ingot.build(network(), target="host", verify=False), device="host") as session:
        (y,) = session.run(FEEDS).values()
    return y


def test_an_engine_keeps_the_plans(fake: FakeCudnn, engine: ingot.Engine, expected: Array, tmp_path: Any) -> None:
    engine.save(tmp_path / "net.engine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(run(ingot.Engine.load(tmp_path / "net.engine")), expected, atol=5e-2)
    assert fake.convolutions == 1  # the second's result is a float32 of the user's
    assert fake.stream == 0, "a handle must not keep a stream that may be destroyed"


def test_elsewhere_the_generated_kernels_run(fake: FakeCudnn, engine: ingot.Engine, expected: Array) -> None:
    fake.version = 92000
    with pytest.warns(UserWarning, match="cudnn tactics are not used.*chosen with cuDNN 91900, here is 92000"):
        np.testing.assert_allclose(run(engine), expected, atol=5e-2)
    fake.version, fake.forgetful = 91900, True
    with pytest.warns(UserWarning, match="cuDNN refuses a plan .CUDNN_STATUS_BAD_PARAM"):
        np.testing.assert_allclose(run(engine), expected, atol=5e-2)
    assert fake.convolutions == 0

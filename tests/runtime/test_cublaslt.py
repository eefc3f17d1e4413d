"""cuBLASLt's tactics: products as the operator means, in an engine, and what happens where the library is not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ingot
from ingot import compiler
from ingot.errors import ConfigError, DeviceError
from ingot.ir.expression import parse
from ingot.kernels import Candidate, candidates
from ingot.kernels.cuda import cublaslt as kernels
from ingot.kernels.cuda.affine import Affine, affine
from ingot.kernels.cuda.architecture import architecture, described
from ingot.kernels.cuda.standalone import Standalone, generate
from ingot.plan.lower import Work
from ingot.plan.plan import GraphSegment
from ingot.runtime import cublaslt, cuda, library
from ingot.tools import build_engine
from ingot.tune import cuda_measure
from ingot.tune.measure import describe
from tests.kernels.harness import node_of
from tests.runtime.fake_cublaslt import FakeLt
from tests.runtime.fake_cuda import FakeDriver, stand_in
from tests.runtime.test_cuda import use

Array = np.ndarray[Any, Any]
TARGET = architecture("sm_90", "fp16", ("cublaslt",))
SUM = "Cast %0 -> float32; Cast %1 -> float32; Add $0 $1 -> float32"


@pytest.fixture
def lt(monkeypatch: pytest.MonkeyPatch) -> FakeLt:
    driver = FakeDriver()
    use(monkeypatch, driver)
    made = FakeLt(driver)
    monkeypatch.setattr(cublaslt, "_library", lambda: made)
    monkeypatch.setattr(library, "installed", lambda names: tuple(names))
    cublaslt._open.cache_clear()
    kernels._algorithms.cache_clear()
    return made


def drawn(*shape: int, dtype: str = "float16") -> Array:
    return np.random.default_rng(len(shape) + shape[0]).uniform(-1, 1, shape).astype(dtype)


def offered(node: Any) -> list[Candidate]:
    return [c for c in candidates(node, "cuda", TARGET) if c.kernel.name.startswith("cublaslt")]


X, W, BIAS, RESIDUAL = drawn(64, 128), drawn(128, 64), drawn(64), drawn(64, 64)
PRODUCTS: Mapping[str, tuple[list[Array], str]] = {
    "plain": ([X, W], ""),
    "bias": ([X, W, BIAS], f"{SUM}; Cast $2 -> float16"),
    "relu": ([X, W, BIAS], f"{SUM}; Relu $2 -> float32; Cast $3 -> float16"),
    "gelu": ([X, W, BIAS], f"{SUM}; Gelu $2 -> float32; Cast $3 -> float16"),
    "residual": ([X, W, BIAS, RESIDUAL],
                 f"{SUM}; Cast %2 -> float32; Add $2 $3 -> float32; Cast $4 -> float16"),
    "scaled": ([X, W], "Cast %0 -> float32; Mul $0 0.25 -> float32; Cast $1 -> float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_linear(lt: FakeLt, name: str) -> None:
    inputs, epilogue = PRODUCTS[name]
    node, (expected,) = node_of("Linear", inputs, {}, epilogue, constants=(1, 2))
    found = offered(node)
    assert [c.kernel.name for c in found] == ["cublaslt_gelu" if name == "gelu" else "cublaslt_linear"] * 2
    for candidate in found:
        (mine,) = Standalone(node, candidate, TARGET, cuda.context_of(cuda.select("cuda")))(*inputs)
        np.testing.assert_allclose(mine.astype(np.float32), expected.astype(np.float32), atol=2e-2)
    assert lt.matmuls == 2


@pytest.mark.parametrize("narrow", [False, True])
def test_float8(lt: FakeLt, narrow: bool) -> None:
    end = "Quantize $4 0.25 0.0 -> float8_e4m3fn" if narrow else "Cast $4 -> float16"
    text = "Cast %0 -> float32; Mul $0 0.5 -> float32; Cast %1 -> float32; Add $1 $2 -> float32; Relu $3 -> float32; "
    inputs = [X.astype(ml_dtypes.float8_e4m3fn), W.astype(ml_dtypes.float8_e4m3fn), BIAS.astype("float32")]
    node, (expected,) = node_of("Linear", inputs, {}, text + end, constants=(1, 2))
    (mine,) = Standalone(node, offered(node)[0], TARGET, cuda.context_of(cuda.select("cuda")))(*inputs)
    assert mine.dtype == expected.dtype
    np.testing.assert_allclose(mine.astype(np.float32), expected.astype(np.float32), rtol=0.1, atol=2e-2)


def test_several_products_of_one_input(lt: FakeLt) -> None:
    node, expected = node_of("ParallelLinear", [X, drawn(128, 192), drawn(192)], {"sizes": (64,) * 3}, constants=(1, 2))
    node = replace(node, outputs=tuple(replace(p, dtype="float16") for p in node.outputs))
    mine = Standalone(node, offered(node)[1], TARGET, cuda.context_of(cuda.select("cuda")))(X, None, None)
    for y, wanted in zip(mine, expected, strict=True):
        np.testing.assert_allclose(y.astype(np.float32), wanted.astype(np.float32), atol=2e-2)
    assert lt.matmuls == 3


def test_a_convolution_of_one_tap(lt: FakeLt) -> None:
    inputs = [drawn(2, 128, 5, 7), drawn(64, 128, 1, 1), drawn(64, 1, 1), drawn(2, 64, 5, 7)]
    text = f"{SUM}; Cast %2 -> float32; Add $2 $3 -> float32; Relu $4 -> float32; Cast $5 -> float16"
    settings = {"strides": (1, 1), "pads": (0,) * 4, "dilations": (1, 1), "group": 1}
    node, (expected,) = node_of("Conv", inputs, settings, text, constants=(1, 2))
    (first, _) = offered(node)
    (mine,) = Standalone(node, first, TARGET, cuda.context_of(cuda.select("cuda")))(*inputs)
    np.testing.assert_allclose(mine.astype(np.float32), expected.astype(np.float32), atol=2e-2)


@pytest.mark.parametrize(("inputs", "epilogue"), [
    ([X, W, RESIDUAL], "Cast %0 -> float32; Sigmoid $0 -> float32; Cast $1 -> float16"),
    ([X, W, BIAS], f"{SUM}; Relu $2 -> float32; Mul $3 0.5 -> float32; Cast $4 -> float16"),
    ([X.astype("float32"), W.astype("float32")], ""),
])  # fmt: skip
def test_what_cublaslt_has_no_word_for(lt: FakeLt, inputs: list[Array], epilogue: str) -> None:
    node, _ = node_of("Linear", inputs, {}, epilogue, constants=(1,))
    assert not offered(node)


def test_a_library_that_knows_no_way_offers_none(lt: FakeLt) -> None:
    lt.refuses = True
    node, _ = node_of("Linear", [X, W], {}, "", constants=(1,))
    assert not offered(node)


def test_epilogues_as_sums() -> None:
    text = "Cast %0 -> float32; Mul $0 0.5 -> float32; Mul $1 %1 -> float32; Add $2 %2 -> float32; Relu $3 -> float32"
    assert affine(parse(text)) == Affine({0: 0.5, 2: 1.0}, (1,), 0.0, "Relu", 1.0)
    assert affine(parse("Quantize %0 0.5 0 -> int8")) == Affine({0: 1.0}, step=0.5)
    assert affine(parse("")) == Affine({0: 1.0})
    for other in ("Add %0 %0 -> float32", "Mul %0 %0 -> float32", "Cast %0 -> int8", "Tanh %0 -> float32",
                  "Relu %0 -> float32; Add $0 %1 -> float32"):  # fmt: skip
        assert affine(parse(other)) is None


# in engines


def network() -> onnx.ModelProto:
    """relu(x w + b) v"""
    weights = [("w", drawn(128, 64)), ("b", drawn(64)), ("v", drawn(64, 64))]
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"], "first"), helper.make_node("Relu", ["h"], ["r"], "relu"),
             helper.make_node("MatMul", ["r", "v"], ["y"], "second")]  # fmt: skip
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", (64, 128)), ("y", (64, 64))))
    held = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], held), opset_imports=[helper.make_opsetid("", 20)])


def engine(monkeypatch: pytest.MonkeyPatch, **options: Any) -> ingot.Engine:
    """The network, with the library's tactics preferred."""

    def price(work: Work, candidate: Candidate) -> float:
        return 1.0 - candidate.kernel.name.startswith("cublaslt")

    monkeypatch.setattr(compiler.tuner, "prices", lambda *_: price)
    return ingot.build(network(), target="cuda:sm_90", precision="fp16", verify=False, level=1, **options)


def run(made: ingot.Engine) -> Array:
    feeds = {"x": drawn(64, 128, dtype="float32")}
    with ingot.Session(made, device="cuda") as session:
        session.run(feeds)
        (y,) = session.run(feeds).values()
    return y


def expected() -> Array:
    reference = ingot.build(network(), target="host", verify=False)
    with ingot.Session(reference, device="host") as session:
        (y,) = session.run({"x": drawn(64, 128, dtype="float32")}).values()
    return y


def calls(made: ingot.Engine) -> list[str]:
    segments = [s for s in made.variants[0].plan.segments if isinstance(s, GraphSegment)]
    return [call.library for s in segments for call in s.libraries]


def test_an_engine_uses_it_in_its_graph(lt: FakeLt, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    made = engine(monkeypatch)
    made.save(tmp_path / "net.engine")
    loaded = ingot.Engine.load(tmp_path / "net.engine")
    assert "cublaslt" in calls(loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(run(loaded), expected(), atol=0.2)
    assert lt.matmuls == 2 * len(calls(loaded))


def test_without_the_library_the_generated_kernels_run(lt: FakeLt, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(monkeypatch)

    def missing() -> Any:
        raise ImportError("No module named 'nvmath'")

    monkeypatch.setattr(cublaslt, "_library", missing)
    cublaslt._open.cache_clear()
    with pytest.warns(UserWarning, match=r"cublaslt tactics are not used.*No module named 'nvmath'.*pip install"):
        np.testing.assert_allclose(run(made), expected(), atol=0.2)
    assert lt.matmuls == 0


def test_another_version_may_not_know_the_algorithm(lt: FakeLt, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(monkeypatch)
    lt.version = 130200
    with pytest.warns(UserWarning, match="chosen with cuBLASLt 130100, here is 130200"):
        np.testing.assert_allclose(run(made), expected(), atol=0.2)
    assert lt.matmuls == 0


def test_libraries_may_be_switched_off(lt: FakeLt, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not calls(engine(monkeypatch, libraries=()))
    with pytest.raises(ConfigError, match="there is no library 'cutlass' with tactics"):
        ingot.BuildConfig(libraries=("cutlass",))


def test_tactic_sources() -> None:
    assert build_engine.libraries_from("") == ("cublaslt", "cudnn") == build_engine.libraries_from("+CUBLAS_LT,+TRITON")
    assert build_engine.libraries_from("-CUBLAS_LT,-CUDNN,+TRITON") == ()
    assert build_engine.libraries_from("-CUBLAS_LT") == ("cudnn",)
    with pytest.raises(ConfigError, match="-TRITON: every step has a generated kernel"):
        build_engine.libraries_from("-TRITON")
    with pytest.raises(ConfigError, match="JIT_CONVOLUTIONS: it is not known; sources are CUBLAS_LT"):
        build_engine.libraries_from("+JIT_CONVOLUTIONS")


def test_a_failure_names_the_way_out(lt: FakeLt, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> None:
        raise lt.cuBLASLtError("CUBLAS_STATUS_INVALID_VALUE")

    made = engine(monkeypatch)
    monkeypatch.setattr(lt, "matmul", refused)
    with pytest.raises(DeviceError, match=r"CUBLAS_STATUS_INVALID_VALUE.*--tacticSources=-CUBLAS_LT"):
        run(made)


def test_float8_of_odd_sizes_is_left_alone(lt: FakeLt) -> None:
    inputs = [drawn(64, 128, dtype=ml_dtypes.float8_e4m3fn), drawn(128, 72, dtype=ml_dtypes.float8_e4m3fn)]
    node, _ = node_of("Linear", inputs, {}, "Cast %0 -> float32; Cast $0 -> float16", constants=(1,))
    assert not offered(node)


def test_a_library_is_timed_between_generated_kernels(lt: FakeLt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch takes a microsecond here, and half as long again where libraries and kernels take turns."""
    graphs: list[list[Any]] = []

    def elapsed(driver: FakeDriver, start: str, end: str) -> float:
        kinds = {action.__qualname__.partition(".")[0] for action in graphs[-1]}
        return len(graphs[-1]) * (0.001 if len(kinds) == 1 else 0.0015)

    def launch(driver: FakeDriver, graph: list[Any], stream: int) -> None:
        graphs.append(graph)
        if len(graph) == 1:  # whose results are compared
            graph[0]()

    monkeypatch.setattr(FakeDriver, "_cuGraphLaunch", launch)
    monkeypatch.setattr(FakeDriver, "_cuEventElapsedTime", elapsed)
    node, _ = node_of("Linear", [X, W], {}, "Cast %0 -> float16", constants=(1,))
    generated = next(c for c in candidates(node, "cuda", TARGET) if c.tactic.get("split") == 1)
    (call,) = generate(node, generated, TARGET).launches
    ready = [(describe(offered(node)[0]), []), (describe(generated), [stand_in(call.unit, TARGET.name)])]
    times = cuda_measure.time_candidates(node, ready, described(TARGET), 0.1, 0.0)
    assert times == [pytest.approx(2.0), pytest.approx(1.0)], "what it adds to a row of the generated kernel"

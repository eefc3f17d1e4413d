"""Sessions: what is refused and how, buffers, threads, futures, forks."""

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import ingot
from ingot.errors import ConfigError, InputError
from ingot.runtime.cpu import division


def model() -> onnx.ModelProto:
    """y = relu(a + b) * 2 with a[N, 8], b[N, 8]; z is a view of y."""
    two = helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])
    shape = helper.make_tensor("flat", TensorProto.INT64, [1], [-1])
    nodes = [
        helper.make_node("Add", ["a", "b"], ["s"], "sum"),
        helper.make_node("Relu", ["s"], ["r"], "relu"),
        helper.make_node("Mul", ["r", "two"], ["y"], "twice"),
        helper.make_node("Reshape", ["y", "flat"], ["z"], "flatten"),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 8]) for n in "ab"]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8]),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, ["M"]),
    ]
    graph = helper.make_graph(nodes, "session", inputs, outputs, [two, shape])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture(scope="module", params=["cpu", "host"])
def session(request: pytest.FixtureRequest) -> ingot.Session:
    engine = ingot.build(model(), target=request.param, level=0)
    return ingot.Session(engine, request.param, threads=2)


def feeds(rows: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal((rows, 8)).astype(np.float32) for n in "ab"}


def expected(x: dict[str, np.ndarray]) -> np.ndarray:
    return np.maximum(x["a"] + x["b"], 0) * 2


@pytest.mark.parametrize("rows", [1, 3, 50, 5000, 0])
def test_results(session: ingot.Session, rows: int) -> None:
    x = feeds(rows)
    result = session.run(x)
    assert np.array_equal(result["y"], expected(x)) and np.array_equal(result["z"], expected(x).ravel())
    assert list(result) == ["y", "z"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, "'a' is missing"),
        ({"c": np.zeros((3, 8), np.float32)}, "no input 'c'"),
        ({"a": np.zeros((3, 8))}, "float64"),
        ({"a": np.zeros((3, 8, 1), np.float32)}, r"shape \[3, 8, 1\]"),
        ({"a": np.zeros((3, 9), np.float32)}, "9 at axis 1"),
        ({"a": np.zeros((4, 8), np.float32)}, "N is 4 in input 'a' but 3 in 'b'"),
    ],
)
def test_wrong_inputs_are_named(session: ingot.Session, change: dict[str, np.ndarray | None], message: str) -> None:
    x = {k: v for k, v in {**feeds(), **change}.items() if v is not None}
    with pytest.raises(InputError, match=message):
        session.run(x)


def test_a_strided_input_is_taken(session: ingot.Session) -> None:
    x = feeds(6)
    strided = {k: np.repeat(v, 2, axis=0)[::2] for k, v in x.items()}
    assert np.array_equal(session.run(strided)["y"], expected(x))


def test_output_buffers_are_written(session: ingot.Session) -> None:
    x, buffer = feeds(), np.empty((3, 8), np.float32)
    result = session.run(x, out={"y": buffer})
    assert result["y"] is buffer and np.array_equal(buffer, expected(x))


@pytest.mark.parametrize("buffer", [np.empty((3, 8)), np.empty((8, 3), np.float32).T, np.empty((2, 8), np.float32)])
def test_unfit_buffers_are_refused(session: ingot.Session, buffer: np.ndarray) -> None:
    with pytest.raises(InputError, match="'y'"):
        session.run(feeds(), out={"y": buffer})


def test_results_are_not_overwritten_by_the_next_run(session: ingot.Session) -> None:
    first = session.run(feeds(seed=1))["y"]
    kept = first.copy()
    session.run(feeds(seed=2))
    assert np.array_equal(first, kept)


def test_many_python_threads(session: ingot.Session) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(50):
            x = feeds(1 + (seed * 7 + i * 13) % 900, seed)
            if not np.array_equal(session.run(x)["y"], expected(x)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("threads", "streams"), [(1, 1), (2, 2), (3, 2), (2, 3), (5, 2)])
def test_streams_bound_the_runs_side_by_side(session: ingot.Session, threads: int, streams: int) -> None:
    with ingot.Session(session.engine, session.variant.target, threads, streams) as throughput:
        xs = [feeds(700, seed=s) for s in range(24)]
        with ThreadPoolExecutor(8) as callers:
            ys = list(callers.map(lambda x: throughput.run(x)["y"], xs))
        frames = [frame for held in throughput._executor._free.values() for frame in held]
    assert all(np.array_equal(y, expected(x)) for x, y in zip(xs, ys, strict=True))
    assert 1 <= len(frames) <= streams


@given(st.integers(1, 40), st.integers(1, 12))
def test_streams_share_all_threads_evenly(threads: int, streams: int) -> None:
    sizes = division(threads, streams)
    assert len(sizes) == min(threads, streams) and sum(sizes) == threads
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1


def test_a_failed_run_gives_its_stream_back(session: ingot.Session) -> None:
    with ingot.Session(session.engine, session.variant.target, streams=1) as single:
        for _ in range(3):
            with pytest.raises(InputError, match="'y'"):
                single.run(feeds(), out={"y": np.empty((2, 8), np.float32)})
        assert np.array_equal(single.run(feeds())["y"], expected(feeds()))


def test_no_streams_are_refused(session: ingot.Session) -> None:
    with pytest.raises(ConfigError, match="streams must be at least 1"):
        ingot.Session(session.engine, session.variant.target, streams=0)


def test_futures(session: ingot.Session) -> None:
    xs = [feeds(seed=s) for s in range(8)]
    futures = [session.run_async(x) for x in xs]
    assert all(np.array_equal(f.result()["y"], expected(x)) for f, x in zip(futures, xs, strict=True))


def test_a_future_carries_the_error(session: ingot.Session) -> None:
    assert isinstance(session.run_async({}).exception(), InputError)


def test_profile_names_the_users_nodes(session: ingot.Session) -> None:
    times = session.profile(feeds(500))
    assert {"sum", "relu", "twice"} <= {node for t in times for node in t.nodes}
    assert all(t.microseconds >= 0 for t in times)


def test_two_sessions_share_weights(session: ingot.Session) -> None:
    other = ingot.Session(session.engine, session.variant.target, threads=1)
    assert other._executor.weights is session._executor.weights
    other.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_can_run() -> None:
    engine = ingot.build(model(), target="cpu", level=0)
    session = ingot.Session(engine, threads=2)
    x = feeds(5000)
    session.run(x)
    child = os.fork()
    if child == 0:
        good = np.array_equal(session.run(x)["y"], expected(x))
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    session.close()


def test_a_closed_session_says_so() -> None:
    engine = ingot.build(model(), target="host")
    with ingot.Session(engine, "host") as session:
        session.run(feeds())
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run(feeds())


def test_unknown_devices_and_thread_counts() -> None:
    engine = ingot.build(model(), target="host")
    with pytest.raises(ConfigError, match="abacus"):
        ingot.Session(engine, "abacus")
    with pytest.raises(ConfigError, match="threads"):
        ingot.Session(engine, "host", threads=0)


def test_a_forgotten_session_ends_its_threads() -> None:
    engine = ingot.build(model(), level=0)
    before = set(threading.enumerate())
    session = ingot.Session(engine, threads=3)
    session.run(feeds(200_000))
    hired = set(threading.enumerate()) - before
    assert len(hired) == 2
    del session
    gc.collect()
    for thread in hired:
        thread.join(5)
    assert not any(thread.is_alive() for thread in hired)


def test_more_threads_than_cores_give_the_same() -> None:
    """Late and interrupted threads: a phase is over when its items are, whoever did them."""
    path = Path(__file__).parent.parent.parent / "examples" / "digits" / "digits.onnx"
    engine = ingot.build(path, level=0)
    image = np.random.default_rng(0).uniform(0, 16, (64, 1, 8, 8)).astype(np.float32)
    with ingot.Session(engine, threads=1) as alone, ingot.Session(engine, threads=9) as crowd:
        expected = alone.run({"image": image})["scores"]
        for _ in range(300):
            np.testing.assert_array_equal(crowd.run({"image": image})["scores"], expected)


def test_what_a_warm_up_runs() -> None:
    """Every point of every profile once; without profiles nothing, unless shapes are fixed."""
    open_ended = ingot.build(model(), target="host", level=0, verify=False)
    with ingot.Session(open_ended, "host") as session:
        assert session.warm_up() == 0
    points = [ingot.Profile(a=((1, 8), (2, 8), (4, 8)), b=((1, 8), (2, 8), (4, 8))), ingot.Profile(a=(9, 8), b=(9, 8))]
    engine = ingot.build(model(), target="host", level=0, verify=False, profiles=points)
    with ingot.Session(engine, "host") as session:
        assert session.warm_up() == 4

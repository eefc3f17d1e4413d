"""The engine file: round trip, determinism, damage, atomic writing. Engines here are built on the host target."""

import json
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ingot
from ingot.errors import EngineError
from ingot.plan.plan import GraphSegment, decode, from_json, to_json


def small_model() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "weight")
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"], "matmul"),
        helper.make_node("Relu", ["product"], ["y"], "relu"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])
    graph = helper.make_graph(nodes, "small", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture(scope="module")
def engine() -> ingot.Engine:
    return ingot.build(small_model(), target="host")


def test_round_trip(engine: ingot.Engine, tmp_path: Path) -> None:
    engine.save(tmp_path / "m.engine")
    loaded = ingot.Engine.load(tmp_path / "m.engine").verified()
    assert loaded.inputs == engine.inputs and loaded.outputs == engine.outputs
    x = np.ones((2, 4), np.float32)
    assert np.array_equal(
        ingot.Session(loaded, "host").run({"x": x})["y"], ingot.Session(engine, "host").run({"x": x})["y"]
    )


def test_the_same_build_gives_the_same_bytes(engine: ingot.Engine) -> None:
    assert ingot.build(small_model(), target="host").to_bytes() == engine.to_bytes()


def test_plan_json_round_trip(engine: ingot.Engine) -> None:
    plan = engine.variants[0].plan
    assert from_json(to_json(plan)) == plan


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"inputs": 3}', "nonsense", '{"inputs":[true]}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(EngineError):
        from_json(text)


def test_a_plan_that_lacks_any_field_is_refused(engine: ingot.Engine) -> None:
    whole = json.loads(to_json(engine.variants[0].plan))
    for name in whole:
        with pytest.raises(EngineError, match=name):
            from_json(json.dumps({k: v for k, v in whole.items() if k != name}))


def test_a_graph_from_before_lanes_has_one() -> None:
    segment = {"kind": "graph", "steps": [], "launches": [], "libraries": []}
    assert decode(GraphSegment, segment).lanes == 1
    with pytest.raises(KeyError, match="libraries"):
        decode(GraphSegment, {k: v for k, v in segment.items() if k != "libraries"})


def test_every_flipped_bit_is_noticed(engine: ingot.Engine, tmp_path: Path) -> None:
    data = bytearray(engine.to_bytes())
    rng = random.Random(7)
    for _ in range(300):
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[place] ^= bit
        (tmp_path / "damaged.engine").write_bytes(data)
        with pytest.raises(EngineError):
            ingot.Engine.load(tmp_path / "damaged.engine").verified()
        data[place] ^= bit


@pytest.mark.parametrize("keep", [0, 7, 60, 4096, -1])
def test_a_truncated_file_is_refused(engine: ingot.Engine, tmp_path: Path, keep: int) -> None:
    data = engine.to_bytes()
    (tmp_path / "short.engine").write_bytes(data[:keep])
    with pytest.raises(EngineError, match=r"short\.engine"):
        ingot.Engine.load(tmp_path / "short.engine").verified()


def test_appended_bytes_are_refused(engine: ingot.Engine, tmp_path: Path) -> None:
    (tmp_path / "long.engine").write_bytes(engine.to_bytes() + b"x")
    with pytest.raises(EngineError):
        ingot.Engine.load(tmp_path / "long.engine").verified()


def test_a_newer_format_says_so(engine: ingot.Engine, tmp_path: Path) -> None:
    data = bytearray(engine.to_bytes())
    data[8] = 9
    (tmp_path / "new.engine").write_bytes(data)
    with pytest.raises(EngineError, match="format 9"):
        ingot.Engine.load(tmp_path / "new.engine")


def test_a_failed_write_leaves_the_old_file(
    engine: ingot.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(b"older")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EngineError, match="No space left"):
        engine.save(path)
    assert path.read_bytes() == b"older" and [p.name for p in tmp_path.iterdir()] == ["m.engine"]


def test_a_missing_folder_is_one_sentence(engine: ingot.Engine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot write"):
        engine.save(tmp_path / "nowhere" / "m.engine")


def test_an_engine_for_another_machine_says_what_it_holds(engine: ingot.Engine) -> None:
    with pytest.raises(EngineError, match="holds host"):
        engine.pick(("cpu",), frozenset(), "a test machine")

"""What cannot be right: one clear line, exit code 1, no traceback, nothing written. Models, engines, runs, disks."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ingot
from ingot.cli import main
from ingot.errors import EngineError, InputError

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "digits.onnx"
Named = dict[str, Sequence[int | str | None]]
node = helper.make_node


def model(nodes: list[onnx.NodeProto], inputs: Named, outputs: Named, **weights: np.ndarray) -> onnx.ModelProto:
    """A float model of named nodes."""
    sides = [[helper.make_tensor_value_info(n, FLOAT, s) for n, s in side.items()] for side in (inputs, outputs)]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    for i, one in enumerate(nodes):
        one.name = f"the_{one.op_type}_{i}"
    graph = helper.make_graph(nodes, "bad", *sides, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def refused(words: Sequence[str | Path], capsys: pytest.CaptureFixture[str], start: str = "ingot: error: ") -> str:
    """The one line that `ingot …` says when it exits with 1."""
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if not line.startswith("[ingot]")]
    assert code == 1 and len(lines) == 1 and lines[0].startswith(start), told
    assert "Traceback" not in told.out
    return lines[0].removeprefix(start)


def build(content: bytes | onnx.ModelProto, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `ingot build` says of a model; it leaves nothing behind."""
    path = folder / "bad.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    before = sorted(folder.iterdir())
    said = refused(["build", path, "--quiet", "--level", "0"], capsys)
    assert sorted(folder.iterdir()) == before
    return said


# models that are no models

WHOLE = DIGITS.read_bytes()


@pytest.mark.parametrize("size", [0, 1, 7, 100, 4096, len(WHOLE) // 2, len(WHOLE) - 1])
def test_truncated(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search("truncated|empty", build(WHOLE[:size], tmp_path, capsys))


@pytest.mark.parametrize("content", [np.random.default_rng(0).bytes(5000), b"hello\n" * 99, bytes(4096), b"PK\x03\x04"])
def test_something_else(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "bad.onnx is not an ONNX model" in build(content, tmp_path, capsys)


def test_beyond_two_gigabytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse: takes no space
    assert "external data" in refused(["build", path, "--quiet"], capsys)


# graphs that cannot be

X: Named = {"x": [2, 3]}
Y: Named = {"y": [2, 3]}
TWO: Named = {**X, "z": [4, 5]}
LISTED: Named = {"y": [None, None]}

CONTRADICTIONS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "cycle": (lambda: model([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"])], X, {"b": [2, 3]}), "sorted"),
    "reads itself": (lambda: model([node("Add", ["x", "y"], ["y"])], X, Y), "sorted"),
    "reads nothing": (lambda: model([node("Relu", ["w"], ["y"])], X, Y), "'w'"),
    "written twice": (lambda: model([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])], X, Y), "'y'"),
    "unknown operator": (lambda: model([node("Frobnicate", ["x"], ["y"])], X, Y), "Frobnicate"),
    "unknown attribute": (lambda: model([node("Relu", ["x"], ["y"], slope=1)], X, Y), "slope"),
    "shapes of Add": (lambda: model([node("Add", ["x", "z"], ["y"])], TWO, Y), "the_Add_0.*Incompatible dim"),
    "shapes of MatMul": (lambda: model([node("MatMul", ["x", "z"], ["y"])], TWO, LISTED), "the_MatMul_0.*Incompat"),
    "shapes of Concat": (lambda: model([node("Concat", ["x", "z"], ["y"], axis=0)], TWO, LISTED), "the_Concat_0"),
    "declared shape": (lambda: model([node("Relu", ["x"], ["y"])], X, {"y": [7]}), "the_Relu_0.*differ in rank"),
    "axis": (lambda: model([node("Softmax", ["x"], ["y"], axis=7)], X, Y), "the_Softmax_0.*axis"),
    "Reshape": (
        lambda: model([node("Reshape", ["x", "to"], ["y"])], X, LISTED, to=np.array([4, 4])),
        r"node 'the_Reshape_0' \(Reshape\) cannot be computed.*size 6 into shape \(4,4\)",
    ),
    "Gather": (
        lambda: model([node("Gather", ["x", "at"], ["y"])], X, LISTED, at=np.array([9])),
        r"node 'the_Gather_0' \(Gather\) cannot be computed.*index 9 is out of bounds",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_graph_that_cannot_be(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, pattern = CONTRADICTIONS[name]
    said = build(made(), tmp_path, capsys)
    assert re.search(pattern, said), said


def test_functions_that_call_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proto = model([node("A", ["x"], ["y"], domain="mine")], X, Y)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
    for mine, other in ("AB", "BA"):
        inner = node(other, ["i"], ["o"], domain="mine")
        proto.functions.append(helper.make_function("mine", mine, ["i"], ["o"], [inner], opsets))
    proto.opset_import.append(opsets[1])
    assert "recursive" in build(proto, tmp_path, capsys)


# more than the machine has

HUGE: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "input": (lambda: model([node("Relu", ["x"], ["y"])], {"x": [2**31, 2**31]}, {"y": [2**31, 2**31]}), "input 'x'"),
    "constant": (
        lambda: model(
            [node("ConstantOfShape", ["to"], ["c"]), node("ReduceMax", ["c"], ["m"]), node("Add", ["x", "m"], ["y"])],
            X, Y, to=np.array([2**20, 2**20]),
        ),
        "needs 4096.0 GiB",
    ),
    "expansion": (
        lambda: model([node("Expand", ["x", "to"], ["e"]), node("ReduceMax", ["e"], ["y"], keepdims=0)], X, {"y": []},
                      to=np.array([2**44, 2, 3])),
        "needs 393216.0 GiB",
    ),
    "tile": (lambda: model([node("Tile", ["x", "to"], ["y"])], X, LISTED, to=np.array([2**30, 2**30])), "the_Tile_0"),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_huge(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, pattern = HUGE[name]
    said = build(made(), tmp_path, capsys)
    assert re.search(pattern, said), said


def test_a_weight_that_is_declared_huge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dims in ([2**40], [2**62, 2**62, 4], [-3]):
        proto = model([node("Add", ["x", "w"], ["y"])], X, Y)
        proto.graph.initializer.append(TensorProto(name="w", data_type=FLOAT, dims=dims))
        assert re.search(r"\bw\b", build(proto, tmp_path, capsys))


def test_shapes_asked_for_are_huge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", DIGITS, "-o", tmp_path / "d.engine", "--quiet", "--level", "0", "--shapes"]
    assert "lower the profile's largest shapes" in refused([*words, "image:99999999999x1x8x8"], capsys)
    assert not list(tmp_path.iterdir())


# weights

EXTERNAL = {
    "missing": ({"location": "gone.bin"}, "missing: no file .*gone.bin"),
    "outside": ({"location": "../outside.bin"}, "outside the model's folder"),
    "absolute": ({"location": "/etc/hostname"}, "outside the model's folder"),
    "short": ({"location": "short.bin"}, "of 24 bytes does not fit in short.bin"),
    "offset": ({"location": "short.bin", "offset": "-4"}, "at offset -4"),
    "text": ({"location": "short.bin", "offset": "begin"}, "damaged external_data"),
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info, pattern = EXTERNAL[name]
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(24))
    (folder / "short.bin").write_bytes(bytes(8))
    proto = model([node("Add", ["x", "w"], ["y"])], X, Y)
    tensor = proto.graph.initializer.add(name="w", data_type=FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    for key, value in info.items():
        tensor.external_data.add(key=key, value=value)
    said = build(proto, folder, capsys)
    assert "initializer 'w'" in said and re.search(pattern, said), said


@pytest.fixture
def broken_weight() -> onnx.ModelProto:
    weight = np.ones((2, 3), np.float32)
    weight[1, 1] = np.nan
    return model([node("Mul", ["x", "w"], ["y"])], X, Y, w=weight)


@pytest.mark.filterwarnings("default::ingot.importers.onnx.ModelWarning")
def test_nan_weights(broken_weight: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nan.onnx"
    onnx.save(broken_weight, path)
    assert main(["build", str(path), "--quiet", "--level", "0"]) == 1
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("ingot: warning: ") and warning.endswith("initializer 'w' holds 1 NaN")
    assert error.startswith("ingot: error: output 'y' is not a number, as initializer 'w' holds 1 NaN")
    assert [p.name for p in tmp_path.iterdir()] == ["nan.onnx"]
    assert main(["build", str(path), "--quiet", "--level", "0", "--no-verify"]) == 0


# at run time


@pytest.fixture(scope="module")
def engine_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "digits.engine"
    profile = ingot.Profile(image=((1, 1, 8, 8), (2, 1, 8, 8), (4, 1, 8, 8)))
    ingot.build(DIGITS, profiles=[profile], level=0).save(path)
    return path


RUNS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "name": ({"picture": np.zeros((1, 1, 8, 8), np.float32)}, ("'image' is missing", "image: float32['N', 1, 8, 8]")),
    "nothing": ({}, ("'image' is missing",)),
    "another": (
        {"image": np.zeros((1, 1, 8, 8), np.float32), "b": np.zeros(1)},
        ("no input 'b'", "image: float32['N', 1, 8, 8]"),
    ),
    "dtype": ({"image": np.zeros((1, 1, 8, 8))}, ("'image'", "float64", "takes float32")),
    "no array": ({"image": "eight"}, ("'image'", "takes float32")),
    "rank": ({"image": np.zeros((8, 8), np.float32)}, ("'image'", "[8, 8]", "['N', 1, 8, 8]")),
    "extent": ({"image": np.zeros((1, 3, 8, 8), np.float32)}, ("'image'", "3 at axis 1", "['N', 1, 8, 8]")),
    "profile": ({"image": np.zeros((9, 1, 8, 8), np.float32)}, ("'image'", "N=9", "1..4", "wider profile")),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_wrong_inputs(name: str, engine_file: Path) -> None:
    feeds, parts = RUNS[name]
    with ingot.Session(ingot.Engine.load(engine_file)) as session:
        with pytest.raises(InputError) as caught:
            session.run(feeds)
        session.run({"image": np.zeros((1, 1, 8, 8), np.float32)})  # and it still works
    assert not [part for part in parts if part not in str(caught.value)], caught.value


@pytest.mark.parametrize(
    ("shapes", "part"), [("image:9x1x8x8", "1..4"), ("image:1x3x8x8", "'image'"), ("picture:1x1x8x8", "'picture'")]
)
def test_shapes_an_engine_does_not_take(
    shapes: str, part: str, engine_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in refused(["report", engine_file, "-o", tmp_path / "r.html", "--shapes", shapes], capsys)
    assert part in refused(["trtexec", f"--loadEngine={engine_file}", f"--shapes={shapes}"], capsys, "[E] ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (np.zeros((1, 1, 8, 8)), "float64"),
        (np.zeros((8, 8), np.float32), "[8, 8]"),
        (b"junk", "cannot take"),
        (None, "No such file"),
    ],
    ids=["dtype", "rank", "junk", "missing"],
)
def test_input_files(
    content: Any, part: str, engine_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "image.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        path.write_bytes(content)
    assert part in refused(["trtexec", f"--loadEngine={engine_file}", f"--loadInputs=image:{path}"], capsys, "[E] ")
    assert part in refused(["compare", DIGITS, "--load-inputs", f"image:{path}"], capsys)


# engine files


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda b: b"", "not an Ingot engine"),
    "another file": (lambda b: WHOLE, "not an Ingot engine"),
    "format": (lambda b: b[:8] + b"\x07" + b[9:], "has engine format 7, this Ingot reads 1"),
    "header": (lambda b: flipped(b, 100), "header is damaged"),
    "weights": (lambda b: flipped(b, len(b) - 5000), "damaged"),
    "last byte": (lambda b: flipped(b, len(b) - 1), "damaged"),
    "cut": (lambda b: b[:-4096], "cut short|bytes long"),
    "longer": (lambda b: b + b"\0", "bytes long"),
}


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize("name", DAMAGE)
def test_engine_files(name: str, engine_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, pattern = DAMAGE[name]
    path = tmp_path / "bad.engine"
    path.write_bytes(change(engine_file.read_bytes()))
    for words in (["inspect", "engine", path], ["report", path, "-o", tmp_path / "r.html"],
                  ["compare", DIGITS, "--engine", path]):  # fmt: skip
        said = refused(words, capsys)
        assert "bad.engine" in said and re.search(pattern, said), said
    assert re.search(pattern, refused(["trtexec", f"--loadEngine={path}"], capsys, "[E] "))
    assert not (tmp_path / "r.html").exists()


def test_every_byte_counts(engine_file: Path, tmp_path: Path) -> None:
    content, path = engine_file.read_bytes(), tmp_path / "bad.engine"
    for place in np.random.default_rng(1).integers(0, len(content), 100):
        path.write_bytes(flipped(content, int(place)))
        with pytest.raises(EngineError, match=r"bad\.engine"):
            ingot.Engine.load(path).verified()


def test_an_engine_for_another_processor(engine_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "foreign.engine"
    engine = ingot.Engine.load(engine_file)
    replace(engine, variants=tuple(replace(v, requires=("avx9000",)) for v in engine.variants)).save(path)
    said = refused(["trtexec", f"--loadEngine={path}"], capsys, "[E] ")
    assert "foreign.engine holds no variant for this machine: it holds cpu" in said and "Rebuild it" in said
    assert main(["inspect", "engine", str(path)]) == 0 and "avx9000" in capsys.readouterr().out
    assert main(["report", str(path), "-o", str(tmp_path / "r.html")]) == 0
    assert "no variant for this machine" in (tmp_path / "r.html").read_text()


# places to write


@pytest.mark.parametrize("place", ["missing/x", "."])
def test_places_that_cannot_be_written(
    place: str, engine_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / place
    said = [
        refused(["build", DIGITS, "-o", target, "--quiet", "--level", "0"], capsys),
        refused(["report", engine_file, "-o", target], capsys),
        refused(["trtexec", f"--loadEngine={engine_file}", "--duration=0", f"--exportTimes={target}"], capsys, "[E] "),
    ]
    assert all("cannot write" in line for line in said), said
    assert not list(tmp_path.iterdir())


def test_a_device_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a file" in refused(["build", DIGITS, "-o", "/dev/null", "--quiet", "--level", "0"], capsys)
    assert Path("/dev/null").is_char_device()


LIMITED = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\n" \
    "del sys.argv[1]; runpy.run_module('ingot', run_name='__main__', alter_sys=True)"  # fmt: skip


def limited(words: Sequence[str | Path], limit: int) -> subprocess.CompletedProcess[str]:
    """`ingot …` where no file may grow beyond `limit` bytes: to it the disk is full.

    The process limits itself: a preexec_fn would fork this one, which gRPC, if another test has started it, does not
    survive.
    """
    command = [sys.executable, "-c", LIMITED, str(limit), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_full_disk(engine_file: Path, tmp_path: Path) -> None:
    for words in (["build", DIGITS, "--quiet", "--level", "0", "-o"], ["report", engine_file, "-o"]):
        target = tmp_path / "old"
        target.write_text("what was there")
        done = limited([*words, target], 20_000 if "build" in words else 2_000)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"ingot: error: cannot write {target}"), done.stderr
        assert target.read_text() == "what was there" and [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_timing_cache_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junk, words = tmp_path / "junk", ["build", DIGITS, "-o", tmp_path / "d.engine", "--quiet", "--level", "1"]
    junk.write_text("junk")
    assert "is not a timing cache" in refused([*words, "--timingCacheFile", junk], capsys)
    assert "has no folder" in refused([*words, "--timingCacheFile", tmp_path / "gone" / "times"], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["junk"] and junk.read_text() == "junk"


def test_a_reader_that_has_enough() -> None:
    """`ingot … | head`: no complaint about the pipe."""
    command = f"{sys.executable} -m ingot inspect model {DIGITS} --steps --json | head -c 10; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.endswith("0\n")

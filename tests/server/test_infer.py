"""The client, `ingot infer` and its loads, against a server and an engine."""

import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingot
from ingot.cli import main
from ingot.client import Client, ClientError
from ingot.server import load
from ingot.server.app import Server
from tests.server.models import scale

FIRST, SECOND = np.arange(16, dtype=np.int32)[None], np.full((1, 16), 3, np.int32)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{server.ports['http']}") as connected:
        yield connected


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("engine") / "scale.engine"
    ingot.build(scale(2.0), ingot.BuildConfig(target="cpu", level=0)).save(path)
    return str(path)


# -- the client -------------------------------------------------------------------------------------------------------
def test_numbers_and_texts(client: Client) -> None:
    outputs = client.infer("simple", {"INPUT0": FIRST, "INPUT1": SECOND})
    np.testing.assert_array_equal(outputs["OUTPUT1"], FIRST - SECOND)
    assert list(client.infer("simple", {"INPUT0": FIRST, "INPUT1": SECOND}, ["OUTPUT1"])) == ["OUTPUT1"]
    texts = np.array([["häuser", "b", ""]], object)
    assert client.infer("texts", {"INPUT": texts})["OUTPUT"].tolist() == [["häuser".encode(), b"b", b""]]
    assert client.infer("scale", {"x": np.ones((1, 4), np.float32)}, version=1)["y"].tolist() == [[2, 2, 2, 2]]


def test_sequences(client: Client) -> None:
    ask = {"x": np.ones((1, 1), np.float32)}
    assert client.infer("accumulator", ask, sequence_id=900, sequence_start=True)["y"].item() == 1001
    assert client.infer("accumulator", ask, sequence_id=900, sequence_end=True)["y"].item() == 2


def test_everything_else(client: Client) -> None:
    assert client.ready() and client.ready("simple") and not client.ready("none") and not client.ready("scale", 2)
    assert client.metadata()["name"] == "ingot" and client.metadata("simple")["inputs"][0]["name"] == "INPUT0"
    assert client.config("simple")["max_batch_size"] == 8
    assert client.statistics("simple", 1)[0]["name"] == "simple" and len(client.statistics()) > 3
    assert "simple" in {item["name"] for item in client.index()}
    client.unload("plain")
    assert not client.ready("plain")
    client.load("plain")
    assert client.ready("plain")


def test_refusals(client: Client) -> None:
    with pytest.raises(ClientError, match="unknown model") as refusal:
        client.infer("none", {"x": FIRST})
    assert refusal.value.status == 404
    with pytest.raises(ClientError, match="no datatype"):
        client.infer("scale", {"x": np.ones((1, 4), np.complex64)})
    with pytest.raises(ClientError, match="no address"):
        Client("ftp://x")
    with pytest.raises(ClientError, match="does not answer"):
        Client("http://127.0.0.1:1").ready()


def test_a_connection_the_server_closed_is_opened_again(server: Server, client: Client) -> None:
    assert client.ready()
    dropped = set(server.front.connections)
    for connection in dropped:
        server.front.mailbox.post(connection.drop)
    end = time.monotonic() + 60
    while dropped & server.front.connections:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert client.ready()


# -- the verb ---------------------------------------------------------------------------------------------------------
def shown(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["infer", *words]) == code
    told = capsys.readouterr()
    return told.err if code else told.out


def test_a_language_model_is_asked_otherwise(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    loaded, path = ingot.Engine.load(engine), tmp_path / "model.engine"
    replace(loaded, details={**loaded.details, "llm": {}}).save(path)
    assert f"`ingot llm generate {path}` asks it" in shown(capsys, str(path), code=1)


@pytest.mark.parametrize("target", ["http", "grpc", "engine"])
def test_files_in_files_out(
    server: Server, engine: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = engine if target == "engine" else f"{target}://127.0.0.1:{server.ports[target]}/scale/1"
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x)
    (tmp_path / "x.json").write_text(json.dumps({"x": x.tolist()}))
    (tmp_path / "x.bin").write_bytes(x.tobytes())
    for given in (f"x={tmp_path}/x.npy", f"{tmp_path}/x.npz", f"{tmp_path}/x.json", f"x={tmp_path}/x.bin"):
        assert json.loads(shown(capsys, address, given, "--json", "--shapes", "x:2x4")) == {"y": (x * 2).tolist()}
    assert "y  float32[2, 4]  0.0, 2.0, 4.0" in shown(
        capsys, address, f"x={tmp_path}/x.npy", "--save", f"{tmp_path}/o.npz"
    )
    shown(capsys, address, f"x={tmp_path}/x.npy", "--save", f"{tmp_path}/o.json")
    shown(capsys, address, f"x={tmp_path}/x.npy", "--save", f"{tmp_path}/folder")
    for found in (np.load(tmp_path / "o.npz")["y"], np.load(tmp_path / "folder" / "y.npy")):
        np.testing.assert_array_equal(found, x * 2)
    assert json.loads((tmp_path / "o.json").read_text()) == {"y": (x * 2).tolist()}


def test_json_on_standard_input(
    engine: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"x": [[1, 2, 3, 4]]}'))
    assert json.loads(shown(capsys, engine, "-", "--json")) == {"y": [[2, 4, 6, 8]]}


def test_texts_come_back_as_texts(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.json").write_text('{"INPUT": [["häuser"]]}')
    for scheme in ("http", "grpc"):
        address = f"{scheme}://127.0.0.1:{server.ports[scheme]}/texts"
        assert json.loads(shown(capsys, address, f"{tmp_path}/in.json", "--json")) == {"OUTPUT": [["häuser"]]}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["http://127.0.0.1:1/m"], "does not answer"), (["http://127.0.0.1:1"], "should read"),
        (["smoke://x/m"], "should read"), (["{engine}", "z=/no/such.npy"], "there is no input 'z'"),
        (["{engine}", "x=/no/such.npy"], "cannot read /no/such.npy"), (["{engine}", "loose.npy"], "NAME=loose.npy"),
        (["{engine}", "--shapes", "q:1"], "there is no input 'q'"), (["grpc://127.0.0.1:1/m"], "grpc://127.0.0.1:1"),
    ],
)  # fmt: skip
def test_what_is_refused(engine: str, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reason in shown(capsys, *(word.format(engine=engine) for word in words), code=1)


@pytest.mark.parametrize("target", ["http", "grpc", "engine"])
@pytest.mark.parametrize("loop", [["--concurrency=2"], ["--rate=100", "--concurrency=4"]], ids=["closed", "open"])
def test_loads(server: Server, engine: str, target: str, loop: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    address = engine if target == "engine" else f"{target}://127.0.0.1:{server.ports[target]}/scale"
    content = json.loads(shown(capsys, address, *loop, "--duration=0.5", "--json"))
    assert content["answered"] > 10 and content["refused"] == 0
    latency = content["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99.9"] <= latency["max"]
    assert ("offered_per_second" in content) == (loop[0] == "--rate=100")
    assert " ms" in shown(capsys, address, *loop, "--duration=0.2")


def test_a_load_that_is_refused(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, 5), np.float32))
    address = f"http://127.0.0.1:{server.ports['http']}/scale"
    assert main(["infer", address, f"x={tmp_path}/x.npy", "--concurrency=1", "--duration=0.2", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["answered"] == 0 and "unexpected shape" in next(iter(content["errors"]))


# -- loops ------------------------------------------------------------------------------------------------------------
def test_an_open_loop_counts_from_when_a_request_was_due() -> None:
    """One client that takes 20 ms, 100 requests a second: latencies grow, which a closed loop would not notice."""
    result = load.opened([lambda: time.sleep(0.02)], 0.5, 100, poisson=False)
    assert len(result.latencies) == 50 and result.latencies[-1] > 300
    steady = load.closed([lambda: time.sleep(0.02)], 0.3, warm_up=0.0)
    assert sorted(steady.latencies)[len(steady.latencies) // 2] < 200


def test_what_is_no_refusal_ends_the_load() -> None:
    def broken() -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load.closed([broken], 0.2, warm_up=0.0)
    assert load.Load(1.0, (), Counter({"no": 2})).as_plain()["refused"] == 2
    assert threading.active_count() < 50

"""A process per model: results, errors, death and restart, nothing left behind."""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ingot.server.app import BackgroundServer, Server
from ingot.server.arena import Arena
from ingot.server.model import EngineModel
from ingot.server.request import Request, Response, ServerError, Tensor
from tests.server.conftest import options
from tests.server.fakes import Answers
from tests.server.models import add_version, identity, scale

BYTES = 8  # onnx.TensorProto.STRING


def test_arrays_cross_an_arena() -> None:
    writer = Arena()
    reader = Arena(os.dup(writer.handle))
    words = np.array([[b"a", b""], [b"\0\xff", b"long" * 100]], object)
    arrays = {"x": np.arange(6, dtype=np.int16).reshape(2, 3), "empty": np.zeros((0, 4), np.float32), "words": words}
    for size in (1, 1 << 18):
        arrays["grown"] = np.full(size, 7, np.uint8)
        groups = [arrays, {"x": arrays["grown"][:3]}]
        found = reader.read(json.loads(json.dumps(writer.write(groups))), copy=True)
        for group, again in zip(groups, found, strict=True):
            assert all(again[name].dtype == array.dtype for name, array in group.items())
            assert all(np.array_equal(again[name], array) for name, array in group.items())
    writer.close()
    reader.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine_cache: Path) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("processes")
    add_version(root, "scale", 1, scale(2.0), "instance_group { count: 2 kind: KIND_CPU }")
    add_version(root, "other", 1, scale(4.0))
    add_version(root, "texts", 1, identity(BYTES, ["N", "M"]))
    with BackgroundServer(options(root, engine_cache, processes=True)) as running:
        yield running


def infer(server: Server, model: str, tensor: Tensor) -> Response:
    answered = threading.Event()
    outcomes: list[Response | ServerError] = []

    def done(outcome: Response | ServerError) -> None:
        outcomes.append(outcome)
        answered.set()

    server.service.infer(Request(model, (tensor,)), done)
    assert answered.wait(30)
    (outcome,) = outcomes
    if isinstance(outcome, ServerError):
        raise outcome
    return outcome


X = Tensor("x", "FP32", np.array([[1, 2, 3, 4]], np.float32))


def worker_of(server: Server, name: str) -> int:
    servable = server.repository.find(name)
    assert isinstance(servable, EngineModel)
    end = time.monotonic() + 60
    while (pid := servable.workers[0].pid) is None:  # between a death and its restart
        assert time.monotonic() < end
    assert pid != os.getpid()
    return pid


def test_models_run_in_processes_of_their_own(server: Server) -> None:
    assert len({worker_of(server, name) for name in ("scale", "other", "texts")}) == 3
    assert np.array_equal(infer(server, "scale", X).outputs[0].data, X.data * 2)
    words = np.array([["ä".encode(), b""]], object)
    assert infer(server, "texts", Tensor("INPUT", "BYTES", words)).outputs[0].data.tolist() == words.tolist()


def test_a_killed_process_starts_again_and_no_request_is_lost(server: Server) -> None:
    dead, other = worker_of(server, "scale"), worker_of(server, "other")
    os.kill(dead, signal.SIGKILL)
    for _ in range(4):
        assert np.array_equal(infer(server, "scale", X).outputs[0].data, X.data * 2)
    assert worker_of(server, "scale") != dead and worker_of(server, "other") == other


def test_killed_again_and_again_under_load(server: Server) -> None:
    """Every request is answered once: rightly, or with a clear refusal if its process died twice or could not start."""
    answers, expected = Answers(), {}

    def ask(first: int) -> None:
        for number in range(first, first + 40):
            tensor = Tensor("x", "FP32", np.full((1, 4), number, np.float32))
            server.service.infer(Request("scale", (tensor,), id=str(number)), answers)
            expected[str(number)] = number * 2.0

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(0, 400, 100)]
    for thread in threads:
        thread.start()
    for killed in range(3):
        answers.wait(1 + killed * 10)
        os.kill(worker_of(server, "scale"), signal.SIGKILL)
    for thread in threads:
        thread.join()
    outcomes = answers.wait(160)
    good = [outcome for outcome in outcomes if isinstance(outcome, Response)]
    assert all(outcome.outputs[0].data[0, 0] == expected[outcome.id] for outcome in good)
    refused = {str(outcome) for outcome in outcomes if isinstance(outcome, ServerError)}
    assert all("died twice" in reason or "cannot start: it ended" in reason for reason in refused), refused
    assert len(outcomes) == 160 and len({outcome.id for outcome in good}) == len(good) > 0


def test_other_models_never_notice(server: Server) -> None:
    os.kill(worker_of(server, "scale"), signal.SIGKILL)
    assert np.array_equal(infer(server, "other", X).outputs[0].data, X.data * 4)


def test_processes_end_with_the_server(tmp_path: Path, engine_cache: Path) -> None:
    add_version(tmp_path, "scale", 1, scale(2.0))
    with BackgroundServer(options(tmp_path, engine_cache, processes=True)) as running:
        pid = worker_of(running, "scale")
        address = f"http://127.0.0.1:{running.ports['http']}/v2/models/scale/infer"
        described = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
        answer = json.load(urllib.request.urlopen(address, json.dumps({"inputs": [described]}).encode()))
        assert answer["outputs"][0]["data"] == [2, 4, 6, 8]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

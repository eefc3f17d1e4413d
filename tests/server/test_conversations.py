"""A model.py that answers more than once, and one that asks other models: over gRPC streams, as events, as failures."""

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest

from ingot.server.app import BackgroundServer, Server
from ingot.server.conversations import Parts, Waits
from ingot.server.request import Response, ServerError
from ingot.server.schema import message
from tests.server.conftest import options
from tests.server.models import add_version, scale
from tests.server.test_python_models import write

COUNT = """
    import os, threading, time
    import numpy as np
    import triton_python_backend_utils as pb_utils

    FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

    class TritonPythonModel:
        def execute(self, requests):
            for request in requests:
                (wanted,) = request.inputs()[0].as_numpy().ravel().tolist()
                sender = request.get_response_sender()
                if wanted < 0:
                    SPECIAL[wanted](self, sender)
                else:
                    threading.Thread(target=self.count, args=(sender, wanted)).start()

        def count(self, sender, wanted):
            for number in range(wanted):
                if sender.is_cancelled():
                    break
                sender.send(self.made(number))
            sender.send(flags=FINAL)

        def made(self, number):
            return pb_utils.InferenceResponse([pb_utils.Tensor("NUMBER", np.array([number], np.int32))])

        def last_with_flag(self, sender):
            sender.send(self.made(5), flags=FINAL)

        def forget(self, sender):
            sender.send(self.made(0))

        def error(self, sender):
            sender.send(self.made(1))
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("no more", "UNAVAILABLE")), flags=FINAL)

        def fail(self, sender):
            sender.send(self.made(2))
            raise ValueError("broken")

        def die(self, sender):
            sender.send(self.made(3))
            os._exit(3)

        def too_much(self, sender):
            sender.send(flags=FINAL)
            try:
                sender.send(self.made(4))
            except pb_utils.TritonModelException:
                pass

        def forever(self, sender):
            number = 0
            while not sender.is_cancelled():
                sender.send(self.made(number))
                number += 1
            sender.send(flags=FINAL)

    SPECIAL = {
        -1: TritonPythonModel.last_with_flag, -2: TritonPythonModel.forget, -3: TritonPythonModel.error,
        -4: TritonPythonModel.fail, -5: TritonPythonModel.die, -6: TritonPythonModel.too_much,
        -7: TritonPythonModel.forever,
    }
"""
COUNT_CONFIG = """
backend: "python"
model_transaction_policy { decoupled: true }
input [ { name: "COUNT" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "NUMBER" data_type: TYPE_INT32 dims: [ 1 ] } ]
"""
CALLER = """
    import asyncio
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        async def execute(self, requests):
            return [await self.answer(request) for request in requests]

        async def answer(self, request):
            name = request.inputs()[0].as_numpy().ravel()[0].decode()
            tensor = pb_utils.Tensor("x", np.arange(4, dtype=np.float32)[None])
            asked = pb_utils.InferenceRequest(model_name=name, requested_output_names=["y"], inputs=[tensor])
            once, twice = await asyncio.gather(asked.async_exec(), asked.async_exec())
            if once.has_error():
                return pb_utils.InferenceResponse(error=once.error())
            total = sum(pb_utils.get_output_tensor_by_name(r, "y").as_numpy() for r in (once, twice))
            return pb_utils.InferenceResponse([pb_utils.Tensor("SUM", total.ravel())])
"""
CALLER_CONFIG = """
backend: "python"
input [ { name: "MODEL" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "SUM" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine_cache: Path) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("talking")
    write(root, "count", COUNT, COUNT_CONFIG)
    write(root, "caller", CALLER, CALLER_CONFIG)
    write(
        root,
        "again",
        CALLER,
        CALLER_CONFIG.replace("MODEL", "x").replace("SUM", "y").replace("TYPE_STRING", "TYPE_FP32"),
    )
    add_version(root, "scale", 1, scale(2.0))
    with BackgroundServer(options(root, engine_cache, processes=True)) as running:
        yield running


class Streamed:
    """A gRPC stream of requests to `count`; answers as (numbers, error, final)."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._asked: SimpleQueue[bytes | None] = SimpleQueue()
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        self.answers = call(iter(self._asked.get, None), timeout=60)

    def ask(self, count: int, **parameters: bool) -> None:
        asked = message("inference.ModelInferRequest")(model_name="count", id=str(count))
        asked.inputs.add(name="COUNT", datatype="INT32", shape=[1])
        asked.raw_input_contents.append(np.int32(count).tobytes())
        for name, value in parameters.items():
            asked.parameters[name].bool_param = value
        self._asked.put(asked.SerializeToString())

    def end(self) -> list[tuple[list[int], str, bool]]:
        self._asked.put(None)
        return [self.read(raw) for raw in self.answers]

    @staticmethod
    def read(raw: bytes) -> tuple[list[int], str, bool]:
        answer = message("inference.ModelStreamInferResponse").FromString(raw)
        response = answer.infer_response
        numbers = [int(np.frombuffer(item, np.int32)[0]) for item in response.raw_output_contents]
        return numbers, answer.error_message, response.parameters["triton_final_response"].bool_param


@pytest.fixture
def stream(server: Server) -> Iterator[Streamed]:
    with grpc.insecure_channel(f"127.0.0.1:{server.ports['grpc']}") as channel:
        yield Streamed(channel)


def test_as_many_answers_as_the_model_likes(stream: Streamed) -> None:
    stream.ask(3)
    stream.ask(0)
    stream.ask(40)  # more than wait for a client at once
    assert stream.end() == [([number], "", False) for count in (3, 0, 40) for number in range(count)]


def test_the_end_is_an_answer_where_it_is_asked_for(stream: Streamed) -> None:
    stream.ask(2, triton_enable_empty_final_response=True)
    stream.ask(-1, triton_enable_empty_final_response=True)
    assert stream.end() == [([0], "", False), ([1], "", False), ([], "", True), ([5], "", True)]


@pytest.mark.parametrize(
    ("case", "first", "words"),
    [(-2, [0], "gave its response sender up"), (-3, [1], "no more"), (-4, [2], "ValueError: broken"),
     (-5, [3], "died between the responses")],
)  # fmt: skip
def test_what_goes_wrong_after_the_first_answer(stream: Streamed, case: int, first: list[int], words: str) -> None:
    stream.ask(case)
    stream.ask(1)  # the model goes on
    answers = stream.end()
    assert answers[0] == (first, "", False) and words in answers[1][1] and answers[2] == ([0], "", False)


def test_nothing_follows_the_last_answer(stream: Streamed) -> None:
    stream.ask(-6)
    assert stream.end() == []


def test_a_client_that_leaves_ends_the_model(server: Server, stream: Streamed) -> None:
    stream.ask(-7)
    assert stream.read(next(stream.answers))[0] == [0]
    stream.answers.cancel()
    with grpc.insecure_channel(f"127.0.0.1:{server.ports['grpc']}") as channel:
        second = Streamed(channel)  # the one instance is free again
        second.ask(1)
        assert second.end() == [([0], "", False)]


def events(server: Server, count: int) -> Any:
    asked = json.dumps({"COUNT": count}).encode()
    address = f"http://127.0.0.1:{server.ports['http']}/v2/models/count/generate_stream"
    with urllib.request.urlopen(address, asked, timeout=60) as answer:
        return [json.loads(line[6:]) for line in answer.read().decode().split("\n\n") if line]


def test_an_event_for_each_answer(server: Server) -> None:
    assert [event["NUMBER"] for event in events(server, 30)] == list(range(30))
    assert events(server, 0) == []
    first, failed = events(server, -3)
    assert first["NUMBER"] == 1 and failed == {"error": "no more"}


def test_a_reader_that_leaves_ends_the_model(server: Server) -> None:
    body = json.dumps({"COUNT": -7}).encode()
    with socket.create_connection(("127.0.0.1", server.ports["http"]), timeout=30) as client:
        head = b"POST /v2/models/count/generate_stream HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
        client.sendall(head + body)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert [event["NUMBER"] for event in events(server, 1)] == [0]


@pytest.mark.parametrize("path", ["infer", "generate"])
def test_one_answer_is_not_what_a_decoupled_model_gives(server: Server, path: str) -> None:
    tensor = {"name": "COUNT", "datatype": "INT32", "shape": [1], "data": [1]}
    asked = json.dumps({"inputs": [tensor]} if path == "infer" else {"COUNT": 1}).encode()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{server.ports['http']}/v2/models/count/{path}", asked, timeout=30)
    assert refused.value.code == 501 and b"doesn't support models with decoupled" in refused.value.read()


# -- calls of other models --------------------------------------------------------------------------------------------
def call(server: Server, model: str) -> Any:
    tensor = {"name": "MODEL", "datatype": "BYTES", "shape": [1], "data": [model]}
    address = f"http://127.0.0.1:{server.ports['http']}/v2/models/caller/infer"
    with urllib.request.urlopen(address, json.dumps({"inputs": [tensor]}).encode(), timeout=60) as answer:
        return json.loads(answer.read())["outputs"][0]["data"]


def test_a_model_asks_another_one(server: Server) -> None:
    assert call(server, "scale") == [0.0, 4.0, 8.0, 12.0]


@pytest.mark.parametrize(
    ("model", "words"),
    [("caller", "'caller' cannot call 'caller' now"), ("nobody", "unknown model: 'nobody'"),
     ("count", "doesn't support models with decoupled")],
)  # fmt: skip
def test_a_call_that_fails_is_an_error_of_the_caller(server: Server, model: str, words: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        call(server, model)
    assert words in refused.value.read().decode()


def test_a_circle_of_two_is_refused_where_it_would_close() -> None:
    waits = Waits()
    leave = waits.enter("a", "b")
    second = waits.enter("b", "c")
    for caller, model in (("b", "a"), ("c", "a"), ("a", "a")):
        with pytest.raises(ServerError, match=f"'{caller}' cannot call '{model}' now"):
            waits.enter(caller, model)
    leave()
    waits.enter("c", "a")
    second()
    with pytest.raises(ServerError):
        waits.enter("a", "c")


# -- a slow client ----------------------------------------------------------------------------------------------------
def test_a_model_waits_for_its_client_but_not_for_ever() -> None:
    delivered: list[Any] = []
    parts = Parts(lambda parts, outcome, final: delivered.append(outcome), depth=2, patience=0.05)
    response = Response("m", 1, ())
    assert parts(response, False) and parts(response, False)
    assert not parts(response, False) and parts.too_slow and len(delivered) == 2
    assert not parts(response, False)


def test_a_model_that_waits_is_told_that_its_client_left() -> None:
    parts = Parts(lambda parts, outcome, final: None, depth=1, patience=60.0)
    response, results = Response("m", 1, ()), SimpleQueue[bool]()
    assert parts(response, False)
    waiting = threading.Thread(target=lambda: results.put(parts(response, False)))
    waiting.start()
    parts.leave()
    assert results.get(timeout=30) is False and not parts.too_slow
    waiting.join()

"""Models written in Python: what Triton hands them, what they return, how they fail; each in its own process."""

import http.client
import json
import os
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.server import pb_utils
from ingot.server.app import BackgroundServer, Server
from ingot.server.request import ServerError
from tests.server.conftest import options

UPPER = """
    import json, os
    import numpy as np
    import triton_python_backend_utils as pb_utils
    from helper import changed

    class TritonPythonModel:
        def initialize(self, args):
            self.config = json.loads(args["model_config"])
            dtype = pb_utils.get_output_config_by_name(self.config, "OUT")["data_type"]
            assert pb_utils.triton_string_to_numpy(dtype) is np.object_
            assert args["model_name"] == "upper" and args["model_version"] == "1"
            assert os.path.isdir(args["model_repository"]) and os.path.exists(pb_utils.get_model_dir() + "/model.py")
            pb_utils.Logger.log_info("ready to shout")

        def execute(self, requests):
            return [self.answer(request) for request in requests]

        def answer(self, request):
            texts = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
            if b"refuse" in texts:
                error = pb_utils.TritonError("not that", pb_utils.TritonError.INVALID_ARG)
                return pb_utils.InferenceResponse(error=error)
            if b"die" in texts:
                os._exit(3)
            if b"facts" in texts:
                facts = [request.request_id(), request.parameters(), *request.requested_output_names()]
                return self.made(np.array([["|".join(facts).encode()]], np.object_))
            if b"wrong" in texts:
                return self.made(np.zeros((1, 1), np.float32))
            return self.made(np.vectorize(changed, otypes=[object])(texts))

        def made(self, array):
            return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("OUT", array)])
"""
HELPER = "def changed(text):\n    return text.upper()\n"
UPPER_CONFIG = """
backend: "python" max_batch_size: 8
input [ { name: "IN" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "OUT" data_type: TYPE_STRING dims: [ 1 ] } ]
model_warmup [ { name: "one" batch_size: 2
  inputs { key: "IN" value { data_type: TYPE_STRING dims: [ 1 ] zero_data: true } } } ]
"""
COUNTER = """
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        @staticmethod
        def auto_complete_config(config):
            config.add_input({"name": "x", "data_type": "TYPE_INT32", "dims": [1]})
            config.add_output({"name": "sum", "data_type": "TYPE_INT32", "dims": [1]})
            config.set_max_batch_size(0)
            return config

        def initialize(self, args):
            self.sums = {}

        def execute(self, requests):
            responses = []
            for request in requests:
                start = request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
                control = pb_utils.get_input_tensor_by_name(request, "first").as_numpy()
                assert control.tolist() == [int(bool(start))] and request.requested_output_names() == ["sum"]
                before = 0 if start else self.sums[request.correlation_id()]
                kept = self.sums[request.correlation_id()] = before + request.inputs()[0].as_numpy()
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("sum", kept.astype(np.int32))]))
            return responses

        def finalize(self):
            open(__file__ + ".finalized", "w").close()
"""
COUNTER_CONFIG = """
backend: "python"
sequence_batching {
  oldest { max_candidate_sequences: 4 }
  control_input { name: "first" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }
}
"""


def write(root: Path, name: str, code: str, config: str) -> Path:
    folder = root / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(textwrap.dedent(code))
    (folder.parent / "config.pbtxt").write_text(config)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    (write(folder, "upper", UPPER, UPPER_CONFIG) / "helper.py").write_text(HELPER)
    write(folder, "counter", COUNTER, COUNTER_CONFIG)
    return folder


@pytest.fixture(scope="module")
def shouting(root: Path, engine_cache: Path) -> Iterator[Server]:
    with BackgroundServer(options(root, engine_cache, processes=True)) as running:
        yield running
    assert (root / "counter" / "1" / "model.py.finalized").exists()
    assert not list(root.rglob("__pycache__"))


def asked(server: Server, model: str, *inputs: tuple[str, str, Any], **more: Any) -> tuple[int, Any]:
    """(status, first output's data or error)."""
    entries = [
        {"name": name, "datatype": datatype, "shape": list(np.shape(data)), "data": data}
        for name, datatype, data in inputs
    ]
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60)
    connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": entries, **more}))
    response = connection.getresponse()
    body = json.loads(response.read())
    connection.close()
    return response.status, body["outputs"][0]["data"] if response.status == 200 else body["error"]


def shout(server: Server, *texts: str, **more: Any) -> tuple[int, Any]:
    return asked(server, "upper", ("IN", "BYTES", [[text] for text in texts]), **more)


def test_texts(shouting: Server) -> None:
    assert shout(shouting, "hello", "ä") == (200, ["HELLO", "ä".encode().upper().decode()])
    assert shouting.repository.find("upper").statistics.counts.executions == 1, "the warm-up does not count"


def test_what_a_request_tells(shouting: Server) -> None:
    more = {"id": "seven", "parameters": {"mood": "loud"}, "outputs": [{"name": "OUT"}]}
    assert shout(shouting, "facts", **more) == (200, ['seven|{"mood": "loud"}|OUT'])


def test_a_request_is_refused_alone(shouting: Server) -> None:
    before = shouting.repository.find("upper").statistics.counts.failures["BACKEND"]
    assert shout(shouting, "refuse") == (400, "not that")
    status, error = shout(shouting, "wrong")
    assert status == 500 and "execute returned FP32, not BYTES" in error
    assert shouting.repository.find("upper").statistics.counts.failures["BACKEND"] == before + 2


def test_a_process_that_dies(shouting: Server) -> None:
    status, error = shout(shouting, "die")
    assert status == 503 and "died twice" in error
    assert shout(shouting, "again") == (200, ["AGAIN"])
    pid = shouting.repository.find("upper").workers[0].pid  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGKILL)
    assert shout(shouting, "and again") == (200, ["AND AGAIN"])


def test_sequences_and_a_configuration_of_its_own(shouting: Server) -> None:
    config = shouting.service.config("counter")
    assert [item.name for item in config.input] == ["x"] and config.max_batch_size == 0
    for number, (identity, start, wanted) in enumerate([(5, True, 1), (6, True, 2), (5, False, 4), (6, False, 6)], 1):
        more = {"parameters": {"sequence_id": identity, "sequence_start": start, "sequence_end": wanted > 3}}
        assert asked(shouting, "counter", ("x", "INT32", [number]), **more) == (200, [wanted])


BROKEN = {
    "raises": ("class TritonPythonModel:\n  def execute(self, r): pass\n  def initialize(self, a): 1 / 0", "ZeroDiv"),
    "no_class": ("x = 1", "needs a class TritonPythonModel"),
    "syntax": ("def f(:", "SyntaxError"),
    "exits": ("import sys; sys.exit(3)", "SystemExit"),
    "dies": ("import os; os._exit(3)", "ended or did not answer"),
    "missing": ("import no_such_module", "no_such_module"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_model_that_cannot_start(tmp_path: Path, engine_cache: Path, kind: str) -> None:
    code, reason = BROKEN[kind]
    write(tmp_path, "bad", code, UPPER_CONFIG)
    with pytest.raises(ServerError, match=reason), BackgroundServer(options(tmp_path, engine_cache)):
        pass


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ('backend: "python"', "states no input"),
        (UPPER_CONFIG + 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "x.tgz" } }', "EXECUTION_ENV"),
        (UPPER_CONFIG + 'default_model_filename: "../model.py"', "leads out"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, engine_cache: Path, config: str, reason: str) -> None:
    write(tmp_path, "bad", "class TritonPythonModel:\n  def execute(self, r): pass", config)
    with pytest.raises(ServerError, match=reason), BackgroundServer(options(tmp_path, engine_cache)):
        pass


def test_what_execute_must_return(tmp_path: Path, engine_cache: Path) -> None:
    write(tmp_path, "upper", "class TritonPythonModel:\n  def execute(self, r): return None", UPPER_CONFIG)
    with pytest.raises(ServerError, match="must return a list of 1"), BackgroundServer(options(tmp_path, engine_cache)):
        pass


def test_helpers() -> None:
    texts = np.array([b"a", b"", b"longer"], np.object_)
    encoded = pb_utils.serialize_byte_tensor(texts)
    assert pb_utils.deserialize_bytes_tensor(encoded).tolist() == texts.tolist()
    assert pb_utils.numpy_to_triton_type(np.float16) == "TYPE_FP16"
    tensor = pb_utils.Tensor.from_dlpack("x", np.arange(3.0))
    assert tensor.triton_dtype() == "TYPE_FP64" and tensor.is_cpu() and tensor.shape() == [3]
    with pytest.raises(pb_utils.TritonModelException, match="custom metrics"):
        _ = pb_utils.MetricFamily
    asked = pb_utils.InferenceRequest(model_name="other", inputs=[tensor])
    with pytest.raises(pb_utils.TritonModelException, match="while execute runs"):
        asked.exec()
    with pytest.raises(pb_utils.TritonModelException, match="not decoupled"):
        asked.get_response_sender()
    with pytest.raises(AttributeError):
        _ = pb_utils.unheard_of


def until(holds: Any) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def test_requests_that_wait_are_handed_over_together(tmp_path: Path, engine_cache: Path) -> None:
    """While the first one runs, the others wait; then all of them come at once."""
    code = f"""
    import os, time, numpy as np, triton_python_backend_utils as pb_utils
    class TritonPythonModel:
        def execute(self, requests):
            open({str(tmp_path / "begun")!r}, "w").close()
            while not os.path.exists({str(tmp_path / "go")!r}):
                time.sleep(0.01)
            made = np.full((1, 1), len(requests), np.int32)
            return [pb_utils.InferenceResponse([pb_utils.Tensor("n", made)]) for _ in requests]
    """
    config = """backend: "python" max_batch_size: 8 input [ { name: "x" data_type: TYPE_INT32 dims: [ -1 ] } ]
    output [ { name: "n" data_type: TYPE_INT32 dims: [ 1 ] } ]"""
    write(tmp_path, "slow", code, config)
    with BackgroundServer(options(tmp_path, engine_cache)) as server:
        connections = [http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60) for _ in range(5)]
        entry = {"name": "x", "datatype": "INT32", "shape": [1, 2], "data": [1, 2]}
        pending = server.repository.find("slow")
        for number, connection in enumerate(connections):
            connection.request("POST", "/v2/models/slow/infer", json.dumps({"inputs": [entry]}))
            until((tmp_path / "begun").exists)
            until(lambda number=number: pending.pending == number)
        (tmp_path / "go").touch()
        answers = [json.loads(connection.getresponse().read()) for connection in connections]
        together = [answer["outputs"][0]["data"][0] for answer in answers]
        assert together == [1, 4, 4, 4, 4]
        for connection in connections:
            connection.close()

"""Every call of tritonclient's that applies, in its own interpreter: `client_checks.py HTTP GRPC`, checks on stdin."""

import json
import queue
import sys
import traceback
import urllib.request
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

PROTOCOLS = {"http": tritonclient.http, "grpc": tritonclient.grpc}
FIRST, SECOND = np.arange(16, dtype=np.int32)[None], np.full((1, 16), 3, np.int32)
CHECKS: dict[str, Callable[..., None]] = {}


def check(function: Callable[..., None]) -> Callable[..., None]:
    CHECKS[function.__name__] = function
    return function


@cache
def client(protocol: str) -> Any:
    address = sys.argv[1] if protocol == "http" else sys.argv[2]
    options = {"concurrency": 4} if protocol == "http" else {}
    return PROTOCOLS[protocol].InferenceServerClient(address, **options)


def tensor(api: Any, name: str, array: np.ndarray, datatype: str, **options: Any) -> Any:
    made = api.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, **options)
    return made


def sum_inputs(api: Any, **options: Any) -> list[Any]:
    return [tensor(api, n, x, "INT32", **options) for n, x in (("INPUT0", FIRST), ("INPUT1", SECOND))]


def verify_sum(result: Any) -> None:
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), FIRST + SECOND)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), FIRST - SECOND)


def refused(call: Callable[[], Any], *words: str) -> str:
    try:
        call()
    except InferenceServerException as error:
        text = f"{error.status()} {error.message()}"
        assert all(word in text for word in words), text
        return text
    raise AssertionError("nothing was refused")


@check
def health(protocol: str) -> None:
    live = client(protocol)
    assert live.is_server_live() and live.is_server_ready()
    assert live.is_model_ready("simple") and live.is_model_ready("simple", "1")
    assert not live.is_model_ready("simple", "2") and not live.is_model_ready("unheard_of")


@check
def metadata(protocol: str) -> None:
    options = {"as_json": True} if protocol == "grpc" else {}
    found = client(protocol).get_server_metadata(**options)
    assert {"classification", "binary_tensor_data", "statistics", "system_shared_memory"} <= set(found["extensions"])
    found = client(protocol).get_model_metadata("scale", **options)
    assert found["versions"] == ["1", "3"] and found["inputs"][0]["datatype"] == "FP32", found
    assert [int(extent) for extent in found["inputs"][0]["shape"]] == [-1, 4]
    refused(lambda: client(protocol).get_model_metadata("unheard_of"), "unknown model")


@check
def config(protocol: str) -> None:
    options = {"as_json": True} if protocol == "grpc" else {}
    found = client(protocol).get_model_config("simple", **options)
    found = found.get("config", found)
    assert found["max_batch_size"] == 8 and found["name"] == "simple"
    assert found["input"][0]["data_type"] == "TYPE_INT32" and [int(n) for n in found["input"][0]["dims"]] == [16]


@check
def infer_binary(protocol: str) -> None:
    api = PROTOCOLS[protocol]
    result = client(protocol).infer("simple", sum_inputs(api), request_id="seven")
    verify_sum(result)
    response = result.get_response()
    assert (response["id"] if protocol == "http" else response.id) == "seven"


@check
def infer_json(protocol: str) -> None:
    api = tritonclient.http
    outputs = [api.InferRequestedOutput(name, binary_data=False) for name in ("OUTPUT1", "OUTPUT0")]
    result = client("http").infer("simple", sum_inputs(api, binary_data=False), outputs=outputs)
    verify_sum(result)
    assert [output["name"] for output in result.get_response()["outputs"]] == ["OUTPUT1", "OUTPUT0"]


@check
def infer_some_outputs(protocol: str) -> None:
    api = PROTOCOLS[protocol]
    result = client(protocol).infer("simple", sum_inputs(api), outputs=[api.InferRequestedOutput("OUTPUT1")])
    assert result.as_numpy("OUTPUT0") is None
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), FIRST - SECOND)


@check
def infer_texts(protocol: str) -> None:
    words = np.array([["a", "größer", ""], ["x\0y", "z" * 1000, "b"]], object)
    result = client(protocol).infer("texts", [tensor(PROTOCOLS[protocol], "INPUT", words, "BYTES")])
    assert [item.decode() for item in result.as_numpy("OUTPUT").ravel()] == list(words.ravel())


@check
def infer_versions(protocol: str) -> None:
    x = np.array([[1, 2, 3, 4]], np.float32)
    for version, factor in (("1", 2), ("3", 3), ("", 3)):
        result = client(protocol).infer("scale", [tensor(PROTOCOLS[protocol], "x", x, "FP32")], model_version=version)
        np.testing.assert_array_equal(result.as_numpy("y"), x * factor)
    inputs = [tensor(PROTOCOLS[protocol], "x", x, "FP32")]
    refused(lambda: client(protocol).infer("scale", inputs, model_version="2"), "version 2 is not found")


@check
def infer_without_batching(protocol: str) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = client(protocol).infer("plain", [tensor(PROTOCOLS[protocol], "INPUT", x, "FP32")])
    np.testing.assert_array_equal(result.as_numpy("OUTPUT"), x)


@check
def infer_async(protocol: str) -> None:
    api = PROTOCOLS[protocol]
    if protocol == "http":
        handles = [client("http").async_infer("simple", sum_inputs(api)) for _ in range(8)]
        results = [handle.get_result() for handle in handles]
    else:
        done: queue.Queue[Any] = queue.Queue()
        for _ in range(8):
            client("grpc").async_infer(
                "simple", sum_inputs(api), callback=lambda result, error: done.put(error or result)
            )
        results = [done.get(timeout=60) for _ in range(8)]
    for result in results:
        verify_sum(result)


@check
def infer_stream(protocol: str) -> None:
    done: queue.Queue[Any] = queue.Queue()
    live = tritonclient.grpc.InferenceServerClient(sys.argv[2])
    live.start_stream(callback=lambda result, error: done.put(error or result))
    for number in range(5):
        live.async_stream_infer("simple", sum_inputs(tritonclient.grpc), request_id=str(number))
    live.async_stream_infer("unheard_of", sum_inputs(tritonclient.grpc))
    answers = [done.get(timeout=60) for _ in range(6)]
    live.stop_stream()
    live.close()
    good = [answer for answer in answers if not isinstance(answer, InferenceServerException)]
    assert sorted(answer.get_response().id for answer in good) == list("01234")
    for answer in good:
        verify_sum(answer)
    (bad,) = (answer for answer in answers if isinstance(answer, InferenceServerException))
    assert "unknown model" in bad.message()


@check
def infer_decoupled(protocol: str) -> None:
    done: queue.Queue[Any] = queue.Queue()
    live = tritonclient.grpc.InferenceServerClient(sys.argv[2])
    live.start_stream(callback=lambda result, error: done.put(error or result))
    numbers = tensor(tritonclient.grpc, "IN", np.array([7, 8, 9], np.int32), "INT32")
    live.async_stream_infer("repeat", [numbers], enable_empty_final_response=True)
    answers = [done.get(timeout=60) for _ in range(4)]
    live.async_stream_infer("repeat", [numbers])
    answers += [done.get(timeout=60) for _ in range(3)]
    live.stop_stream()
    live.close()
    last = [answer.get_response().parameters["triton_final_response"].bool_param for answer in answers]
    assert last == [False] * 3 + [True] + [False] * 3 and done.empty()
    del answers[3]
    assert [answer.as_numpy("OUT").tolist() for answer in answers] == [[7], [8], [9]] * 2
    refused(lambda: client("grpc").infer("repeat", [numbers]), "decoupled transaction policy")


@check
def infer_compressed(protocol: str) -> None:
    api = PROTOCOLS[protocol]
    for algorithm in ("gzip", "deflate"):
        options = (
            {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
            if protocol == "http"
            else {"compression_algorithm": algorithm}
        )
        verify_sum(client(protocol).infer("simple", sum_inputs(api), **options))


@check
def sequences(protocol: str) -> None:
    live, api = client(protocol), PROTOCOLS[protocol]

    def add(value: float, identity: int | str, **place: bool) -> float:
        inputs = [tensor(api, "x", np.array([[value]], np.float32), "FP32")]
        return float(live.infer("accumulator", inputs, sequence_id=identity, **place).as_numpy("y")[0, 0])

    assert add(1, 7, sequence_start=True) == 1001
    assert add(5, "other", sequence_start=True) == 1005
    assert add(2, 7) == 3
    assert add(10, "other", sequence_end=True) == 15
    assert add(3, 7, sequence_start=True) == 1003
    assert add(4, 7, sequence_end=True) == 7
    refused(lambda: add(1, 7), "must specify the START flag")
    x = [tensor(api, "x", np.ones((1, 1), np.float32), "FP32")]
    refused(lambda: live.infer("accumulator", x), "non-zero or non-empty correlation ID")


@check
def ensemble(protocol: str) -> None:
    x, api = np.array([[1, 2, 3, 4]], np.float32), PROTOCOLS[protocol]
    result = client(protocol).infer("chain", [tensor(api, "in", x, "FP32")])
    np.testing.assert_array_equal(result.as_numpy("middle"), x * 2)
    np.testing.assert_array_equal(result.as_numpy("out"), x * 6)
    result = client(protocol).infer("chain", [tensor(api, "in", x, "FP32")], outputs=[api.InferRequestedOutput("out")])
    assert result.as_numpy("middle") is None


@check
def response_cache(protocol: str) -> None:
    live, api = client(protocol), PROTOCOLS[protocol]

    def counts() -> tuple[int, int]:
        options = {"as_json": True} if protocol == "grpc" else {}
        (found,) = live.get_inference_statistics("cached", **options)["model_stats"]
        stats = found["inference_stats"]
        return int(stats["cache_hit"].get("count", 0)), int(stats["cache_miss"].get("count", 0))

    hits, misses = counts()
    x = np.random.default_rng().random((2, 4), np.float32)
    for _ in range(3):
        result = live.infer("cached", [tensor(api, "x", x, "FP32")])
        np.testing.assert_array_equal(result.as_numpy("y"), x * 5)
    assert counts() == (hits + 2, misses + 1)


@check
def classification(protocol: str) -> None:
    api = PROTOCOLS[protocol]
    outputs = [api.InferRequestedOutput("OUTPUT0", class_count=2)]
    found = client(protocol).infer("simple", sum_inputs(api), outputs=outputs).as_numpy("OUTPUT0")
    assert found.shape == (1, 2) and [item.decode() for item in found[0]] == ["18:15:label15", "17:14:label14"], found


@check
def system_shared_memory(protocol: str) -> None:
    api, live = PROTOCOLS[protocol], client(protocol)
    live.unregister_system_shared_memory()
    region = shm.create_shared_memory_region("tensors", f"/ingot_test_{protocol}", 4 * 64)
    try:
        shm.set_shared_memory_region(region, [FIRST, SECOND])
        live.register_system_shared_memory("tensors", f"/ingot_test_{protocol}", 4 * 64)
        status = live.get_system_shared_memory_status()
        assert "tensors" in str(status)
        refused(lambda: live.register_system_shared_memory("tensors", f"/ingot_test_{protocol}", 4), "already")
        inputs = [api.InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
        outputs = [api.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
        for number, item in enumerate((*inputs, *outputs)):
            item.set_shared_memory("tensors", 64, offset=64 * number)
        live.infer("simple", inputs, outputs=outputs)
        read = [shm.get_contents_as_numpy(region, np.int32, [1, 16], offset=64 * number) for number in (2, 3)]
        np.testing.assert_array_equal(read, [FIRST + SECOND, FIRST - SECOND])
        inputs[0].set_shared_memory("tensors", 64, offset=4 * 64 - 32)
        refused(lambda: live.infer("simple", inputs), "Invalid offset")
        live.unregister_system_shared_memory("tensors")
        refused(lambda: live.infer("simple", inputs), "Unable to find shared memory region")
        refused(lambda: live.register_system_shared_memory("out", "/../../etc/passwd", 64), "no shared memory key")
    finally:
        shm.destroy_shared_memory_region(region)


@check
def cuda_shared_memory(protocol: str) -> None:
    client(protocol).unregister_cuda_shared_memory()
    assert "regions" not in str(client(protocol).get_cuda_shared_memory_status()) or protocol == "grpc"
    refused(lambda: client(protocol).register_cuda_shared_memory("x", b"aGFuZGxl", 0, 64), "CUDA")


@check
def statistics(protocol: str) -> None:
    def successes() -> int:
        options = {"as_json": True} if protocol == "grpc" else {}
        (found,) = client(protocol).get_inference_statistics("simple", **options)["model_stats"]
        assert found["version"] == "1"
        return int(found["inference_stats"]["success"].get("count", 0))

    before = successes()
    client(protocol).infer("simple", sum_inputs(PROTOCOLS[protocol]))
    assert successes() == before + 1
    client(protocol).get_inference_statistics()


@check
def metrics(protocol: str) -> None:
    def value(name: str, **labels: str) -> float:
        page = urllib.request.urlopen(f"http://{sys.argv[3]}/metrics").read().decode()
        lines = [line for line in page.splitlines() if line.startswith(name + "{")]
        (line,) = [line for line in lines if all(f'{key}="{text}"' in line for key, text in labels.items())]
        return float(line.split()[-1])

    simple = {"model": "simple", "version": "1"}
    names = ("nv_inference_request_success", "nv_inference_count", "nv_inference_exec_count")
    before = [value(name, **simple) for name in names]
    failed = value("nv_inference_request_failure", reason="OTHER", **simple)
    client(protocol).infer("simple", sum_inputs(PROTOCOLS[protocol]))
    refused(lambda: client(protocol).infer("simple", sum_inputs(PROTOCOLS[protocol])[:1]), "expected 2 inputs")
    assert [value(name, **simple) for name in names] == [count + 1 for count in before]
    assert value("nv_inference_request_failure", reason="OTHER", **simple) == failed + 1
    assert value("ingot_request_latency_seconds_bucket", le="+Inf", **simple) >= before[0] + 1
    assert value("nv_inference_request_duration_us", **simple) > 0


@check
def index(protocol: str) -> None:
    options = {"as_json": True} if protocol == "grpc" else {}
    found = client(protocol).get_model_repository_index(**options)
    found = found["models"] if protocol == "grpc" else found
    assert {("scale", "1", "READY"), ("scale", "3", "READY")} <= {(m["name"], m["version"], m["state"]) for m in found}


@check
def load_and_unload(protocol: str) -> None:
    live, api = client(protocol), PROTOCOLS[protocol]
    live.unload_model("plain")
    assert not live.is_model_ready("plain")
    x = np.zeros((2, 3), np.float32)
    refused(lambda: live.infer("plain", [tensor(api, "INPUT", x, "FP32")]), "plain")
    override = {"backend": "onnxruntime", "parameters": {"note": {"string_value": "overridden"}}}
    live.load_model("plain", config=json.dumps(override))
    assert "overridden" in str(live.get_model_config("plain"))
    refused(lambda: live.load_model("plain", config='{"backend": "tensorflow"}'), "no backend 'tensorflow'")
    refused(lambda: live.load_model("plain", config="{"), "config")
    live.infer("plain", [tensor(api, "INPUT", x, "FP32")])
    assert "overridden" in str(live.get_model_config("plain"))
    live.load_model("plain")
    assert "overridden" not in str(live.get_model_config("plain"))
    refused(lambda: live.load_model("../plain"), "")
    refused(lambda: live.load_model("unheard_of"), "failed to load 'unheard_of'")


@check
def settings(protocol: str) -> None:
    live = client(protocol)
    live.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"], "trace_rate": "5"})
    assert "TIMESTAMPS" in str(live.get_trace_settings())
    live.update_trace_settings(settings={"trace_level": None, "trace_rate": None})
    assert "TIMESTAMPS" not in str(live.get_trace_settings())
    live.update_log_settings({"log_verbose_level": 1})
    live.update_log_settings({"log_verbose_level": 0})
    assert "log_verbose_level" in str(live.get_log_settings())


@check
def refusals(protocol: str) -> None:
    api, live = PROTOCOLS[protocol], client(protocol)
    refused(lambda: live.infer("unheard_of", sum_inputs(api)), "unknown model")
    refused(lambda: live.infer("simple", sum_inputs(api)[:1]), "expected 2 inputs but got 1")
    wrong = [tensor(api, name, FIRST.astype(np.float32), "FP32") for name in ("INPUT0", "INPUT1")]
    refused(lambda: live.infer("simple", wrong), "data-type is 'FP32'")
    wide = [tensor(api, name, np.zeros((1, 17), np.int32), "INT32") for name in ("INPUT0", "INPUT1")]
    refused(lambda: live.infer("simple", wide), "unexpected shape for input")
    many = [tensor(api, name, np.zeros((9, 16), np.int32), "INT32") for name in ("INPUT0", "INPUT1")]
    refused(lambda: live.infer("simple", many), "batch-size must be <= 8")
    output = [api.InferRequestedOutput("NONE")]
    refused(lambda: live.infer("simple", sum_inputs(api), outputs=output), "unexpected inference output 'NONE'")


def main() -> None:
    for line in sys.stdin:
        name, protocol = json.loads(line)
        failure = None
        try:
            CHECKS[name](protocol)
        except BaseException:  # noqa: BLE001 - reported to the test
            failure = traceback.format_exc()
        print(json.dumps(failure), flush=True)


if __name__ == "__main__":
    main()

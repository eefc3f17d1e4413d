"""One gRPC call after the other from an ordinary grpcio channel, and the engine alone, timed alike."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np

import ingot
from benchmarks.server_load import Load, summary
from ingot.server.schema import message

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


def infer_request(inputs: Arrays) -> bytes:
    """A serialised ModelInferRequest with raw contents (float32)."""
    asked = message("inference.ModelInferRequest")(model_name="model")
    for name, data in inputs.items():
        asked.inputs.add(name=name, datatype="FP32", shape=data.shape)
        asked.raw_input_contents.append(data.tobytes())
    return bytes(asked.SerializeToString())


def timed(call: Callable[[], Any], seconds: float) -> Load:
    """One call after the other."""
    for _ in range(50):
        call()
    latencies, begun = [], time.perf_counter()
    while (now := time.perf_counter()) < begun + seconds:
        call()
        latencies.append(time.perf_counter() - now)
    return summary(latencies, now - begun)


def grpc_calls(port: int, inputs: Arrays, seconds: float) -> Load:
    """ModelInfer from a blocking stub; messages are bytes, so that the client's protobuf is not measured."""
    request = infer_request(inputs)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        return timed(lambda: call(request, timeout=20), seconds)


def bare_engine(path: Path, inputs: Arrays, seconds: float) -> Load:
    """The session that the server runs, called directly."""
    with ingot.Session(ingot.Engine.load(path), threads=1) as session:
        return timed(lambda: session.run(inputs), seconds)

"""Every runtime behind one signature: opened on a model file, it is a function from inputs to outputs by name."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], dict[str, np.ndarray]]
Open = Callable[[Path, int], Run]


def open_onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, dict(inputs)), strict=True))


def open_openvino(path: Path, threads: int) -> Run:
    import openvino

    hints = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", {**hints, "INFERENCE_NUM_THREADS": threads})
    request, names = compiled.create_infer_request(), [output.any_name for output in compiled.outputs]
    return lambda inputs: dict(zip(names, request.infer(dict(inputs), share_inputs=True).values(), strict=True))


PEERS: dict[str, Open] = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}


def installed_peers() -> dict[str, Open]:
    return {name: opener for name, opener in PEERS.items() if find_spec(name)}

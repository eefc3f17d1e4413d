"""Every runtime behind one signature: opened on a model file, it is a function from inputs to outputs by name."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], dict[str, np.ndarray]]
Open = Callable[[Path, int], Run]
HINTS = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's words; int8 models, and what it does unasked, have none


def open_onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, dict(inputs)), strict=True))


def open_openvino(path: Path, threads: int, precision: str = "fp32") -> Run:
    import openvino

    hints = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": threads}
    hints |= {"INFERENCE_PRECISION_HINT": HINTS[precision]} if precision in HINTS else {}
    compiled = openvino.Core().compile_model(str(path), "CPU", hints)
    request, names = compiled.create_infer_request(), [output.any_name for output in compiled.outputs]
    return lambda inputs: dict(zip(names, request.infer(dict(inputs), share_inputs=True).values(), strict=True))


PEERS: dict[str, Open] = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}
UNASKED = "openvino unasked"


def installed_peers(precision: str = "fp32") -> dict[str, Open]:
    """Those installed, at a precision; a peer that lacks it runs the model as it is."""
    openers = PEERS | {"openvino": partial(open_openvino, precision=precision)}
    return {name: opener for name, opener in openers.items() if find_spec(name)}


def openvino_unasked() -> dict[str, Open]:
    """OpenVINO at the precision it takes for float32 models when nobody names one: bfloat16 where the CPU has it."""
    return {UNASKED: partial(open_openvino, precision="its own")} if find_spec("openvino") else {}

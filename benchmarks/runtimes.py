"""Every runtime behind one signature: opened on a model file, it is a function from inputs to outputs by name."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


def openvino_streams(path: Path, threads: int, streams: int, precision: str = "fp32") -> list[Run]:
    """A request for each stream of one model compiled for throughput."""
    import openvino

    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": str(streams), "INFERENCE_NUM_THREADS": threads}
    hints |= {"INFERENCE_PRECISION_HINT": HINTS[precision]} if precision in HINTS else {}
    compiled = openvino.Core().compile_model(str(path), "CPU", hints)
    names = [output.any_name for output in compiled.outputs]

    def opened(request: Any) -> Run:
        return lambda inputs: dict(zip(names, request.infer(dict(inputs), share_inputs=True).values(), strict=True))

    return [opened(compiled.create_infer_request()) for _ in range(streams)]


def open_torch_compiled(name: str, batch: int, precision: str, path: Path, threads: int) -> Run:
    """torch.compile of the network of the same name and shapes in benchmarks.torch_models, frozen: it times itself on
    inputs of its own, and its weights are not the file's, so that its outputs are not given."""
    import torch
    from torch._inductor import config as inductor

    from benchmarks import torch_models

    torch.set_num_threads(threads)
    torch._dynamo.reset()
    inductor.freezing = True
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module = torch_models.module(name).to(dtype)
    given = [x.to(dtype) if x.is_floating_point() else x for x in torch_models.inputs(name, batch)]
    compiled = torch.compile(module)

    def run(_: Arrays) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            compiled(*given)
        return {}

    run({})
    return run


PEERS: dict[str, Open] = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}
UNASKED, COMPILED = "openvino unasked", "torch.compile"


def installed_peers(precision: str = "fp32") -> dict[str, Open]:
    """Those installed, at a precision; a peer that lacks it runs the model as it is."""
    openers = PEERS | {"openvino": partial(open_openvino, precision=precision)}
    return {name: opener for name, opener in openers.items() if find_spec(name)}


def openvino_unasked() -> dict[str, Open]:
    """OpenVINO at the precision it takes for float32 models when nobody names one: bfloat16 where the CPU has it."""
    return {UNASKED: partial(open_openvino, precision="its own")} if find_spec("openvino") else {}


def torch_compiled(name: str, batch: int, precision: str) -> dict[str, Open]:
    """torch.compile, where torch is installed and has the network; it has no 8-bit rows."""
    if not find_spec("torch") or precision == "int8":
        return {}
    from benchmarks import torch_models

    return {COMPILED: partial(open_torch_compiled, name, batch, precision)} if name in torch_models.MODELS else {}

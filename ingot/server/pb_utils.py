"""`import triton_python_backend_utils as pb_utils`: what Triton's Python backend offers to a model.py.

Only names that models use are here; the rest of Triton's module (custom metrics, model control) raises an error that
says so, instead of an AttributeError.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.server.request import BY_CONFIG, BY_NUMPY, bytes_elements

TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 2
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
_MISSING = {
    "MetricFamily": "custom metrics", "Metric": "custom metrics", "PreferredMemory": "a choice of memory",
    "TRITONSERVER_MEMORY_CPU": "a choice of memory", "TRITONSERVER_MEMORY_GPU": "a choice of memory",
    "load_model": "model control from a model", "unload_model": "model control from a model",
    "is_model_ready": "model control from a model",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MISSING:
        raise TritonModelException(f"pb_utils.{name}: {_MISSING[name]} is not supported by this server")
    raise AttributeError(f"module 'triton_python_backend_utils' has no attribute {name!r}")


class TritonModelException(Exception):
    """What a model raises when it cannot go on."""


class TritonError:
    """What is wrong with one request, and its code."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG = "UNKNOWN", "INTERNAL", "NOT_FOUND", "INVALID_ARG"
    UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = "UNAVAILABLE", "UNSUPPORTED", "ALREADY_EXISTS", "CANCELLED"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self._code = str(message), code

    def message(self) -> str:
        """The sentence."""
        return self._message

    def code(self) -> str:
        """One of the codes above."""
        return self._code

    def __str__(self) -> str:
        return self._message


class Tensor:
    """A named array; text is an object array of `bytes`."""

    def __init__(self, name: str, array: Any) -> None:
        if not isinstance(array, np.ndarray):
            raise TritonModelException(f"Tensor '{name}' takes a numpy array, not {type(array).__name__}")
        if array.dtype.kind not in "OUS" and array.dtype.name not in BY_NUMPY:
            raise TritonModelException(f"Tensor '{name}': the protocol has no datatype for {array.dtype}")
        self._name, self._array = name, array

    def name(self) -> str:
        """The tensor's name."""
        return self._name

    def as_numpy(self) -> Any:
        """The array."""
        return self._array

    def triton_dtype(self) -> str:
        """The datatype as config.pbtxt spells it."""
        return numpy_to_triton_type(self._array.dtype)

    def shape(self) -> list[int]:
        """The extents."""
        return list(self._array.shape)

    def is_cpu(self) -> bool:
        """Always: tensors come through shared memory."""
        return True

    def to_dlpack(self) -> Any:
        """A capsule that torch and others take."""
        return self._array.__dlpack__()

    @staticmethod
    def from_dlpack(name: str, other: Any) -> Tensor:
        """A tensor over another library's CPU memory."""
        return Tensor(name, np.from_dlpack(other))


class InferenceRequest:
    """One request as a client sent it; or one of a model.py to another model, to be executed by `exec`."""

    def __init__(
        self, request_id: str = "", correlation_id: int | str = 0, inputs: Sequence[Tensor] = (),
        requested_output_names: Sequence[str] = (), model_name: str = "", model_version: int = -1, flags: int = 0,
        timeout: int = 0, parameters: Mapping[str, Any] | None = None, *, facts: Mapping[str, Any] | None = None,
        sender: ResponseSender | None = None,
    ) -> None:  # fmt: skip
        self._inputs, self._sender, self._own = list(inputs), sender, facts is None
        self._facts: dict[str, Any] = dict(facts) if facts is not None else {
            "id": request_id, "sequence": correlation_id, "outputs": list(requested_output_names), "model": model_name,
            "version": max(model_version, 0), "flags": flags, "timeout": timeout, "parameters": dict(parameters or {}),
        }  # fmt: skip

    def inputs(self) -> list[Tensor]:
        """Input tensors."""
        return self._inputs

    def request_id(self) -> str:
        """The client's own name of the request."""
        return str(self._facts["id"])

    def correlation_id(self) -> int | str:
        """The sequence; 0 if there is none."""
        identity: int | str = self._facts["sequence"]
        return identity

    def flags(self) -> int:
        """TRITONSERVER_REQUEST_FLAG_… of a sequence's first and last request."""
        return int(self._facts["flags"])

    def model_name(self) -> str:
        """The model asked for."""
        return str(self._facts["model"])

    def requested_output_names(self) -> list[str]:
        """Outputs the client wants."""
        return list(self._facts["outputs"])

    def parameters(self) -> str:
        """The request's own parameters, as JSON."""
        return json.dumps(self._facts["parameters"])

    def timeout(self) -> int:
        """Microseconds; 0 if there is none."""
        return int(self._facts["timeout"])

    def is_cancelled(self) -> bool:
        """Whether nobody listens any longer; known of decoupled models, once they have sent a response."""
        return self._sender is not None and self._sender.is_cancelled()

    def get_response_sender(self) -> ResponseSender:
        """What answers this request of a decoupled model."""
        if self._sender is None:
            problem = "this model is not decoupled: model_transaction_policy { decoupled: true }"
            raise TritonModelException(f"get_response_sender: {problem}")
        return self._sender

    def exec(self, decoupled: bool = False, execution_timeout: int = 0) -> InferenceResponse:
        """Ask another model of this server and wait for its response; calls run one after the other."""
        if not self._own or not self._facts["model"]:
            raise TritonModelException("exec takes a request of your own: InferenceRequest(model_name=…, inputs=[…])")
        if decoupled:
            raise TritonModelException("calling a decoupled model from a model.py is not supported")
        tensors = {tensor.name(): as_sent(tensor.as_numpy()) for tensor in self._inputs}
        facts = {**self._facts, "timeout": execution_timeout or self._facts["timeout"]}
        answer, outputs = _say({"call": facts}, tensors)
        if "error" in answer:
            return InferenceResponse(error=TritonError(answer["error"], answer["code"]))
        return InferenceResponse([Tensor(name, array) for name, array in outputs.items()])

    async def async_exec(self, decoupled: bool = False, execution_timeout: int = 0) -> InferenceResponse:
        """The same for `async def execute`."""
        return await asyncio.to_thread(self.exec, decoupled, execution_timeout)


class InferenceResponse:
    """Output tensors, or an error."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None, **_: Any) -> None:
        self._outputs, self._error = list(output_tensors or ()), error
        if error is not None and not isinstance(error, TritonError):
            raise TritonModelException(f"error takes a TritonError, not {type(error).__name__}")

    def output_tensors(self) -> list[Tensor]:
        """Output tensors."""
        return self._outputs

    def has_error(self) -> bool:
        """Whether this is an error."""
        return self._error is not None

    def error(self) -> TritonError | None:
        """The error."""
        return self._error


class Sent:
    """What has become of a decoupled request: `over` once its last response is out, `abandoned` if it never will be."""

    def __init__(self, number: int) -> None:
        self.number, self.over, self.cancelled = number, threading.Event(), False
        self.abandoned: TritonError | None = None


class ResponseSender:
    """Answers a request of a decoupled model, any number of times, from any thread."""

    def __init__(self, sent: Sent) -> None:
        self._sent = sent

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """One response; TRITONSERVER_RESPONSE_COMPLETE_FINAL with the last one, or alone. Waits for slow clients."""
        final = bool(flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        if self._sent.over.is_set():
            raise TritonModelException("send: the request's last response has been sent")
        if response is None and not final:
            raise TritonModelException("send takes a response, or TRITONSERVER_RESPONSE_COMPLETE_FINAL, or both")
        if response is not None:
            self._send(response, final)
        if final:
            self._sent.over.set()

    def _send(self, response: InferenceResponse, final: bool) -> None:
        error = response.error()
        facts: dict[str, Any] = {"part": self._sent.number, "final": final}
        facts |= {"error": error.message(), "code": error.code()} if error else {}
        tensors = {} if error else {tensor.name(): as_sent(tensor.as_numpy()) for tensor in response.output_tensors()}
        answer, _ = _say(facts, tensors)
        self._sent.cancelled = self._sent.cancelled or answer.get("cancelled", True)

    def is_cancelled(self) -> bool:
        """Whether nobody listens any longer; known once a response has been sent."""
        return self._sent.cancelled

    def __del__(self) -> None:
        if not self._sent.over.is_set():
            problem = "the model gave its response sender up without TRITONSERVER_RESPONSE_COMPLETE_FINAL"
            self._sent.abandoned = TritonError(problem)
            self._sent.over.set()


class ModelConfig:
    """What `auto_complete_config` is given: a configuration to be completed."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON data."""
        return self._config

    def set_max_batch_size(self, size: int) -> None:
        """0: the model does not batch."""
        self._config["max_batch_size"] = size

    def set_dynamic_batching(self) -> None:
        """Let the server form batches."""
        self._config.setdefault("dynamic_batching", {})

    def add_input(self, tensor: Mapping[str, Any]) -> None:
        """name, data_type, dims."""
        self._add("input", tensor)

    def add_output(self, tensor: Mapping[str, Any]) -> None:
        """name, data_type, dims."""
        self._add("output", tensor)

    def _add(self, kind: str, tensor: Mapping[str, Any]) -> None:
        known = [item for item in self._config.get(kind, []) if item["name"] != tensor["name"]]
        self._config[kind] = [*known, dict(tensor)]


class Logger:
    """Writes to the server's log."""

    INFO, WARNING, ERROR, VERBOSE = logging.INFO, logging.WARNING, logging.ERROR, logging.DEBUG
    _log = logging.getLogger("ingot.server.python")

    @classmethod
    def log(cls, message: str, level: int = logging.INFO) -> None:
        """One line."""
        cls._log.log(level, "%s", message)

    @classmethod
    def log_info(cls, message: str) -> None:
        """One line."""
        cls.log(message)

    @classmethod
    def log_warn(cls, message: str) -> None:
        """One line."""
        cls.log(message, cls.WARNING)

    @classmethod
    def log_error(cls, message: str) -> None:
        """One line."""
        cls.log(message, cls.ERROR)

    @classmethod
    def log_verbose(cls, message: str) -> None:
        """One line, if the server is verbose."""
        cls.log(message, cls.VERBOSE)


# -- helpers of Triton's module, by their names there -----------------------------------------------------------------
def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    """An input of a request; None if it has no such."""
    return _named(request.inputs(), name)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    """An output of a response; None if it has no such."""
    return _named(response.output_tensors(), name)


def _named(tensors: Sequence[Tensor], name: str) -> Tensor | None:
    return next((tensor for tensor in tensors if tensor.name() == name), None)


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> Any:
    """An input's entry of the configuration; None if it has no such."""
    return next((item for item in model_config.get("input", ()) if item["name"] == name), None)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> Any:
    """An output's entry of the configuration; None if it has no such."""
    return next((item for item in model_config.get("output", ()) if item["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    """Whether the configuration asks for decoupled responses."""
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def triton_string_to_numpy(name: str) -> Any:
    """numpy's type of a datatype as config.pbtxt spells it."""
    return np.object_ if name == "TYPE_STRING" else numpy_dtype(BY_CONFIG[name].numpy).type


def triton_to_numpy_type(name: str) -> Any:
    """The same (Triton takes an enumeration here)."""
    return triton_string_to_numpy(name)


def numpy_to_triton_type(dtype: Any) -> str:
    """The datatype of a numpy type, as config.pbtxt spells it."""
    found = np.dtype(dtype)
    return "TYPE_STRING" if found.kind in "OUS" else BY_NUMPY[found.name].config


def serialize_byte_tensor(array: Any) -> Any:
    """Text elements as one array of their bytes, each behind its length; None if there are none."""
    if array.size == 0:
        return None
    items = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel()]
    return np.frombuffer(b"".join(len(item).to_bytes(4, "little") + item for item in items), np.uint8)


def deserialize_bytes_tensor(encoded: Any) -> Any:
    """The elements that `serialize_byte_tensor` wrote."""
    raw, count, at = bytes(encoded), 0, 0
    while at < len(raw):
        at += 4 + int.from_bytes(raw[at : at + 4], "little")
        count += 1
    return bytes_elements("encoded", raw, count)


# -- for the process that runs the model ------------------------------------------------------------------------------
Ask = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, Any]]]
_folder = Path()
_ask: Ask | None = None


def connect(ask: Ask) -> None:
    """Say how the front is spoken to while a model runs."""
    global _ask
    _ask = ask


def _say(facts: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    if _ask is None:
        raise TritonModelException("other models can be called, and responses sent, while execute runs")
    return _ask(facts, tensors)


def as_sent(array: Any) -> Any:
    """Text in whatever form becomes an object array of bytes."""
    if array.dtype.kind not in "OUS":
        return array
    sent = np.empty(array.shape, object)
    sent.ravel()[:] = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()]
    return sent


def get_model_dir() -> str:
    """The folder of the version that is loaded."""
    return str(_folder)


def place(folder: Path) -> None:
    """Say which folder that is; for the process that loads the model."""
    global _folder
    _folder = folder

"""What every protocol decodes to and every scheduler works on: requests, responses, tensors, errors. Nothing is copied.

A tensor's `data` is an array over the bytes that arrived (a body, a message, shared memory) or that a session returned;
BYTES are object arrays of `bytes`. Times are nanoseconds of `time.monotonic_ns`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import IngotError

Array = np.ndarray[Any, np.dtype[Any]]
_SMALL = 4 << 10  # bytes that are copied faster than a view of them is made


class Code(enum.Enum):
    """Triton's error codes: (HTTP status, gRPC status name)."""

    UNKNOWN = (500, "UNKNOWN")
    INTERNAL = (500, "INTERNAL")
    NOT_FOUND = (404, "NOT_FOUND")
    INVALID_ARG = (400, "INVALID_ARGUMENT")
    UNAVAILABLE = (503, "UNAVAILABLE")
    UNSUPPORTED = (501, "UNIMPLEMENTED")
    ALREADY_EXISTS = (409, "ALREADY_EXISTS")
    CANCELLED = (499, "CANCELLED")
    TOO_LARGE = (413, "RESOURCE_EXHAUSTED")
    UNAUTHORIZED = (401, "UNAUTHENTICATED")

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.value[0]


class ServerError(IngotError):
    """A request that fails with one of Triton's codes; `reason` labels nv_inference_request_failure."""

    def __init__(self, code: Code, message: str, reason: str = "OTHER") -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


def invalid(message: str) -> ServerError:
    """The client's mistake."""
    return ServerError(Code.INVALID_ARG, message)


@dataclass(frozen=True)
class Datatype:
    """An element type by the name clients, config.pbtxt and numpy use; `size` is None for BYTES."""

    name: str
    config: str
    numpy: str
    size: int | None
    contents: str


DATATYPES = (
    Datatype("BOOL", "TYPE_BOOL", "bool", 1, "bool_contents"),
    Datatype("UINT8", "TYPE_UINT8", "uint8", 1, "uint_contents"),
    Datatype("UINT16", "TYPE_UINT16", "uint16", 2, "uint_contents"),
    Datatype("UINT32", "TYPE_UINT32", "uint32", 4, "uint_contents"),
    Datatype("UINT64", "TYPE_UINT64", "uint64", 8, "uint64_contents"),
    Datatype("INT8", "TYPE_INT8", "int8", 1, "int_contents"),
    Datatype("INT16", "TYPE_INT16", "int16", 2, "int_contents"),
    Datatype("INT32", "TYPE_INT32", "int32", 4, "int_contents"),
    Datatype("INT64", "TYPE_INT64", "int64", 8, "int64_contents"),
    Datatype("FP16", "TYPE_FP16", "float16", 2, ""),
    Datatype("FP32", "TYPE_FP32", "float32", 4, "fp32_contents"),
    Datatype("FP64", "TYPE_FP64", "float64", 8, "fp64_contents"),
    Datatype("BF16", "TYPE_BF16", "bfloat16", 2, ""),
    Datatype("BYTES", "TYPE_STRING", "string", None, "bytes_contents"),
)
BY_NAME = {datatype.name: datatype for datatype in DATATYPES}
BY_CONFIG = {datatype.config: datatype for datatype in DATATYPES}
BY_NUMPY = {datatype.numpy: datatype for datatype in DATATYPES}


@dataclass(slots=True)  # not frozen: that alone would take a third of the time to make one
class Tensor:
    """A named array; `datatype` is the protocol's name (FP32, BYTES, …)."""

    name: str
    datatype: str
    data: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents, the batch included."""
        return self.data.shape


@dataclass(frozen=True, slots=True)
class Placement:
    """Where in a registered shared memory region an output is to be written."""

    region: str
    offset: int
    byte_size: int


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """One output the client wants; `classification` > 0 asks for the best so many classes instead of the tensor."""

    name: str
    binary: bool = False
    classification: int = 0
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class SequencePlace:
    """The place of a request in a sequence of a stateful model."""

    identity: int | str
    start: bool = False
    end: bool = False


@dataclass(slots=True)
class Request:
    """One inference. `version` 0 lets the policy choose, `outputs` empty wants all; `priority` 0 is the default.

    `kind`: the same object for requests that differ in nothing but the numbers in their tensors; None: not known.
    `part` takes the responses of a decoupled model (outcome, whether it is the last) and returns whether anybody still
    listens; `caller`: the model that waits for this request's answer.
    """

    model: str
    inputs: tuple[Tensor, ...]
    version: int = 0
    id: str = ""
    outputs: tuple[RequestedOutput, ...] = ()
    sequence: SequencePlace | None = None
    priority: int = 0
    timeout_us: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    arrived: int = 0
    origin: Any = None  # tracing.Origin of a request that is traced or logged
    part: Callable[[Any, bool], bool] | None = None
    caller: str = ""
    kind: Any = None


@dataclass(slots=True)
class Response:
    """What a model made of a request; outputs in the order the request asks for. `ports` describe them."""

    model: str
    version: int
    outputs: tuple[Tensor, ...]
    id: str = ""
    ports: Any = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


Outcome = Response | ServerError
Done = Callable[[Outcome], None]  # called exactly once, from any thread; must not block


# -- bytes and arrays -------------------------------------------------------------------------------------------------
def element_count(name: str, shape: tuple[int, ...]) -> int:
    """Elements of a shape that came from outside; refuses negative extents and absurd products."""
    count = 1
    for extent in shape:
        if extent < 0:
            raise invalid(f"input '{name}' has a negative dimension: shape {list(shape)}")
        count *= extent
    if count > 1 << 40 or len(shape) > 32:
        raise invalid(f"input '{name}': shape {list(shape)} is too large")
    return count


def datatype_of(name: str, datatype: str) -> Datatype:
    """The element type a client named."""
    known = BY_NAME.get(datatype)
    if known is None:
        raise invalid(f"input '{name}' has the unknown datatype '{datatype}'; known are {', '.join(BY_NAME)}")
    return known


def from_bytes(name: str, datatype: str, shape: tuple[int, ...], raw: bytes | memoryview | bytearray) -> Tensor:
    """A tensor over little-endian bytes, which must be exactly as many as the shape takes."""
    kind, count = datatype_of(name, datatype), element_count(name, shape)
    if kind.size is None:
        return Tensor(name, datatype, bytes_elements(name, raw, count).reshape(shape))
    if len(raw) != count * kind.size:
        raise invalid(
            f"input '{name}' got unexpected byte size {len(raw)}, expected {count * kind.size} "
            f"for {datatype} with shape {list(shape)}"
        )
    return Tensor(name, datatype, np.frombuffer(raw, numpy_dtype(kind.numpy)).reshape(shape))


def bytes_elements(name: str, raw: bytes | memoryview | bytearray, count: int) -> Array:
    """`count` elements, each a little-endian u32 length and so many bytes."""
    view, elements, at = memoryview(raw), np.empty(min(count, len(raw) // 4), object), 0
    for index in range(count):
        start = at + 4
        end = start + int.from_bytes(view[at:start], "little")
        if start > len(view) or end > len(view):
            raise invalid(
                f"input '{name}': element {index} of {count} BYTES elements ends beyond the {len(view)} bytes sent"
            )
        elements[index], at = bytes(view[start:end]), end
    if at != len(view):
        raise invalid(f"input '{name}': {len(view) - at} bytes follow its {count} BYTES elements")
    return elements


def to_bytes(tensor: Tensor) -> bytes | memoryview:
    """The little-endian bytes of a tensor: a view, unless it holds BYTES, or so little that a view costs more."""
    if tensor.datatype == "BYTES":
        return b"".join(len(item).to_bytes(4, "little") + item for item in tensor.data.ravel())
    if tensor.data.nbytes <= _SMALL:
        return tensor.data.tobytes()
    data = tensor.data if tensor.data.flags.c_contiguous else np.ascontiguousarray(tensor.data)
    return data.reshape(-1).view(np.uint8).data

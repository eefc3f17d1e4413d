"""A small client of the model server, of numpy and the standard library: `Client("http://host:8000").infer(…)`.

Any KServe v2 server over HTTP answers it. One connection, one request at a time; give each thread its own.
"""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import IngotError

DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    "bfloat16": "BF16",
}  # fmt: skip
_DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}


class ClientError(IngotError):
    """The server refused a request, or nobody answered; `status` is HTTP's, 0 where there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A connection to a server; a context manager. `url`: http://host:port or https://host:port."""

    def __init__(self, url: str, key: str = "", timeout: float = 60.0, context: ssl.SSLContext | None = None) -> None:
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientError(f"{url!r} is no address of a server; write http://host:port")
        self.address = f"{parts.scheme}://{parts.netloc}"
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        if parts.scheme == "https":
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port or 443, timeout=timeout, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(parts.hostname, parts.port or 8000, timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()

    # -- asking -------------------------------------------------------------------------------------------------------
    def infer(
        self, model: str, inputs: Mapping[str, Any], outputs: Sequence[str] = (), version: int = 0, **parameters: Any
    ) -> dict[str, Any]:
        """Outputs by name; text is an object array of str or bytes, and comes back as bytes.

        `parameters`: timeout (µs), priority, sequence_id, sequence_start, sequence_end, or the model's own.
        """
        head, body = encoded(inputs, outputs, parameters)
        headers = {"inference-header-content-length": str(head), "content-type": "application/octet-stream"}
        answer, raw = self._ask("POST", _path(model, version) + "/infer", body, headers)
        length = answer.getheader("inference-header-content-length")
        return decoded(raw, int(length) if length else len(raw))

    def ready(self, model: str = "", version: int = 0) -> bool:
        """Whether the server, or a model, takes requests."""
        path = _path(model, version) + "/ready" if model else "/v2/health/ready"
        return self._exchange("GET", path, b"", {})[0].status == 200

    def metadata(self, model: str = "", version: int = 0) -> Any:
        """Inputs and outputs of a model; without one, the server's name, version and extensions."""
        return self._json("GET", _path(model, version) if model else "/v2")

    def config(self, model: str, version: int = 0) -> Any:
        """A model's complete configuration."""
        return self._json("GET", _path(model, version) + "/config")

    def statistics(self, model: str = "", version: int = 0) -> Any:
        """Statistics of a model, or of all."""
        path = _path(model, version) + "/stats" if model else "/v2/models/stats"
        return self._json("GET", path)["model_stats"]

    def index(self) -> Any:
        """Every model the server knows, and its state."""
        return self._json("POST", "/v2/repository/index", {})

    def load(self, model: str, **parameters: Any) -> None:
        """Load or reload a model (the server needs --model-control-mode=explicit)."""
        self._json("POST", f"/v2/repository/models/{urllib.parse.quote(model, '')}/load", {"parameters": parameters})

    def unload(self, model: str) -> None:
        """Unload a model."""
        self._json("POST", f"/v2/repository/models/{urllib.parse.quote(model, '')}/unload", {})

    def _json(self, method: str, path: str, document: Any = None) -> Any:
        body = b"" if document is None else json.dumps(document).encode()
        raw = self._ask(method, path, body, {})[1]
        return json.loads(raw) if raw else None

    def _ask(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        answer, raw = self._exchange(method, path, body, headers)
        if answer.status != 200:
            raise ClientError(f"{self.address}{path}: {_error(raw) or answer.reason}", answer.status)
        return answer, raw

    def _exchange(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """A connection that the server has closed since is opened again, once, before anything was answered."""
        fresh = self._connection.sock is None
        try:
            self._connection.request(method, path, body, {**self._headers, **headers})
            answer = self._connection.getresponse()
            return answer, answer.read()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
            self._connection.close()
            if fresh:
                raise ClientError(f"{self.address} closed the connection: {error}") from error
            return self._exchange(method, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ClientError(f"{self.address} does not answer: {error}") from error


def _path(model: str, version: int) -> str:
    path = f"/v2/models/{urllib.parse.quote(model, '')}"
    return f"{path}/versions/{version}" if version else path


def _error(raw: bytes) -> str:
    try:
        return str(json.loads(raw)["error"])
    except (ValueError, KeyError, TypeError):
        return raw[:200].decode("utf-8", "replace")


# -- tensors ----------------------------------------------------------------------------------------------------------
def encoded(
    inputs: Mapping[str, Any], outputs: Sequence[str] = (), parameters: Mapping[str, Any] | None = None
) -> tuple[int, bytes]:
    """(length of the JSON, JSON and binary tensors) of a request."""
    described, raw = [], []
    for name, value in inputs.items():
        array = np.asarray(value)
        datatype, data = packed(name, array)
        described.append({
            "name": name, "datatype": datatype, "shape": list(array.shape),
            "parameters": {"binary_data_size": len(data)},
        })  # fmt: skip
        raw.append(data)
    document: dict[str, Any] = {"inputs": described, "parameters": {"binary_data_output": True, **(parameters or {})}}
    if outputs:
        document["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    head = json.dumps(document).encode()
    return len(head), b"".join([head, *raw])


def packed(name: str, array: Any) -> tuple[str, bytes]:
    """(datatype, little-endian bytes) of an array; text elements each behind its length."""
    if array.dtype.kind in "OUS":
        items = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()]
        return "BYTES", b"".join(len(item).to_bytes(4, "little") + item for item in items)
    if array.dtype.name not in DATATYPES:
        raise ClientError(f"input {name!r}: the protocol has no datatype for {array.dtype}")
    return DATATYPES[array.dtype.name], np.ascontiguousarray(array).tobytes()


def decoded(raw: bytes, length: int) -> dict[str, Any]:
    """Outputs of a response whose JSON takes `length` bytes."""
    at, found = length, {}
    for item in json.loads(raw[:length])["outputs"]:
        size = item.get("parameters", {}).get("binary_data_size")
        if size is None:
            data = [text.encode() for text in item["data"]] if item["datatype"] == "BYTES" else item["data"]
            array: Any = _array(item["datatype"], data)
        else:
            array, at = unpacked(item["datatype"], raw[at : at + size]), at + size
        found[item["name"]] = array.reshape(item["shape"])
    return found


def unpacked(datatype: str, raw: bytes) -> Any:
    """A flat array of little-endian bytes; BYTES become an object array of bytes."""
    if datatype != "BYTES":
        return np.frombuffer(raw, numpy_dtype(_DTYPES[datatype]))
    items, at = [], 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        items.append(raw[at + 4 : end])
        at = end
    return _array(datatype, items)


def _array(datatype: str, data: Any) -> Any:
    if datatype != "BYTES":
        return np.array(data, numpy_dtype(_DTYPES[datatype]))
    array = np.empty(len(data), object)
    array[:] = data
    return array

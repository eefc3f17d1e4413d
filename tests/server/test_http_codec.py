"""The HTTP codec against bodies a client may send: what is decoded is what was meant, all else is a clear 400."""

import gzip
import json
import zlib
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn

from ingot.server import http_codec
from ingot.server.http_codec import Decoder, decode
from ingot.server.ports import Port, Ports, answer
from ingot.server.request import DATATYPES, Code, Request, ServerError, Tensor, from_bytes, to_bytes
from ingot.server.shm import Regions

REGIONS = Regions()
NUMBERS = [datatype for datatype in DATATYPES if datatype.name not in ("BYTES", "BF16")]
ARRAYS = st.sampled_from(NUMBERS).flatmap(
    lambda kind: drawn.arrays(kind.numpy, drawn.array_shapes(min_dims=0, min_side=0)).map(lambda x: (kind.name, x))
)


def body_of(tensors: list[Tensor], **more: Any) -> tuple[bytes, int]:
    raw = [bytes(to_bytes(tensor)) for tensor in tensors]
    inputs = [
        {"name": x.name, "datatype": x.datatype, "shape": list(x.shape), "parameters": {"binary_data_size": len(data)}}
        for x, data in zip(tensors, raw, strict=True)
    ]
    text = json.dumps({"inputs": inputs, **more}).encode()
    return text + b"".join(raw), len(text)


def same(found: Tensor, meant: Tensor) -> bool:
    return found.name == meant.name and found.shape == meant.shape and bytes(to_bytes(found)) == bytes(to_bytes(meant))


@settings(max_examples=150, deadline=None)
@given(st.lists(ARRAYS, min_size=1, max_size=3))
def test_binary_tensors_come_through_twice(arrays: list[tuple[str, np.ndarray]]) -> None:
    """The second time from memory of the JSON part."""
    tensors = [Tensor(f"x{index}", name, array) for index, (name, array) in enumerate(arrays)]
    body, length = body_of(tensors)
    decoder = Decoder(REGIONS)
    for _ in range(2):
        request = decoder(body, length, "m", 1, 5)
        assert all(same(found, meant) for found, meant in zip(request.inputs, tensors, strict=True))
        assert request.model == "m" and request.arrived == 5


def test_what_is_remembered_is_only_the_text() -> None:
    decoder = Decoder(REGIONS)
    first, second = (Tensor("x", "FP32", np.full((1, 2), value, np.float32)) for value in (1, 2))
    (one, length), (two, _) = body_of([first]), body_of([second])
    assert same(decoder(one, length, "a", 0, 0).inputs[0], first)
    request = decoder(two, length, "b", 3, 0)
    assert same(request.inputs[0], second) and (request.model, request.version) == ("b", 3)
    for cut in (two[:-1], two + b"\0"):
        with pytest.raises(ServerError) as caught:
            decoder(cut, length, "b", 3, 0)
        assert caught.value.code is Code.INVALID_ARG


@settings(max_examples=100, deadline=None)
@given(drawn.arrays(np.int32, drawn.array_shapes(max_side=4)), st.booleans())
def test_json_data_flat_or_nested(array: np.ndarray, nested: bool) -> None:
    data = array.tolist() if nested else array.ravel().tolist()
    entry = {"name": "x", "datatype": "INT32", "shape": list(array.shape), "data": data}
    (found,) = decode(json.dumps({"inputs": [entry]}).encode(), None, "m", 0, REGIONS, 0).inputs
    assert np.array_equal(found.data, array)


GOOD = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}


@pytest.mark.parametrize(
    "document",
    [
        [], 3, None, {}, {"inputs": 1}, {"inputs": [1]}, {"inputs": [{}]}, {"inputs": [{**GOOD, "name": 3}]},
        {"inputs": [{**GOOD, "datatype": "FP31"}]}, {"inputs": [{**GOOD, "shape": [-2]}]},
        {"inputs": [{**GOOD, "shape": [2.0]}]}, {"inputs": [{**GOOD, "shape": ["2"]}]},
        {"inputs": [{**GOOD, "shape": [2**62, 4]}]}, {"inputs": [{**GOOD, "shape": [3]}]},
        {"inputs": [{**GOOD, "data": [1, "2"]}]}, {"inputs": [{**GOOD, "data": [1, None]}]},
        {"inputs": [{**GOOD, "data": [[1], [2, 3]]}]}, {"inputs": [{**GOOD, "data": "ab"}]},
        {"inputs": [{**GOOD, "data": [True, False]}]}, {"inputs": [{**GOOD, "datatype": "INT8", "data": [1, 300]}]},
        {"inputs": [{**GOOD, "datatype": "INT32", "data": [1, 2.5]}]},
        {"inputs": [{**GOOD, "datatype": "UINT8", "data": [1, -1]}]},
        {"inputs": [{**GOOD, "datatype": "UINT64", "data": [1, 2**70]}]},
        {"inputs": [{**GOOD, "datatype": "BYTES", "data": [1, 2]}]},
        {"inputs": [{**GOOD, "parameters": {"binary_data_size": 8}}]},
        {"inputs": [{**GOOD, "parameters": {"binary_data_size": -8}}]},
        {"inputs": [{**GOOD, "parameters": {"shared_memory_region": "none", "shared_memory_byte_size": 8}}]},
        {"inputs": [GOOD], "id": 5}, {"inputs": [GOOD], "outputs": [{"name": 1}]},
        {"inputs": [GOOD], "outputs": [{"name": "y", "parameters": {"classification": -1}}]},
        {"inputs": [GOOD], "parameters": {"sequence_id": -4}}, {"inputs": [GOOD], "parameters": {"timeout": "1"}},
        {"inputs": [GOOD], "parameters": {"sequence_id": 4, "sequence_start": 1}},
    ],
)  # fmt: skip
def test_what_is_refused(document: Any) -> None:
    with pytest.raises(ServerError) as caught:
        decode(json.dumps(document).encode(), None, "m", 0, REGIONS, 0)
    assert caught.value.code in (Code.INVALID_ARG, Code.NOT_FOUND) and str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"NaN", b'{"inputs": [NaN]}', b"[" * 100_000, b"\xff\xfe", b'{"a": 1e}'])
def test_malformed_json(text: bytes) -> None:
    with pytest.raises(ServerError) as caught:
        decode(text, None, "m", 0, REGIONS, 0)
    assert caught.value.code is Code.INVALID_ARG


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_mutation_is_a_request_or_a_400(data: st.DataObject) -> None:
    """Bytes changed, cut or inserted anywhere, any header length: never another exception."""
    body, length = body_of([Tensor("x", "FP32", np.ones((1, 4), np.float32)), texts(b"ab", b"")], id="7")
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(changed) - 1, 0)))
        changed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    header = data.draw(st.sampled_from([length, None, 0, length - 1, len(body) + 1]))
    try:
        request = Decoder(REGIONS)(bytes(changed), header, "m", 0, 0)
    except ServerError as error:
        assert error.code in (Code.INVALID_ARG, Code.NOT_FOUND)
    else:
        assert isinstance(request, Request)


def texts(*items: bytes) -> Tensor:
    array = np.empty(len(items), object)
    array[:] = items
    return Tensor("t", "BYTES", array)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=6), st.binary(max_size=8), st.integers(0, 8))
def test_bytes_elements(items: list[bytes], more: bytes, count: int) -> None:
    raw = bytes(to_bytes(texts(*items)))
    assert from_bytes("t", "BYTES", (len(items),), raw).data.tolist() == items
    if more:
        with pytest.raises(ServerError):
            from_bytes("t", "BYTES", (len(items),), raw + more)
    if count > len(items):
        with pytest.raises(ServerError):
            from_bytes("t", "BYTES", (count,), raw)


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_compression(encoding: bytes) -> None:
    plain = b"x" * 100_000
    packed = gzip.compress(plain) if encoding == b"gzip" else zlib.compress(plain)
    assert http_codec.decompressed(packed, encoding, 1 << 20) == plain
    for data, limit, code in (
        (packed, 1000, Code.TOO_LARGE), (packed[:-5], 1 << 20, Code.INVALID_ARG), (plain, 1 << 20, Code.INVALID_ARG),
    ):  # fmt: skip
        with pytest.raises(ServerError) as caught:
            http_codec.decompressed(data, encoding, limit)
        assert caught.value.code is code
    with pytest.raises(ServerError, match="not supported"):
        http_codec.decompressed(packed, b"br", 1 << 20)


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [(b"gzip", b"gzip"), (b"deflate, gzip", b"deflate"), (b"br", b""), (b"gzip;q=0, deflate", b"deflate"), (b"", b"")],
)
def test_the_compression_a_client_accepts(accepted: bytes, chosen: bytes) -> None:
    assert http_codec.chosen_compression(accepted) == chosen


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: kind.name)
def test_responses(kind: Any, binary: bool) -> None:
    data = np.arange(6).reshape(2, 3).astype(kind.numpy)
    ports = Ports("m", (), (Port("y", kind.name, (3,)),), 4)
    request = Request("m", (), parameters={"binary_data_output": binary})
    response = answer(request, 2, (Tensor("y", kind.name, data),), ports)
    for _ in range(2):
        parts, length = http_codec.encode(request, response, REGIONS)
        body = b"".join(parts)
        described = orjson.loads(body[:length] if length is not None else body)
        (output,) = described["outputs"]
        assert described["model_version"] == "2" and output["shape"] == [2, 3] and output["datatype"] == kind.name
        if binary:
            assert length is not None and body[length:] == data.tobytes()
        else:
            assert output["data"] == data.ravel().tolist()


@pytest.mark.parametrize("datatype", ["FP32", "INT32"])
@pytest.mark.parametrize("data", [[1.5, True, 0.0, 2.0], [[1, 2], [3, False]], [True] * 4])
def test_a_boolean_is_no_number(datatype: str, data: list[Any]) -> None:
    text = json.dumps({"inputs": [{"name": "x", "shape": [4], "datatype": datatype, "data": data}]})
    with pytest.raises(ServerError, match="'data' of input 'x'"):
        decode(text.encode(), None, "m", 0, Regions(), 0)

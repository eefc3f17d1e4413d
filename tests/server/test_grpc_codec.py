"""Messages ↔ requests and responses: what is remembered of earlier messages changes nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.server import grpc_codec
from ingot.server.grpc_codec import Decoder, InferRequest, InferResponse
from ingot.server.request import Request, RequestedOutput, Response, ServerError, Tensor
from ingot.server.shm import Regions

REGIONS = Regions()
KINDS = {"FP32": np.float32, "INT64": np.int64, "UINT8": np.uint8, "BOOL": np.bool_}
SHAPES = st.lists(st.integers(0, 3), max_size=3)


def asked(inputs: Sequence[tuple[str, str, Sequence[int]]], seed: int = 0, **fields: Any) -> Any:
    """A message with raw contents."""
    made, source = InferRequest(**{"model_name": "m", **fields}), np.random.default_rng(seed)
    for name, datatype, shape in inputs:
        made.inputs.add(name=name, datatype=datatype, shape=shape)
        made.raw_input_contents.append(source.integers(0, 2, shape).astype(KINDS[datatype]).tobytes())
    return made


def plain(raw: bytes) -> Any:
    """What the decoder makes of bytes that it has never seen, in a form that can be compared."""
    return described(lambda: grpc_codec.decode(grpc_codec.parsed(InferRequest, raw), REGIONS, 7))


def described(decode: Any) -> Any:
    try:
        found: Request = decode()
    except ServerError as error:
        return str(error)
    tensors = [(x.name, x.datatype, x.data.dtype, x.data.shape, x.data.tobytes()) for x in found.inputs]
    rest = (found.model, found.version, found.id, found.outputs, found.sequence, found.priority, found.timeout_us)
    return tensors, rest, dict(found.parameters), found.arrived


INPUTS = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(sorted(KINDS)), SHAPES), max_size=3)
FIELDS = st.fixed_dictionaries({}, optional={"id": st.sampled_from(["", "x"]), "model_version": st.sampled_from("01")})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(INPUTS, FIELDS), min_size=1, max_size=4), st.data())
def test_what_is_remembered_changes_nothing(kinds: list[Any], data: st.DataObject) -> None:
    decoder = Decoder(REGIONS)
    for seed in range(8):
        inputs, fields = data.draw(st.sampled_from(kinds))
        raw = bytearray(asked(inputs, seed, **fields).SerializeToString())
        if raw and data.draw(st.booleans()):
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        assert described(lambda raw=raw: decoder(raw, 7)) == plain(bytes(raw))


def test_a_message_like_one_before_is_not_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, kinds = Decoder(REGIONS), [("a", "FP32", (2, 3)), ("b", "INT64", (4,))]
    first, second = (asked(kinds, seed, parameters={}).SerializeToString() for seed in (1, 2))
    kept = decoder(first, 1)
    monkeypatch.setattr(grpc_codec, "parsed", None)
    again = decoder(second, 7)
    assert again.kind is decoder(first, 1).kind is not None and kept.kind is None
    monkeypatch.undo()
    assert described(lambda: again) == plain(second)


@pytest.mark.parametrize("late", [{"model_name": "other"}, {"raw_input_contents": [bytes(4)]}, {"id": "x"}])
def test_contents_that_are_not_the_end_are_parsed_each_time(late: dict[str, Any]) -> None:
    decoder = Decoder(REGIONS)
    raw = asked([("a", "FP32", (1,))]).SerializeToString() + InferRequest(**late).SerializeToString()
    for _ in range(2):
        assert described(lambda: decoder(raw, 7)) == plain(raw)


def test_bytes_that_only_look_like_contents_are_not_taken_for_them() -> None:
    """A field nobody knows, last, whose bytes are those of a raw content: the real one is before it."""
    made = asked([("a", "FP32", (1,))], model_name="m").SerializeToString()
    content = made[-6:]
    assert content[:2] == b"\x3a\x04"
    decoder = Decoder(REGIONS)
    for numbers in (content[2:], np.float32(5).tobytes()):
        raw = made + bytes([15 << 3 | 2, 6]) + content[:2] + numbers
        assert described(lambda raw=raw: decoder(raw, 7)) == plain(raw)


def test_no_more_than_so_much_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_codec, "_REMEMBERED", 4)
    decoder = Decoder(REGIONS)
    for size in range(20):
        decoder(asked([("a", "UINT8", (size,))]).SerializeToString(), 0)
        for name in "bcdefghijkl":
            decoder(asked([(name, "UINT8", (1,))]).SerializeToString(), 0)
    assert len(decoder._known) <= 4 and max(map(len, decoder._known.values())) <= grpc_codec._OF_A_SIZE


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*KINDS, "BYTES"]), SHAPES), max_size=3), st.sampled_from(["", "id"]))
def test_an_answer_in_parts_is_the_message(kinds: list[Any], identity: str) -> None:
    texts = np.array(b"text", object)
    arrays = [np.broadcast_to(texts if kind == "BYTES" else np.ones((), KINDS[kind]), shape) for kind, shape in kinds]
    tensors = tuple(Tensor(f"y{at}", kind, arrays[at].T) for at, (kind, _) in enumerate(kinds))
    request, response = Request("m", ()), Response("m", 3, tensors, identity)
    parts = grpc_codec.encode(request, response, REGIONS)
    assert InferResponse.FromString(b"".join(parts)) == grpc_codec.as_message(request, response, REGIONS)


def test_an_answer_with_classes_is_the_message() -> None:
    ports: Any = type("Ports", (), {"output_of": {"y": type("Port", (), {"labels": ("no", "yes")})}, "max_rows": 0})
    request = Request("m", (), outputs=(RequestedOutput("y", True, 1),))
    response = Response("m", 1, (Tensor("y", "FP32", np.array([0.25, 0.5], np.float32)),), ports=ports)
    (raw,) = grpc_codec.encode(request, response, REGIONS)
    assert b"0.500000:1:yes" in InferResponse.FromString(raw).raw_output_contents[0]

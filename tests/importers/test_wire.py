"""Taking weights out of a serialized model changes nothing else."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from ingot.importers.wire import SMALL, Malformed, split


def model(sizes):
    tensors = [numpy_helper.from_array(np.arange(size, dtype=np.float32), f"w{i}") for i, size in enumerate(sizes)]
    return helper.make_model(helper.make_graph([], "g", [], [], tensors))


@given(st.lists(st.integers(0, 3000), max_size=6))
def test_what_is_left_and_what_is_taken_make_up_the_model(sizes):
    proto = model(sizes)
    content = proto.SerializeToString()
    rest, payloads = split(memoryview(content))
    assert sorted(payloads) == [i for i, size in enumerate(sizes) if 4 * size > SMALL]
    again = onnx.ModelProto.FromString(rest)
    for index, payload in payloads.items():
        assert not again.graph.initializer[index].raw_data
        again.graph.initializer[index].raw_data = bytes(payload)
    assert again == proto


@given(st.integers(0, 20_000))
def test_truncation_is_noticed(end):
    content = model([3000, 2000]).SerializeToString()
    end = min(end, len(content) - 1)
    try:
        rest, _ = split(memoryview(content[:end]))
    except Malformed:
        return
    assert len(onnx.ModelProto.FromString(rest).graph.initializer) < 2


@pytest.mark.parametrize("content", [b"\x0b", b"\xff" * 20, b"\x3a\x05ab", b"\x08"])
def test_malformed(content):
    with pytest.raises(Malformed):
        split(memoryview(content))

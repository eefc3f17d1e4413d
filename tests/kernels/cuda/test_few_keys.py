"""Attention whose keys are one block: blocks walk over heads, so that one block has several."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ingot.kernels import candidates
from ingot.kernels.cuda.architecture import architecture
from tests.kernels.cuda.harness import check
from tests.kernels.harness import node_of

Array = np.ndarray[Any, Any]
NAME = "attention_of_few_keys"
PLAIN = {"scale": 0.2, "causal": 0, "softcap": 0.0}


def drawn(*shape: int) -> Array:
    return np.random.default_rng(shape[-2]).standard_normal(shape).astype(np.float16)


@pytest.mark.parametrize(("mask", "settings"), [
    (None, PLAIN), ((1, 1, 1, 24), PLAIN), ((2, 1, 20, 24), PLAIN), (None, {**PLAIN, "causal": 1, "softcap": 3.0}),
])  # fmt: skip
def test_meaning(mask: tuple[int, ...] | None, settings: dict[str, Any]) -> None:
    inputs = [drawn(2, 4, 20, 32), drawn(2, 2, 24, 32), drawn(2, 2, 24, 16)]
    inputs += [] if mask is None else [drawn(*mask)]
    node, expected = node_of("Attention", inputs, settings)
    assert check(node, inputs, expected, rtol=2e-2, atol=1e-2, limit=2, only=NAME)


def test_masks_that_forbid_everything() -> None:
    inputs = [drawn(1, 2, 16, 16), drawn(1, 2, 16, 16), drawn(1, 2, 16, 16), np.arange(16)[None, None, :, None] > 3]
    inputs[3] = np.broadcast_to(inputs[3], (1, 1, 16, 16)).copy()
    node, expected = node_of("Attention", inputs, PLAIN)
    assert not expected[0][:, :, :4].any()
    assert check(node, inputs, expected, rtol=2e-2, atol=1e-2, limit=1, only=NAME)


def test_more_heads_than_blocks() -> None:
    inputs = [drawn(3, 100, 16, 16)] * 3
    node, expected = node_of("Attention", inputs, PLAIN)
    assert check(node, inputs, expected, rtol=2e-2, atol=1e-2, limit=1, only=NAME)


def test_what_is_left_to_others() -> None:
    for queries, keys, depth in ((16, 200, 32), (16, 16, 24), (16, 16, 256)):
        shapes = ((1, 2, queries, depth), (1, 2, keys, depth), (1, 2, keys, depth))
        node, _ = node_of("Attention", [drawn(*shape) for shape in shapes], PLAIN)
        found = {c.kernel.name for c in candidates(node, "cuda", architecture("sm_90"))}
        assert found and NAME not in found


PACKED = {**PLAIN, "heads": 4, "groups": 2}


@pytest.mark.parametrize("name", ["packed_attention_of_few_keys", "packed_flash_attention"])
@pytest.mark.parametrize("mask", [None, (2, 1, 1, 20), (1, 1, 20, 20)])
def test_one_tensor_of_all_three(name: str, mask: tuple[int, ...] | None) -> None:
    inputs = [drawn(2, 20, 8 * 16), *([] if mask is None else [drawn(*mask)])]
    node, expected = node_of("PackedAttention", inputs, PACKED)
    assert check(node, inputs, expected, rtol=2e-2, atol=1e-2, limit=2, only=name)


def test_one_tensor_and_a_mask_that_is_known() -> None:
    inputs = [drawn(2, 20, 8 * 16), drawn(1, 1, 1, 20)]
    text = "Cast %0 -> float32; Quantize $0 0.01 0.0 -> float8_e4m3fn"
    node, expected = node_of("PackedAttention", inputs, PACKED, text, constants=(1,))
    assert expected[0].dtype.name == "float8_e4m3fn" and expected[0].shape == (2, 4, 20, 16)
    assert check(node, inputs, expected, rtol=0.13, atol=2e-2, limit=2)

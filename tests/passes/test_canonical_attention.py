"""Attention of ONNX and com.microsoft, rotary embeddings, and their activations: one Attention, or a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.passes.canonical_harness import Array, check, check_symbolic, rejection, values

MICROSOFT = "com.microsoft"
B, H, S, T, D = 2, 4, 5, 6, 8


def qkv(heads: int = H, queries: int = S, keys: int = T) -> list[Array]:
    return [values((B, H, queries, D)), *(values((B, heads, keys, D), seed=seed) for seed in (1, 2))]


def flat(heads: int = H, keys: int = T) -> list[Array]:
    return [values((B, S, H * D)), *(values((B, keys, heads * D), seed=seed) for seed in (1, 2))]


def attention(inputs: list[Any], **given: Any) -> Any:
    model = check("Attention", inputs, rtol=1e-4, atol=1e-5, **given)
    return [node for node in model.graph if node.op_type == "Attention"]


@pytest.mark.parametrize("heads", [H, 2, 1])
def test_heads_that_share_keys(heads: int) -> None:
    (node,) = attention(qkv(heads))
    assert len(node.inputs) == 3 and node.attributes["scale"].value == pytest.approx(D**-0.5)


def test_three_axes_are_split_into_heads() -> None:
    assert len(attention(flat(2), q_num_heads=H, kv_num_heads=2)) == 1


def test_settings_are_kept() -> None:
    (node,) = attention(qkv(keys=S), scale=0.3, softcap=20.0, is_causal=1)
    kept = {name: node.attributes[name].value for name in ("scale", "softcap", "causal")}
    assert kept == {"scale": pytest.approx(0.3), "softcap": 20.0, "causal": 1}


@pytest.mark.parametrize("dtype", ["float32", "bool"])
@pytest.mark.parametrize("shape", [(S, T), (1, 1, S, T), (B, H, S, T), (B, 1, S, T)])
def test_masks(shape: tuple[int, ...], dtype: str) -> None:
    mask = values(shape, dtype, seed=3)
    if dtype == "bool":
        mask[..., 0] = True
    (node,) = attention([*qkv(), mask])
    assert len(node.inputs) == 4


def test_a_short_mask_forbids_the_keys_it_does_not_reach() -> None:
    attention([*qkv(), values((S, T - 2), seed=3)])


def test_a_cache_comes_before_the_keys() -> None:
    past = [values((B, H, 3, D), seed=seed) for seed in (4, 5)]
    (node,) = attention([*qkv(keys=S), None, *past], outputs=3, is_causal=1)
    assert node.attributes["causal"].value == 1 and node.inputs[1].shape[2] == S + 3


def test_scores_as_an_output_spell_it_out() -> None:
    assert not attention(qkv(), outputs=4)


def test_symbolic_lengths() -> None:
    check_symbolic("Attention", qkv(), {0: ["N", H, "S", D], 1: ["N", H, "T", D], 2: ["N", H, "T", D]})


# com.microsoft


def microsoft(op: str, inputs: list[Any], **given: Any) -> list[str]:
    model = check(op, inputs, domain=MICROSOFT, rtol=1e-4, atol=1e-5, **given)
    return [node.op_type for node in model.graph]


BIAS, PADDING = values((3 * H * D,), seed=6), np.array([[1] * T, [1] * 4 + [0] * 2], np.int32)


@pytest.mark.parametrize(
    "extra",
    [[], [BIAS], [None, PADDING], [None, np.array([T, 3], np.int32)], [BIAS, PADDING, values((1, H, S, T), seed=7)]],
    ids=["plain", "bias", "mask", "lengths", "all"],
)
def test_multi_head_attention(extra: list[Any]) -> None:
    kinds = microsoft("MultiHeadAttention", [*flat(), *extra], num_heads=H)
    assert kinds.count("Attention") == 1 and "Softmax" not in kinds


def test_multi_head_attention_with_a_cache() -> None:
    past = [values((B, H, 3, D), seed=seed) for seed in (4, 5)]
    kinds = microsoft("MultiHeadAttention", [*flat(), None, None, None, *past], num_heads=H, outputs=3)
    assert kinds.count("Attention") == 1


@pytest.mark.parametrize("mask", [None, PADDING[:, :S], np.array([S, 2], np.int32)], ids=["plain", "mask", "lengths"])
@pytest.mark.parametrize("causal", [0, 1])
def test_packed_attention(mask: Array | None, causal: int) -> None:
    inputs = [values((B, S, 16)), values((16, 3 * H * D), seed=1, low=-0.3, high=0.3), BIAS]
    inputs += [] if mask is None else [mask]
    kinds = microsoft("Attention", inputs, num_heads=H, unidirectional=causal, constants=[1, 2])
    assert kinds.count("Attention") == 1 and kinds.count("Linear") == 1


def test_packed_inputs_are_refused_by_name() -> None:
    packed = values((B, S, H, 3, D))
    assert "packed" in rejection("MultiHeadAttention", [packed], domain=MICROSOFT, num_heads=H)


def test_a_mask_of_another_form_is_refused_by_name() -> None:
    mask = np.ones((B, S, T), np.int32)
    said = rejection("MultiHeadAttention", [*flat(), None, mask], domain=MICROSOFT, num_heads=H)
    assert "padding mask" in said and "[B,T] mask" in said


# rotary embeddings and activations

ANGLES = np.outer(np.arange(16), 1 / 3 ** np.arange(D // 2)).astype(np.float32)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("turned", [0, 4])
def test_rotary_embedding(interleaved: int, turned: int) -> None:
    places = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    half = (turned or D) // 2
    given: dict[str, Any] = {"interleaved": interleaved, "rotary_embedding_dim": turned, "rtol": 1e-4, "atol": 1e-5}
    angles = [COS[:, :half], SIN[:, :half], places]
    check("RotaryEmbedding", [values((B, H, S, D)), *angles], **given)
    check("RotaryEmbedding", [values((B, S, H * D)), *angles], num_heads=H, **given)


@pytest.mark.parametrize("places", [np.array([2]), np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])])
def test_rotary_embedding_of_microsoft(places: Array) -> None:
    microsoft("RotaryEmbedding", [values((B, H, S, D)), places, COS, SIN])


def test_scaled_angles_are_refused_by_name() -> None:
    inputs = [values((B, H, S, D)), np.array([2]), COS, SIN]
    assert "scaled" in rejection("RotaryEmbedding", inputs, domain=MICROSOFT, scale=0.5)


@pytest.mark.parametrize(
    ("op", "inputs", "given"),
    [("Gelu", 1, {}), ("FastGelu", 1, {}), ("FastGelu", 2, {}), ("BiasGelu", 2, {}), ("QuickGelu", 1, {"alpha": 1.5})],
)
def test_activations(op: str, inputs: int, given: dict[str, Any]) -> None:
    assert microsoft(op, [values((3, 7)), values((7,), seed=1)][:inputs], **given) == ["Pointwise"]

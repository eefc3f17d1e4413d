"""Attention as torch exports it and as Hugging Face's models write it: one Attention each, no move too many."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ingot import passes
from ingot.ir import shapes
from tests.passes.support import Rewritten, assert_same, check_graph

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")

C, H = 32, 4
D = C // H
LOWEST = float(np.finfo(np.float32).min)
functional = torch.nn.functional
Forward = Callable[..., Any]


class Attending(torch.nn.Module):  # type: ignore[misc]
    """Projections around a way to attend; key and value may have fewer heads."""

    def __init__(self, way: Forward, groups: int = H) -> None:
        super().__init__()
        self.way = way
        self.query, self.key, self.value, self.out = (
            torch.nn.Linear(C, width) for width in (C, groups * D, groups * D, C)
        )
        self.register_buffer("triangle", torch.tril(torch.ones(64, 64, dtype=torch.bool)).view(1, 1, 64, 64))

    def heads(self, x: Any) -> list[Any]:
        batch, length, _ = x.shape
        return [layer(x).view(batch, length, -1, D).transpose(1, 2) for layer in (self.query, self.key, self.value)]

    def forward(self, x: Any, mask: Any) -> Any:
        context = self.way(self, *self.heads(x), mask)
        return self.out(context.transpose(1, 2).reshape(x.shape[0], x.shape[1], C))


def spelled_out(q: Any, k: Any, v: Any, mask: Callable[[Any], Any]) -> Any:
    """transformers' eager attention; its softmax is in float32 whatever the model's type."""
    scores = mask(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(D))
    return torch.matmul(functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def additive(mask: Any) -> Any:
    return ((1 - mask) * LOWEST)[:, None, None, :]


def repeated(x: Any) -> Any:
    """transformers' repeat_kv"""
    batch, groups, length, depth = x.shape
    return x[:, :, None].expand(batch, groups, H // groups, length, depth).reshape(batch, H, length, depth)


def from_buffer(module: Any, scores: Any) -> Any:
    length = scores.shape[-1]
    return torch.where(module.triangle[:, :, :length, :length], scores, LOWEST)


def four_axes(length: int, mask: Any) -> Any:
    """transformers' 4-D mask: causal, and hidden where the padding is."""
    causal = torch.triu(torch.full((length, length), LOWEST), diagonal=1)[None, None].expand(mask.shape[0], 1, -1, -1)
    hidden = (causal + mask[:, None, None, :]) == 0
    return causal.masked_fill(hidden, LOWEST)


def joined_batch(module: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    """BART, OPT, Whisper: products over [B*H,S,D], the mask over [B,H,S,T]"""
    batch, _, length, _ = q.shape
    q, k, v = (x.reshape(batch * H, length, D) for x in (q * D**-0.5, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, H, length, length) + additive(mask)
    shares = functional.softmax(scores.view(batch * H, length, length), dim=-1)
    return torch.bmm(shares, v).view(batch, H, length, D)


def alibi(module: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    """BLOOM: a bias for the distance, added within the product"""
    batch, _, length, _ = q.shape
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, H, 1, 1)
    bias = ((mask.cumsum(-1) - 1)[:, None, None, :] * slopes).reshape(batch * H, 1, length)
    q, k, v = (x.reshape(batch * H, length, D) for x in (q, k, v))
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=D**-0.5).view(batch, H, length, length)
    shares = functional.softmax(scores, dim=-1).view(batch * H, length, length)
    return torch.bmm(shares, v).view(batch, H, length, D)


sdpa = functional.scaled_dot_product_attention
CAUSAL: dict[str, tuple[Forward, int]] = {
    "sdpa, causal, shared heads": (lambda m, q, k, v, mask: sdpa(q, k, v, is_causal=True, enable_gqa=True), 2),
    "GPT-2": (lambda m, q, k, v, mask: spelled_out(q, k, v, lambda s: from_buffer(m, s)), H),
    "triu added": (lambda m, q, k, v, mask: spelled_out(
        q, k, v, lambda s: s + torch.triu(torch.full(s.shape[2:], LOWEST), diagonal=1)), H),
}  # fmt: skip
OTHERS: dict[str, tuple[Forward, int]] = {
    "sdpa, mask of truths": (lambda m, q, k, v, mask: sdpa(q, k, v, attn_mask=mask[:, None, None, :].bool()), H),
    "Llama": (lambda m, q, k, v, mask: spelled_out(
        q, repeated(k), repeated(v), lambda s: s + four_axes(s.shape[-1], mask)), 2),
    "Llama, sdpa": (lambda m, q, k, v, mask: sdpa(
        q, repeated(k), repeated(v), attn_mask=four_axes(q.shape[2], mask)), 2),
    "Gemma": (lambda m, q, k, v, mask: spelled_out(q, k, v, lambda s: torch.tanh(s / 50.0) * 50.0 + additive(mask)), H),
    "BART": (joined_batch, H),
    "BLOOM": (alibi, H),
}  # fmt: skip


def exported(module: Any, *inputs: Any) -> Rewritten:
    """The module with symbolic batch and length, rewritten and compared."""
    from ingot.importers import torch as importer

    names = ["x", "mask"][: len(inputs)]
    before = importer.load(module, inputs, dynamic={name: {0: "N", 1: "S"} for name in names})
    shapes.infer(before)
    after = before.clone()
    result = Rewritten(before, after, passes.run(after, check=check_graph))
    assert_same(result, N=2, S=7)
    return result


def attended(way: Forward, groups: int) -> Rewritten:
    torch.manual_seed(0)
    return exported(Attending(way, groups), torch.randn(2, 5, C), torch.ones(2, 5))


def check_moves(result: Rewritten) -> Any:
    """Heads are transposed once each, in and out; nothing is repeated, and nothing runs on the host."""
    node = result.only("Attention")
    around = [value.producer() for value in node.inputs[:3]] + [use.node for use in node.outputs[0].uses()]
    assert [move.op_type for move in around] == ["Transpose"] * 4
    assert not result.report.remaining and not result.operators["Softmax"] and not result.operators["MatMul"]
    return node


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_attention(name: str) -> None:
    node = check_moves(attended(*CAUSAL[name]))
    assert node.attributes["causal"].value == 1 and len(node.inputs) == 3


@pytest.mark.parametrize("name", OTHERS)
def test_attention(name: str) -> None:
    result = attended(*OTHERS[name])
    node = check_moves(result)
    groups = OTHERS[name][1]
    assert node.attributes["causal"].value == 0 and node.inputs[1].shape[1] == groups


def test_torchs_encoder_layer() -> None:
    """Its attention works on [S,N,C] and one projection; the transpositions around it meet and go."""

    class Own(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.TransformerEncoderLayer(C, H, 64, batch_first=True, activation="gelu")

        def forward(self, x: Any) -> Any:
            return self.layer(x)

    result = exported(Own(), torch.randn(2, 5, C))
    wanted = {"Linear": 4, "Slice": 3, "View": 4, "Transpose": 4, "Attention": 1, "Norm": 2}
    assert result.operators == wanted

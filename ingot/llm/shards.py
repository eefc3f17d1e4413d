"""A decoder as one of several ranks has it: some heads, some columns of the inner product, some tokens' logits.

What a rank computes of the stream is a part of a sum (graph.py adds them up): products of the parts' outputs by the
matching rows of `output` and `down`. Norms, embeddings and routers are whole everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ingot.errors import ConfigError
from ingot.llm.decoder import Decoder, Experts, Layer, Matrix, Quantized

Range = tuple[int, int]


def shard(decoder: Decoder, rank: int, ranks: int) -> Decoder:
    """The part of `rank`; ConfigError where the model cannot be divided so."""
    if ranks == 1:
        return decoder
    _check(decoder, ranks)
    return replace(
        decoder, heads=decoder.heads // ranks, groups=max(decoder.groups // ranks, 1), ranks=ranks,
        layers=[_layer(decoder, layer, rank, ranks) for layer in decoder.layers],
        head=_head(decoder, rank, ranks),
    )  # fmt: skip


def _check(decoder: Decoder, ranks: int) -> None:
    heads, groups = decoder.heads, decoder.groups
    if heads % ranks or (groups % ranks and ranks % groups):
        raise ConfigError(f"{heads} heads that share {groups} keys cannot be divided among {ranks} ranks; use a "
                          f"number of ranks that divides {heads}, and divides {groups} or is its multiple")  # fmt: skip
    for number, layer in enumerate(decoder.layers):
        inner = layer.up.outputs if layer.up is not None else len(_experts_of(layer).ups[0])
        if inner % ranks:
            raise ConfigError(f"layer {number} has {inner} inner columns, which {ranks} ranks cannot share")


def _experts_of(layer: Layer) -> Experts:
    assert layer.experts is not None
    return layer.experts


def _layer(decoder: Decoder, layer: Layer, rank: int, ranks: int) -> Layer:
    heads = _share(decoder.heads * decoder.depth, rank, ranks)
    return replace(
        layer, projection=layer.projection.picked(_projected(decoder, rank, ranks)),
        output=_inputs(layer.output, heads, ranks), **_network(layer, rank, ranks),
    )  # fmt: skip


def _share(count: int, rank: int, ranks: int) -> Range:
    return count // ranks * rank, count // ranks * (rank + 1)


def _projected(decoder: Decoder, rank: int, ranks: int) -> list[Range]:
    """A rank's columns among all queries, keys and values; ranks beyond the keys share them."""
    queries, keys, depth = decoder.heads * decoder.depth, decoder.groups * decoder.depth, decoder.depth
    first = decoder.groups * rank // ranks * depth
    stop = first + max(decoder.groups // ranks, 1) * depth
    return [_share(queries, rank, ranks), *((queries + k * keys + first, queries + k * keys + stop) for k in range(2))]


def _network(layer: Layer, rank: int, ranks: int) -> dict[str, Any]:
    if layer.experts is not None:
        return {"experts": _experts(layer.experts, rank, ranks)}
    assert layer.up is not None and layer.down is not None
    inner = _share(layer.up.outputs, rank, ranks)
    return {
        "up": layer.up.picked([inner]), "down": _inputs(layer.down, inner, ranks),
        "gate": None if layer.gate is None else layer.gate.picked([inner]),
    }  # fmt: skip


def _experts(experts: Experts, rank: int, ranks: int) -> Experts:
    """Of every expert a part."""
    first, stop = _share(len(experts.ups[0]), rank, ranks)
    return replace(
        experts, gates=tuple(weight[first:stop] for weight in experts.gates),
        ups=tuple(weight[first:stop] for weight in experts.ups),
        downs=tuple(weight[:, first:stop] for weight in experts.downs),
    )  # fmt: skip


def _head(decoder: Decoder, rank: int, ranks: int) -> Matrix:
    """A rank's tokens, or all where they cannot be shared evenly."""
    return (
        decoder.head if decoder.vocabulary % ranks else decoder.head.picked([_share(decoder.vocabulary, rank, ranks)])
    )


def _inputs(matrix: Matrix, inputs: Range, ranks: int) -> Matrix:
    """The products of some inputs; of the bias, which all ranks add, a share."""
    first, stop = inputs
    return replace(
        matrix, biases=tuple(np.asarray(bias, np.float32) / np.float32(ranks) for bias in matrix.biases),
        weights=tuple(w[first:stop] if matrix.transposed else w[:, first:stop] for w in matrix.weights),
        quantized=tuple(_rows(found, first, stop) for found in matrix.quantized),
        inputs=None if matrix.inputs is None else [seen[:, first:stop] for seen in matrix.inputs],
    )  # fmt: skip


def _rows(found: Quantized, first: int, stop: int) -> Quantized:
    if found.order is not None:
        raise ConfigError("the checkpoint's integers lie in an order of their own (desc_act), which ranks cannot "
                          "share; take one made with desc_act false, or one rank")  # fmt: skip
    whole = found.group >= found.depth
    if not whole and (first % found.group or (stop - first) % found.group):
        raise ConfigError(f"the checkpoint's integers share scales in groups of {found.group}, ranks would get "
                          f"{stop - first} inputs each; use fewer ranks")  # fmt: skip
    return found.rows(first, stop)

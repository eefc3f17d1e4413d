"""What a family's file says of a model: a stack of decoder layers, described by data. `graph.py` turns it into a graph.

Matrices are as checkpoints have them, [out, in] unless `transposed`; those that read the same input are given together
and become one product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
KINDS = 4  # of layers, by their windows: more share the last one's blocks


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix that the checkpoint keeps in integers; `read` unpacks (integers [in, out], scales [groups, out], zeros
    [groups, out]), a weight being (integer - zero) * scale. order: the inputs as the integers have them, None: as x."""

    outputs: int
    depth: int
    bits: int
    group: int
    read: Callable[[], tuple[Array, Array, Array]]
    order: Array | None = None

    def floats(self) -> Array:
        """The weights [in, out] in the order of x, float32."""
        whole, scale, zero = self.read()
        of_input = np.arange(self.depth) // self.group
        found = (whole.astype(np.float32) - zero.astype(np.float32)[of_input]) * scale[of_input]
        if self.order is None:
            return found
        placed = np.empty_like(found)
        placed[self.order] = found
        return placed

    def columns(self, start: int, stop: int) -> Quantized:
        """The outputs from start to stop."""

        def read() -> tuple[Array, Array, Array]:
            whole, scale, zero = self.read()
            return whole[:, start:stop], scale[:, start:stop], zero[:, start:stop]

        return replace(self, outputs=stop - start, read=read)

    def rows(self, start: int, stop: int) -> Quantized:
        """The inputs from start to stop, which are whole groups of it, where it has no order of its own."""
        depth, group = stop - start, min(self.group, stop - start)
        groups = slice(start // self.group, -(-stop // self.group))

        def read() -> tuple[Array, Array, Array]:
            whole, scale, zero = self.read()
            return whole[start:stop], scale[groups], zero[groups]

        return replace(self, depth=depth, group=group, read=read)


@dataclass(frozen=True, eq=False)
class Matrix:
    """y = x @ weightᵀ + bias, of one or more weights [out, in] side by side; transposed: they are [in, out]. Instead of
    weights there may be quantized ones, of the same bits, groups and order. Where `inputs` is a list, the reference
    appends what it multiplies."""

    weights: tuple[Array, ...]
    biases: tuple[Array, ...] = ()
    transposed: bool = False
    quantized: tuple[Quantized, ...] = ()
    inputs: list[Array] | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Outputs of each of the weights."""
        if self.quantized:
            return tuple(found.outputs for found in self.quantized)
        return tuple(int(weight.shape[1 if self.transposed else 0]) for weight in self.weights)

    @property
    def outputs(self) -> int:
        """Outputs of all."""
        return sum(self.widths)

    @property
    def size(self) -> int:
        """How many weights there are."""
        return sum(w.size for w in self.weights) + sum(found.outputs * found.depth for found in self.quantized)

    def picked(self, ranges: Sequence[tuple[int, int]]) -> Matrix:
        """The outputs in some ranges, in that order."""
        weights, biases, quantized = [], [], []
        for part, (begin, end) in enumerate(pairwise(accumulate(self.widths, initial=0))):
            for first, stop in ((max(a, begin) - begin, min(b, end) - begin) for a, b in ranges):
                if first >= stop:
                    continue
                if self.quantized:
                    quantized.append(self.quantized[part].columns(first, stop))
                else:
                    weight = self.weights[part]
                    weights.append(weight[:, first:stop] if self.transposed else weight[first:stop])
                if self.biases:
                    biases.append(self.biases[part][first:stop])
        return replace(self, weights=tuple(weights), biases=tuple(biases), quantized=tuple(quantized))


@dataclass(frozen=True, eq=False)
class Scale:
    """weight * normalised + bias; `offset` is added to the weight (Gemma's are kept as differences from 1)."""

    weight: Array
    bias: Array | None = None
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Experts:
    """A router [experts, in] that picks `chosen` experts per token, whose gates, ups and downs are given one by one.
    normalised: the weights of the chosen add up to 1."""

    router: Array
    gates: tuple[Array, ...]
    ups: tuple[Array, ...]
    downs: tuple[Array, ...]
    chosen: int
    normalised: bool


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: attention, then a feed-forward network (gate: its gated form) or experts, each behind a norm.

    after_attention, after_network: norms of what is added to the stream. window: positions that attention sees, 0 all.
    rope: which of the decoder's tables.
    """

    before_attention: Scale
    projection: Matrix
    output: Matrix
    before_network: Scale
    up: Matrix | None = None
    gate: Matrix | None = None
    down: Matrix | None = None
    experts: Experts | None = None
    query_scale: Scale | None = None
    key_scale: Scale | None = None
    after_attention: Scale | None = None
    after_network: Scale | None = None
    window: int = 0
    rope: str = "default"


@dataclass(frozen=True, eq=False)
class Decoder:
    """A whole model, or one of `ranks` parts of it (shards.py). `rope`: (cosine, sine) by name; `places`: learned
    positions; `scale`: of attention's scores."""

    hidden: int
    heads: int
    groups: int
    depth: int
    context: int
    embedding: Array
    layers: Sequence[Layer]
    final: Scale
    head: Matrix
    scale: float
    norm: Literal["rms", "layer"] = "rms"
    epsilon: float = 1e-5
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    places: Array | None = None
    rope: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    softcap: float = 0.0
    final_softcap: float = 0.0
    ranks: int = 1

    @property
    def windows(self) -> tuple[int, ...]:
        """The kinds of its layers by how far they see, the farthest first: positions, 0 for all; at most `KINDS`."""
        farthest = sorted({self._sight(layer) for layer in self.layers}, reverse=True)[:KINDS]
        return tuple(0 if sight == math.inf else int(sight) for sight in farthest)

    def kind_of(self, layer: Layer) -> int:
        """The last kind that sees all that this layer does."""
        return max(n for n, window in enumerate(self.windows) if self._sight(layer) <= (window or math.inf))

    def _sight(self, layer: Layer) -> float:
        """How many positions a layer sees; infinity: all that the context has."""
        return layer.window if 0 < layer.window < self.context else math.inf

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return int(self.embedding.shape[0])

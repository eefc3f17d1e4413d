"""What a decoder's products multiply, on a text: rounding to few bits goes by it.

Where no text is given the model writes one. Every token of random lines is drawn anew after what stands before it, all
at once and a few times over: nearer to the model's own text each time, for the price of a pass instead of one a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ingot.llm.decoder import Array, Decoder, Layer, Matrix
from ingot.llm.reference import logits_of, states_of

_LINES, _LENGTH, _PASSES = 8, 256, 4
_MATRICES = ("projection", "output", "gate", "up", "down")


def observed(decoder: Decoder, texts: Sequence[Array]) -> Decoder:
    """The decoder, whose layers' matrices know what they multiply on the texts."""
    watched = replace(decoder, layers=[_watched(layer) for layer in decoder.layers])
    for text in texts:
        states_of(watched, text)
    return watched


def _watched(layer: Layer) -> Layer:
    watched: dict[str, Any] = {name: replace(matrix, inputs=[]) for name, matrix in matrices_of(layer).items()}
    return replace(layer, **watched)


def matrices_of(layer: Layer) -> dict[str, Matrix]:
    """A layer's matrices by name, experts apart."""
    found: dict[str, Matrix | None] = {name: getattr(layer, name) for name in _MATRICES}
    return {name: matrix for name, matrix in found.items() if matrix is not None}


def lines_of(text: Array, context: int) -> list[Array]:
    """As much of a text as a drawn one has, in lines."""
    length = min(_LENGTH, context)
    return [text[start : start + length] for start in range(0, min(len(text), _LINES * _LENGTH), length)]


def drawn(decoder: Decoder, first: int | None) -> list[Array]:
    """Lines that the model writes, after the token `first` where there is one; the same each time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(partial(_line, decoder, first), range(_LINES)))


def _line(decoder: Decoder, first: int | None, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    line = rng.integers(0, decoder.vocabulary, min(_LENGTH, decoder.context))
    line[0] = line[0] if first is None else first
    for _ in range(_PASSES):
        logits = logits_of(decoder, line[:-1])
        line[1:] = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
    return line

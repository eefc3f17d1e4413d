"""A decoder in numpy, one sequence, no cache: what engines are compared with. Weights are read as they are used."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.ir.elementwise import erf
from ingot.llm.decoder import Activation, Array, Decoder, Experts, Layer, Matrix, Scale

_KEPT = numpy_dtype("bfloat16")  # of what matrices remember


def logits_of(decoder: Decoder, tokens: Array) -> Array:
    """Logits [tokens, vocabulary] of one sequence from its beginning, float32."""
    return _capped(_product(states_of(decoder, tokens), decoder.head), decoder.final_softcap)


def states_of(decoder: Decoder, tokens: Array) -> Array:
    """Hidden states [tokens, hidden], behind the last norm."""
    stream = _real(decoder.embedding[tokens]) * np.float32(decoder.embedding_scale)
    if decoder.places is not None:
        stream = stream + _real(decoder.places[: len(tokens)])
    for layer in decoder.layers:
        stream = _layer(decoder, layer, stream)
    return _norm(decoder, stream, decoder.final)


def _layer(decoder: Decoder, layer: Layer, stream: Array) -> Array:
    seen = _product(_attention(decoder, layer, _norm(decoder, stream, layer.before_attention)), layer.output)
    stream = stream + (seen if layer.after_attention is None else _norm(decoder, seen, layer.after_attention))
    made = _network(decoder, layer, _norm(decoder, stream, layer.before_network))
    return stream + (made if layer.after_network is None else _norm(decoder, made, layer.after_network))


def _network(decoder: Decoder, layer: Layer, x: Array) -> Array:
    act = _ACTIVATIONS[decoder.activation]
    if layer.experts is not None:
        return _mixed(layer.experts, act, x)
    assert layer.up is not None and layer.down is not None
    up = _product(x, layer.up)
    return _product(act(up) if layer.gate is None else act(_product(x, layer.gate)) * up, layer.down)


def _mixed(experts: Experts, act: Callable[[Array], Array], x: Array) -> Array:
    scores, result = x @ _real(experts.router).T, np.zeros_like(x)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    for row, share in enumerate(shares):
        chosen = np.argsort(-scores[row], kind="stable")[: experts.chosen]
        total = share[chosen].sum() if experts.normalised else share.sum()
        for e in chosen:
            inner = act(x[row] @ _real(experts.gates[e]).T) * (x[row] @ _real(experts.ups[e]).T)
            result[row] += share[e] / total * (inner @ _real(experts.downs[e]).T)
    return result


def _attention(decoder: Decoder, layer: Layer, x: Array) -> Array:
    count, heads, groups = len(x), decoder.heads, decoder.groups
    projected = _product(x, layer.projection).reshape(count, heads + 2 * groups, decoder.depth)
    query, key, value = np.split(projected, [heads, heads + groups], axis=1)
    query, key = (
        part if scale is None else _rms(part, scale, decoder.epsilon)
        for part, scale in ((query, layer.query_scale), (key, layer.key_scale))
    )
    if decoder.rope:
        query, key = (_turned(part, *decoder.rope[layer.rope]) for part in (query, key))
    query, key, value = (part.transpose(1, 0, 2) for part in (query, key, value))
    key, value = (part.repeat(heads // groups, axis=0) for part in (key, value))
    scores = _capped(query @ key.transpose(0, 2, 1) * np.float32(decoder.scale), decoder.softcap)
    places = np.arange(count)
    visible = places[None] <= places[:, None]
    if layer.window:
        visible &= places[None] > places[:, None] - layer.window
    scores = np.where(visible, scores, -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray((powers / powers.sum(-1, keepdims=True) @ value).transpose(1, 0, 2).reshape(count, -1))


def _turned(x_THD: Array, cosine: Array, sine: Array) -> Array:
    cosine, sine = cosine[: len(x_THD), None], sine[: len(x_THD), None]
    half = cosine.shape[-1]
    a, b, rest = x_THD[..., :half], x_THD[..., half : 2 * half], x_THD[..., 2 * half :]
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine, rest], axis=-1)


def _product(x: Array, matrix: Matrix) -> Array:
    if matrix.inputs is not None:
        matrix.inputs.append(x.astype(_KEPT))
    parts = [x @ (_real(weight) if matrix.transposed else _real(weight).T) for weight in matrix.weights]
    parts += [x @ quantized.floats() for quantized in matrix.quantized]
    whole = np.concatenate(parts, axis=-1)
    return whole + np.concatenate([_real(bias) for bias in matrix.biases]) if matrix.biases else whole


def _norm(decoder: Decoder, x: Array, scale: Scale) -> Array:
    return _rms(x if decoder.norm == "rms" else x - x.mean(-1, keepdims=True), scale, decoder.epsilon)


def _rms(x: Array, scale: Scale, epsilon: float) -> Array:
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(epsilon))
    y = y * (_real(scale.weight) + np.float32(scale.offset))
    return np.asarray(y if scale.bias is None else y + _real(scale.bias))


def _capped(x: Array, limit: float) -> Array:
    return np.asarray(limit * np.tanh(x / np.float32(limit)), np.float32) if limit else x


def _real(array: Array) -> Array:
    return np.asarray(array, np.float32)


def _erf_gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + erf(x * np.float32(0.5**0.5))), np.float32)


def _tanh_gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x**3))))


_ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": _erf_gelu,
    "gelu_tanh": _tanh_gelu,
    "relu": lambda x: np.maximum(x, 0),
}

"""RNN, GRU and LSTM in one operator, with ONNX's weight layout and gate order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.errors import GraphError
from ingot.ir.elementwise import Array, compute, wide
from ingot.ir.ops_table import Attribute, TensorType, narrowed, op

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
ACTIVATIONS = {"rnn": ("Tanh",), "gru": ("Sigmoid", "Tanh"), "lstm": ("Sigmoid", "Tanh", "Tanh")}
Activation = Callable[[Array], Array]


@dataclass(frozen=True)
class Cell:
    """The weights of one direction and what a step does with them."""

    weight_GI: Array
    recurrence_GH: Array
    bias_W: Array
    bias_R: Array
    peephole: Array
    activations: tuple[Activation, ...]
    clip: float
    linear_before_reset: bool
    input_forget: bool

    def limited(self, x: Array) -> Array:
        """x within the clip."""
        return x if np.isinf(self.clip) else np.clip(x, -self.clip, self.clip)


def _step_rnn(cell: Cell, x: Array, hidden: Array, state: Array) -> tuple[Array, Array]:
    total = x + hidden @ cell.recurrence_GH.T + cell.bias_R
    return cell.activations[0](cell.limited(total)), state


def _step_gru(cell: Cell, x: Array, hidden: Array, state: Array) -> tuple[Array, Array]:
    update_gate, reset_gate = cell.activations[0], cell.activations[0]
    size = hidden.shape[1]
    gates = x[:, : 2 * size] + hidden @ cell.recurrence_GH[: 2 * size].T + cell.bias_R[: 2 * size]
    update, reset = update_gate(cell.limited(gates[:, :size])), reset_gate(cell.limited(gates[:, size:]))
    recurrence, bias = cell.recurrence_GH[2 * size :].T, cell.bias_R[2 * size :]
    if cell.linear_before_reset:
        candidate = x[:, 2 * size :] + reset * (hidden @ recurrence + bias)
    else:
        candidate = x[:, 2 * size :] + (reset * hidden) @ recurrence + bias
    return (1 - update) * cell.activations[1](cell.limited(candidate)) + update * hidden, state


def _step_lstm(cell: Cell, x: Array, hidden: Array, state: Array) -> tuple[Array, Array]:
    gate, candidate, emit = cell.activations
    into, out, forget, new = np.split(x + hidden @ cell.recurrence_GH.T + cell.bias_R, 4, axis=1)
    peep_in, peep_out, peep_forget = np.split(cell.peephole, 3)
    into = gate(cell.limited(into + peep_in * state))
    forget = 1 - into if cell.input_forget else gate(cell.limited(forget + peep_forget * state))
    state = forget * state + into * candidate(cell.limited(new))
    return gate(cell.limited(out + peep_out * state)) * emit(state), state


_STEPS = {"rnn": _step_rnn, "gru": _step_gru, "lstm": _step_lstm}


def activation(name: str, alpha: float, beta: float) -> Activation:
    """One of ONNX's recurrent activations."""
    simple: dict[str, Activation] = {
        "Affine": lambda x: alpha * x + beta,
        "ScaledTanh": lambda x: alpha * np.tanh(beta * x),
        "ThresholdedRelu": lambda x: np.where(x > alpha, x, 0),
        "Softsign": lambda x: x / (1 + np.abs(x)),
    }
    if name in simple:
        return simple[name]
    settings = {"LeakyRelu": {"alpha": alpha}, "Elu": {"alpha": alpha}, "HardSigmoid": {"alpha": alpha, "beta": beta}}
    if name not in ("Relu", "Tanh", "Sigmoid", "Softplus", *settings):
        raise GraphError(f"RNN has no activation {name!r}")
    return lambda x: compute(name, [x], x.dtype.name, settings.get(name, {}))


def _rnn_type(x: TensorType, weight: TensorType, *_: Any, kind: str, direction: str, hidden: int,
              **__: Any) -> tuple[TensorType, ...]:  # fmt: skip
    steps, batch, _width = x.shape
    directions = 2 if direction == "bidirectional" else 1
    last = TensorType(x.dtype, (directions, batch, hidden))
    return (TensorType(x.dtype, (steps, directions, batch, hidden)), last, last)[: 3 if kind == "lstm" else 2]


@op("RNN", "x weight recurrence bias? lengths? initial_h? initial_c? peephole?", _rnn_type, kind=Attribute("text"),
    direction=Attribute("text", "forward"), hidden=Attribute("int"), activations=Attribute("texts"),
    alphas=Attribute("floats"), betas=Attribute("floats"), clip=Attribute("float", np.inf),
    linear_before_reset=Attribute("int", 0), input_forget=Attribute("int", 0))  # fmt: skip
def rnn(x: Array, weight: Array, recurrence: Array, bias: Array | None, lengths: Array | None, initial_h: Array | None,
        initial_c: Array | None, peephole: Array | None, *, kind: str, direction: str, hidden: int,
        activations: Sequence[str], alphas: Sequence[float], betas: Sequence[float], clip: float,
        linear_before_reset: int, input_forget: int) -> tuple[Array, ...]:  # fmt: skip
    """kind "rnn", "gru" or "lstm" over x[T,B,I] -> y[T,dirs,B,H], last h[dirs,B,H] and, for lstm, last c

    weight[dirs,gates*H,I], recurrence[dirs,gates*H,H], bias[dirs,2*gates*H], peephole[dirs,3*H], lengths[B];
    `activations` (with alphas and betas) are 1, 2 or 3 a direction; beyond a sequence's length y is 0.
    """
    directions = weight.shape[0]
    zeros = np.zeros((directions, x.shape[1], hidden), wide(x).dtype)
    hiddens, states = (zeros if v is None else wide(v) for v in (initial_h, initial_c))
    functions = [activation(*entry) for entry in zip(activations, alphas, betas, strict=True)]
    per = len(functions) // directions
    results = []
    for index in range(directions):
        cell = Cell(wide(weight[index]), wide(recurrence[index]), *_biases(bias, index, GATES[kind] * hidden, wide(x)),
                    np.zeros(3 * hidden, wide(x).dtype) if peephole is None else wide(peephole[index]),
                    tuple(functions[index * per : (index + 1) * per]), clip, bool(linear_before_reset),
                    bool(input_forget))  # fmt: skip
        backward = direction == "reverse" or index == 1
        results.append(_run(kind, cell, wide(x), lengths, hiddens[index], states[index], backward))
    ys, last_hs, last_cs = zip(*results, strict=True)
    y, last_h, last_c = np.stack(ys, 1), np.stack(last_hs), np.stack(last_cs)
    return tuple(narrowed(v, x.dtype.name) for v in (y, last_h, last_c)[: 3 if kind == "lstm" else 2])


def _biases(bias: Array | None, index: int, size: int, like: Array) -> tuple[Array, Array]:
    row = np.zeros(2 * size, like.dtype) if bias is None else wide(bias[index])
    return row[:size], row[size:]


def _run(kind: str, cell: Cell, x: Array, lengths: Array | None, hidden: Array, state: Array,
         backward: bool) -> tuple[Array, Array, Array]:  # fmt: skip
    """All steps of one direction; `backward` starts at every sequence's own end."""
    count = x.shape[0]
    projected = x @ cell.weight_GI.T + cell.bias_W
    y = np.zeros((count, *hidden.shape), hidden.dtype)
    for time in reversed(range(count)) if backward else range(count):
        new_hidden, new_state = _STEPS[kind](cell, projected[time], hidden, state)
        alive = np.ones((x.shape[1], 1), bool) if lengths is None else (time < lengths)[:, None]
        hidden, state = np.where(alive, new_hidden, hidden), np.where(alive, new_state, state)
        y[time] = np.where(alive, new_hidden, 0)
    return y, hidden, state

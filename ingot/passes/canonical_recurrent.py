"""LSTM, GRU and RNN become one operator with everything spelled out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ingot.ir.graph import constant_of, shape
from ingot.ir.ops_rnn import ACTIVATIONS
from ingot.passes.canonical_table import Builder, Result, canonical, reject

_SUPPORTED = {
    name.lower(): name
    for name in ("Tanh", "Sigmoid", "Relu", "Affine", "LeakyRelu", "ThresholdedRelu", "ScaledTanh", "HardSigmoid",
                 "Elu", "Softsign", "Softplus")
}  # fmt: skip
_ALPHAS = {"LeakyRelu": 0.01, "ThresholdedRelu": 1.0, "ScaledTanh": 1.0, "HardSigmoid": 0.2, "Elu": 1.0, "Affine": 1.0}
_BETAS = {"ScaledTanh": 1.0, "HardSigmoid": 0.5, "Affine": 0.0}


@canonical("LSTM", "GRU", "RNN")
def recurrent(op: Builder) -> Result:
    """RNN of its kind, transposed around where the layout is batch first"""
    kind = op.node.op_type.lower()
    directions, _, hidden = shape(op.x(2))
    if not isinstance(directions, int) or not isinstance(hidden, int):
        return reject("the shape of its weights is symbolic", "give the weights a static shape")
    functions = [_SUPPORTED.get(name.lower()) for name in op.attribute("activations") or ACTIVATIONS[kind] * directions]
    if any(name is None for name in functions):
        return reject(f"its activations {op.attribute('activations')} are not all known", "use ONNX's activations")
    names = [name for name in functions if name is not None]
    batch_first = bool(op.attribute("layout", 0))
    results = op.make(
        "RNN", *_inputs(op, kind, batch_first), kind=kind, hidden=hidden,
        direction=op.attribute("direction", "forward"),
        activations=names, alphas=_values(names, op.attribute("activation_alpha"), _ALPHAS),
        betas=_values(names, op.attribute("activation_beta"), _BETAS), clip=op.attribute("clip") or np.inf,
        linear_before_reset=op.attribute("linear_before_reset", 0), input_forget=op.attribute("input_forget", 0),
        _outputs=3 if kind == "lstm" else 2,
    )  # fmt: skip
    if not batch_first:
        return tuple(results)
    return (op.transpose(results[0], [2, 0, 1, 3]), *(op.transpose(state, [1, 0, 2]) for state in results[1:]))


def _inputs(op: Builder, kind: str, batch_first: bool) -> list[ir.Value | None]:
    x = op.transpose(op.x(), [1, 0, 2]) if batch_first else op.x()
    states = [op.optional(5), op.optional(6) if kind == "lstm" else None]
    if batch_first:
        states = [None if state is None else op.transpose(state, [1, 0, 2]) for state in states]
    peephole = op.optional(7) if kind == "lstm" else None
    inputs = [x, op.x(1), op.x(2), op.optional(3), _lengths(op, x), *states, peephole]
    while inputs[-1] is None:
        inputs.pop()
    return inputs


def _lengths(op: Builder, x: ir.Value) -> ir.Value | None:
    """The sequences' lengths, unless all are whole."""
    array = constant_of(op.optional(4))
    whole = array is not None and isinstance(shape(x)[0], int) and bool((array == shape(x)[0]).all())
    return None if whole else op.optional(4)


def _values(names: Sequence[str], given: Sequence[float] | None, defaults: dict[str, float]) -> list[float]:
    """A number for every activation: those that take one consume the given ones in order."""
    rest = list(given or [])
    return [(rest.pop(0) if rest else defaults[name]) if name in defaults else 0.0 for name in names]

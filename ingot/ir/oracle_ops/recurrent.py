"""RNN, GRU and LSTM with all that ONNX allows: lengths, initial states, peepholes, clips, activations, layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ingot.ir.oracle_ops.table import meaning

_DEFAULTS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
_ALPHAS = {"Affine": 1.0, "LeakyRelu": 0.01, "ThresholdedRelu": 1.0, "ScaledTanh": 1.0, "HardSigmoid": 0.2, "Elu": 1.0}
_BETAS = {"Affine": 0.0, "ScaledTanh": 1.0, "HardSigmoid": 0.5}


def _settings(names: Sequence[str], given: Sequence[float] | None, defaults: dict[str, float]) -> list[float]:
    """One value an activation; the attribute lists values only for those that take one."""
    values = iter(given or ())
    return [next(values, defaults[name]) if name in defaults else 0.0 for name in names]


def _recurrent(op_type: str) -> Callable[..., tuple[np.ndarray, ...]]:
    def run(x: np.ndarray, weight: np.ndarray, recurrence: np.ndarray, bias: np.ndarray | None = None,
            lengths: np.ndarray | None = None, initial_h: np.ndarray | None = None,
            initial_c: np.ndarray | None = None, peephole: np.ndarray | None = None, *,
            activations: list[str] | None = None, activation_alpha: list[float] | None = None,
            activation_beta: list[float] | None = None, clip: float = np.inf, direction: str = "forward",
            hidden_size: int | None = None, layout: int = 0, **others: Any) -> tuple[np.ndarray, ...]:  # fmt: skip
        from ingot.ir import ops

        names = activations or list(_DEFAULTS[op_type]) * weight.shape[0]
        if layout:
            x = x.swapaxes(0, 1)
            initial_h, initial_c = (None if v is None else v.swapaxes(0, 1) for v in (initial_h, initial_c))
        results = ops.meaning("RNN")(
            x, weight, recurrence, bias, lengths, initial_h, initial_c, peephole,
            kind=op_type.lower(), direction=direction, hidden=recurrence.shape[-1], activations=names,
            alphas=_settings(names, activation_alpha, _ALPHAS), betas=_settings(names, activation_beta, _BETAS),
            clip=clip, **{name: value for name, value in others.items() if name != "output_sequence"},
        )  # fmt: skip
        if not layout:
            return tuple(results)
        return (results[0].transpose(2, 0, 1, 3), *(last.swapaxes(0, 1) for last in results[1:]))

    return run


for _op_type in _DEFAULTS:
    meaning(_op_type)(_recurrent(_op_type))

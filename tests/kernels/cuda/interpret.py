"""Launches of generated kernels carried out by Triton's interpreter on host memory: meaning without a GPU."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

assert "triton" not in __import__("sys").modules, "Triton decides at its import whether it interprets"
os.environ["TRITON_INTERPRET"] = "1"
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

triton.knobs.runtime.interpret = True
del os.environ["TRITON_INTERPRET"]  # which the knob sets too: children compile

from ingot.kernels.cuda.build import Unit  # noqa: E402
from ingot.kernels.cuda.compile import load  # noqa: E402

_patch_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """Triton's, but numpy 2.4 makes no number of an array with an axis."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))


interpreter._patch_lang_tensor = _patch_lang_tensor

_dot = interpreter.InterpreterBuilder.create_dot


def _create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """Triton's, which takes the bits of bfloat16 for integers."""
    return _dot(self, _widened(a), _widened(b), *rest)


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


interpreter.InterpreterBuilder.create_dot = _create_dot
_convert = interpreter._convert_float


def _convert_float(x: Any, given: Any, wanted: Any, rounding: Any) -> Any:
    """Triton's, which cuts off what does not fit into eight bits: a GPU rounds, and ends at the largest number."""
    if wanted != tl.float8e4nv or given != tl.float32:
        return _convert(x, given, wanted, rounding)
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


interpreter._convert_float = _convert_float

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "rint": np.rint, "sqrt": np.sqrt, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan,
    "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh,
    "log1p": np.log1p, "expm1": np.expm1, "pow": np.power, "fmod": np.fmod,
}  # fmt: skip


class _Libdevice:
    """Functions of CUDA's mathematics library by numpy's."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*operands: Any) -> Any:
            blocks = [o for o in operands if isinstance(o, tl.tensor)]
            with np.errstate(all="ignore"):
                data = _FUNCTIONS[name](*(o.handle.data if isinstance(o, tl.tensor) else o for o in operands))
            kept = np.asarray(data).astype(blocks[0].handle.data.dtype)
            shaped = max(blocks, key=lambda b: b.handle.data.size)
            return tl.tensor(interpreter.TensorHandle(kept, blocks[0].dtype.scalar), shaped.type)

        return call


def run(unit: Unit, grid: Sequence[int], values: Sequence[int]) -> None:
    """One launch: `values` are addresses of host memory and numbers, as the signature has them."""
    function = load(unit)
    function.fn.__globals__["libdevice"] = _Libdevice()
    written = function.rewrite()
    scope = interpreter._patch_lang(written)
    try:
        arguments = [_argument(value, kind) for value, (_, kind) in zip(values, unit.signature, strict=True)]
        whole = (*grid, 1, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*whole)
        with np.errstate(all="ignore"):
            for place in itertools.product(*map(range, whole)):
                interpreter.interpreter_builder.set_grid_idx(*place)
                written(*arguments)
    finally:
        scope.restore()


def _argument(value: int, kind: str) -> Any:
    type_ = tl.str_to_ty(kind, None)
    data = np.array([value], np.uint64 if kind[0] == "*" else np.int32)
    return tl.tensor(interpreter.TensorHandle(data, type_), type_)

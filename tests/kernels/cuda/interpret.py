"""Launches of generated kernels carried out by Triton's interpreter on host memory: meaning without a GPU."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any, cast

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

# Overflows would be counted with each sum and product of integers, and be told only where debugging is on.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))  # for good: nothing compiles here
tl.tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])  # numpy 2.4 makes no number of an axis


def _call(self: Any, *operands: Any, **named: Any) -> Any:
    """Triton's, which patches the whole language again at each call of a function."""
    return self.rewrite()(*operands, **named)


interpreter.InterpretedFunction.__call__ = _call


def _kind(type_: Any) -> np.dtype[Any]:
    """Triton's, which writes down its table again at each question."""
    scalar = type_.scalar
    if scalar.is_ptr():
        return np.dtype(np.uint64)
    if scalar.name not in _KINDS:
        _KINDS[scalar.name] = _np_dtype(scalar)
    return _KINDS[scalar.name]


_KINDS: dict[str, np.dtype[Any]] = {}
_np_dtype = interpreter._get_np_dtype
interpreter._get_np_dtype = _kind


def _tuple(self: Any, values: Any, type: Any = None) -> None:
    """Triton's, which makes a type for each tuple, and a tuple for each shape: here when it is asked for."""
    self.values = list(values)
    if type is not None:
        self.type = type if isinstance(type, tl.core.tuple_type) else tl.core.tuple_type(type)


tl.core.tuple.__init__ = _tuple
tl.core.tuple.type = cached_property(lambda self: tl.core._type_for_tuple_values(self.values))
tl.core.tuple.type.__set_name__(tl.core.tuple, "type")


class _Shape:
    """What Triton works out again for each block of a shape, which it checks."""

    def __init__(self, extents: tuple[int, ...]) -> None:
        self.extents = tl.core.tuple(extents)
        self.numel = tl.core.validate_block_shape(extents)
        self.name = str(self.extents)
        self.constants = tl.core.tuple([tl.constexpr(extent) for extent in extents])
        self.constant_numel = tl.constexpr(self.numel)


_shape = cache(_Shape)


def _block(self: Any, element_ty: Any, shape: Any) -> None:
    self.known = known = _shape(tuple(getattr(extent, "value", extent) for extent in shape))
    assert known.extents.values, "Triton has no block without an axis"
    self.element_ty, self.shape, self.numel = element_ty, known.extents, known.numel
    self.name = f"<{known.name}, {element_ty}>"


def _tensor(self: Any, handle: Any, type: Any) -> None:
    known = type.known if type.is_block() else _shape(())
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = known.constants, known.constant_numel


tl.core.block_type.__init__ = _block
tl.tensor.__init__ = _tensor

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


def _number_of(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's, but of NaN and a number a GPU takes the number, unless NaN is to be propagated."""
    return lambda builder, left, right: builder.binary_op(left, right, choose)


interpreter.InterpreterBuilder.create_maxnumf = _number_of(np.fmax)
interpreter.InterpreterBuilder.create_minnumf = _number_of(np.fmin)

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


@cache
def _written(unit: Unit) -> Callable[..., Any]:
    function = load(unit)
    function.fn.__globals__["libdevice"] = _Libdevice()
    return cast(Callable[..., Any], function.rewrite())


def run(unit: Unit, grid: Sequence[int], values: Sequence[int]) -> None:
    """One launch: `values` are addresses of host memory and numbers, as the signature has them."""
    arguments = [_argument(value, kind) for value, (_, kind) in zip(values, unit.signature, strict=True)]
    whole = (*grid, 1, 1, 1)[:3]
    interpreter.interpreter_builder.set_grid_dim(*whole)
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        for place in itertools.product(*map(range, whole)):
            interpreter.interpreter_builder.set_grid_idx(*place)
            _written(unit)(*arguments)


def _argument(value: int, kind: str) -> Any:
    type_ = tl.str_to_ty(kind, None)
    data = np.array([value], np.uint64 if kind[0] == "*" else np.int32)
    return tl.tensor(interpreter.TensorHandle(data, type_), type_)

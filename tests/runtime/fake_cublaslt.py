"""cuBLASLt without a GPU: its products computed by numpy in the fake driver's memory.

`FakeLt` has the functions of nvmath.bindings.cublasLt that Ingot calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import ml_dtypes
import numpy as np

from tests.runtime.fake_cuda import FakeDriver

Array = np.ndarray[Any, Any]
_TYPES = {0: np.float32, 2: np.float16, 14: ml_dtypes.bfloat16, 28: ml_dtypes.float8_e4m3fn}
_RESULT = np.dtype([("algo", [("data_", "<u8", (8,))]), ("workspace_size", "<u8"), ("state", "<i4"),
                    ("waves_count", "<f4"), ("reserved", "<i4", (4,))])  # fmt: skip
_ATTRIBUTES = {"TRANSA": 3, "EPILOGUE": 7, "BIAS_POINTER": 8, "D_SCALE_POINTER": 20,
               "FAST_ACCUM": 23, "BIAS_DATA_TYPE": 26}  # fmt: skip


class Refused(Exception):
    """What the bindings raise."""


class Results:
    """An array of results in memory that the library writes."""

    def __init__(self, size: int) -> None:
        self.held = np.zeros(size, _RESULT)
        self.ptr = self.held.ctypes.data


def at(address: int, dtype: Any, *shape: int) -> Array:
    """Device memory as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


@dataclass
class FakeLt:
    """The library. `version` is its own, `refuses` makes it have no algorithm, `frugal` do without the workspace
    that it says it wants; `matmuls` counts its products."""

    driver: FakeDriver
    version: int = 130100
    refuses: bool = False
    frugal: bool = False
    matmuls: int = 0
    made: list[Any] = field(default_factory=list)
    cuBLASLtError = Refused
    MatmulHeuristicResult = Results
    matmul_heuristic_result_dtype = _RESULT
    MatmulDescAttribute = IntEnum("MatmulDescAttribute", _ATTRIBUTES)
    MatmulPreferenceAttribute = IntEnum(
        "MatmulPreferenceAttribute", ["MAX_WORKSPACE_BYTES", *(f"MIN_ALIGNMENT_{side}_BYTES" for side in "ABCD")]
    )

    def _new(self, thing: Any) -> int:
        self.made.append(thing)
        return len(self.made) - 1

    def create(self) -> int:
        return self._new("handle")

    def get_version(self) -> int:
        return self.version

    def matmul_desc_create(self, compute: int, scale: int) -> int:
        return self._new({})

    def matmul_desc_set_attribute(self, description: int, attribute: int, source: int, size: int) -> None:
        self.made[description][attribute] = int.from_bytes(ctypes.string_at(source, size), "little")

    def matrix_layout_create(self, kind: int, rows: int, columns: int, leading: int) -> int:
        return self._new((_TYPES[kind], rows, columns))

    def matmul_preference_create(self) -> int:
        return self._new({})

    def matmul_preference_set_attribute(self, preference: int, attribute: int, source: int, size: int) -> None:
        self.made[preference][attribute] = int.from_bytes(ctypes.string_at(source, size), "little")

    def matmul_preference_destroy(self, preference: int) -> None:
        self.made[preference] = None

    def matmul_desc_destroy(self, description: int) -> None:
        self.made[description] = None

    def matrix_layout_destroy(self, layout: int) -> None:
        self.made[layout] = None

    def matmul_algo_get_heuristic(self, handle: int, description: int, *rest: int) -> None:
        if self.refuses:
            raise Refused("CUBLAS_STATUS_NOT_SUPPORTED")
        *_, preference, most, results, count = rest
        limit = self.made[preference][int(self.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES)]
        found = at(results, _RESULT, most)
        for index in range(min(most, 2)):
            found[index]["algo"]["data_"] = 7 + index
            found[index]["workspace_size"] = 64 * index if not self.frugal else min(64 * index, limit)
            found[index]["state"] = 0
        at(count, np.int32, 1)[0] = min(most, 2)

    def matmul_algo_check(self, handle: int, description: int, a: int, b: int, c: int, d: int, algo: int,
                          result: int) -> None:  # fmt: skip
        known = int(at(algo, np.uint64, 8)[0])
        if self.refuses or known not in (7, 8):
            raise Refused("CUBLAS_STATUS_NOT_SUPPORTED")
        at(result, _RESULT, 1)["workspace_size"] = 64 * (known - 7)

    def matmul(self, *arguments: int) -> None:
        """(handle, description, alpha, a, its layout, b, …): as the library, in order on the stream."""
        _, description, alpha, *_ = arguments
        scale, keep = (float(at(address, np.float32, 1)[0]) for address in (alpha, arguments[7]))
        settings = dict(self.made[description])
        action = self._action(settings, scale, keep, arguments)
        if self.driver.recording is None:
            action()
        else:
            self.driver.recording.append(action)

    def _action(self, settings: dict[int, int], scale: float, keep: float, arguments: Any) -> Callable[[], None]:
        a, a_layout, b, b_layout = arguments[3:7]
        c, c_layout, d, d_layout = arguments[8:12]
        (left, depth, columns), (right, _, rows) = self.made[a_layout], self.made[b_layout]
        kind, other = self.made[d_layout][0], self.made[c_layout][0]
        name = self.MatmulDescAttribute

        def action() -> None:
            self.matmuls += 1
            weight, x = (at(p, t, n, depth).astype(np.float32) for p, t, n in ((a, left, columns), (b, right, rows)))
            sums = scale * x @ weight.T
            if keep:
                sums += keep * at(c, other, rows, columns).astype(np.float32)
            epilogue = settings[name.EPILOGUE]
            if epilogue & 4:
                sums += at(settings[name.BIAS_POINTER], other, columns).astype(np.float32)
            if epilogue & 2:
                sums = np.maximum(sums, 0)
            if epilogue & 32:
                sums = 0.5 * sums * (1 + np.tanh(0.7978845608 * (sums + 0.044715 * sums**3)))
            if name.D_SCALE_POINTER in settings:
                sums *= at(settings[name.D_SCALE_POINTER], np.float32, 1)
            at(d, kind, rows, columns)[...] = sums.astype(kind)

        return action

"""Element-wise operators that onnx.reference computes one element at a time."""

from __future__ import annotations

import numpy as np

from ingot.ir.oracle_ops.table import meaning

# W. J. Cody, "Rational Chebyshev approximations for the error function", Math. Comp. 23 (1969): relative error < 1e-15.
_SMALL_P = (3.20937758913846947e03, 3.77485237685302021e02, 1.13864154151050156e02, 3.16112374387056560e00,
            1.85777706184603153e-1)  # fmt: skip
_SMALL_Q = (2.84423683343917062e03, 1.28261652607737228e03, 2.44024637934444173e02, 2.36012909523441209e01, 1.0)
_MIDDLE_P = (1.23033935479799725e03, 2.05107837782607147e03, 1.71204761263407058e03, 8.81952221241769090e02,
             2.98635138197400131e02, 6.61191906371416295e01, 8.88314979438837594e00, 5.64188496988670089e-1,
             2.15311535474403846e-8)  # fmt: skip
_MIDDLE_Q = (1.23033935480374942e03, 3.43936767414372164e03, 4.36261909014324716e03, 3.29079923573345963e03,
             1.62138957456669019e03, 5.37181101862009858e02, 1.17693950891312499e02, 1.57449261107098347e01,
             1.0)  # fmt: skip


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    result = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result * x + coefficient
    return result


def erf(x: np.ndarray) -> np.ndarray:
    """Error function in double precision; beyond |x| = 6 it is ±1 to the last bit."""
    wide = np.asarray(x, np.float64)
    size = np.minimum(np.abs(wide), 6.0)
    square = size * size
    small = size * _polynomial(_SMALL_P, square) / _polynomial(_SMALL_Q, square)
    middle = 1.0 - np.exp(-square) * _polynomial(_MIDDLE_P, size) / _polynomial(_MIDDLE_Q, size)
    return np.copysign(np.where(size <= 0.46875, small, middle), wide)


@meaning("Erf")
def erf_(x: np.ndarray) -> np.ndarray:
    return erf(x).astype(x.dtype)


@meaning("Scatter", since=9)
def scatter(data: np.ndarray, indices: np.ndarray, updates: np.ndarray, *, axis: int = 0) -> np.ndarray:
    """Before opset 11: ScatterElements without a reduction."""
    result = data.copy()
    np.put_along_axis(result, indices, updates, axis)
    return result

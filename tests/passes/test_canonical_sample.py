"""GridSample in every mode against the oracle, positions far outside included."""

from typing import Any

import numpy as np
import pytest

from tests.passes.canonical_harness import check, check_symbolic, rejection, values


@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_modes(mode: str, padding: str, corners: int) -> None:
    """Positions off the halves, where a rounding of the last bit decides for another neighbour."""
    x, grid = values((2, 3, 4, 5)), values((2, 3, 6, 2), seed=1, low=-2.7, high=2.7)
    settings: dict[str, Any] = {"mode": mode, "padding_mode": padding, "align_corners": corners}
    check("GridSample", [x, grid], atol=2e-5, **settings)
    if mode != "cubic":
        check("GridSample", [x.astype(np.float64), grid.astype(np.float64)], **settings)


@pytest.mark.parametrize(("old", "new"), [("bilinear", "linear"), ("bicubic", "cubic"), ("nearest", "nearest")])
def test_names_before_opset_20(old: str, new: str) -> None:
    x, grid = values((1, 2, 4, 4)), values((1, 3, 3, 2), seed=2, low=-1.2, high=1.2)
    check("GridSample", [x, grid], version=16, atol=2e-5, mode=old)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_volumes_and_single_elements(mode: str) -> None:
    check("GridSample", [values((1, 2, 3, 4, 5)), values((1, 2, 3, 2, 3), seed=3)], mode=mode)
    check("GridSample", [values((1, 2, 1, 3)), values((1, 2, 2, 2), seed=4)], mode=mode, padding_mode="border")


def test_symbolic_batch_and_positions() -> None:
    x, grid = values((2, 3, 4, 5)), values((2, 3, 6, 2), seed=1)
    check_symbolic("GridSample", [x, grid], {0: ["N", 3, 4, 5], 1: ["N", "P", "Q", 2]})


def test_rejections() -> None:
    x, grid = values((1, 2, 4, 4)), values((1, 3, 3, 2), seed=2)
    assert "static image sizes" in rejection("GridSample", [x, grid], dims={0: [1, 2, "H", "W"]})
    assert "use float32" in rejection("GridSample", [x.astype(np.float16), grid.astype(np.float16)])

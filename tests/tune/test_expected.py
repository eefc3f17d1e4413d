"""What a candidate's results are compared with: the operator's meaning, on some items of large results."""

from __future__ import annotations

import numpy as np
import pytest

from ingot.ir.expression import parse
from ingot.kernels.node import Node, Port
from ingot.tune.expected import ALIKE, difference, expected
from tests.kernels.harness import node_of

RNG = np.random.default_rng(3)
CONV = {"strides": (1, 1), "pads": (1,) * 4, "dilations": (1, 1), "group": 1, "x_zero_point": 0, "weight_zero_point": 0}


def drawn(*shape: int) -> np.ndarray:
    return RNG.uniform(0.25, 1, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("op", "shapes", "attributes", "epilogue"),
    [
        ("Conv", [(40, 8, 40, 40), (16, 8, 3, 3), (16, 1, 1), (40, 16, 40, 40)], CONV,
         "Add %0 %1 -> float32; Add $0 %2 -> float32"),
        ("Linear", [(9000, 16), (16, 128), (128,)], {"x_zero_point": 0, "weight_zero_point": 0},
         "Add %0 %1 -> float32"),
        ("Softmax", [(9000, 128)], {"axis": 1, "log": 0}, ""),
        ("Softmax", [(9000, 128)], {"axis": 0, "log": 0}, ""),
        ("Pointwise", [(9000, 128), (128,), (9000, 1)], {},
         "Add %0 %1 -> float32; Mul $0 %2 -> float32"),
        ("Attention", [(70, 4, 64, 32)] * 3 + [(70, 1, 1, 64)], {"scale": 0.1, "causal": 0, "softcap": 0.0}, ""),
        ("Attention", [(64, 4, 64, 64)] * 3 + [(64, 64)], {"scale": 0.1, "causal": 0, "softcap": 0.0}, ""),
        ("NarrowAttention", [(70, 4, 64, 32)] * 3 + [(70, 1, 1, 64)], {"scale": 0.1, "causal": 0, "softcap": 0.0},
         "Quantize %0 0.1 0 -> int8"),
        ("PackedAttention", [(70, 64, 256), (70, 1, 1, 64)],
         {"heads": 4, "groups": 2, "scale": 0.1, "causal": 0, "softcap": 0.0}, ""),
        ("PackedAttention", [(70, 64, 256), (1, 1, 64, 64)],
         {"heads": 4, "groups": 2, "scale": 0.1, "causal": 0, "softcap": 0.0}, "Quantize %0 0.1 0 -> int8"),
        ("NarrowNorm", [(9000, 128), (128,), (128,)],
         {"kind": "layer", "axis": 1, "groups": 1, "epsilon": 1e-5, "narrow": "Quantize %0 0.1 0 -> int8"}, ""),
        ("Transpose", [(300, 8, 300)], {"perm": (2, 1, 0)}, ""),
    ],
)  # fmt: skip
def test_items_give_what_everything_gives(op: str, shapes: list, attributes: dict, epilogue: str) -> None:
    feeds = [drawn(*shape) for shape in shapes]
    node, whole = node_of(op, feeds, attributes, epilogue)
    wanted = expected(node, feeds)
    assert (wanted.items is None) == (op == "Transpose" or attributes.get("axis") == 0)
    assert wanted.gap(whole) < 1e-5
    wrong = whole[0].copy()
    wrong[-1] += np.abs(whole[0]).max()
    assert wanted.gap([wrong]) > ALIKE


@pytest.mark.parametrize("text", ["", "Mul %0 %2 -> float32; Add $0 %1 -> float32"])
def test_projections_by_what_is_made_of_their_columns(text: str) -> None:
    """Found on a GPU: an expression that was taken for an epilogue failed every candidate."""
    feeds: list[np.ndarray | None] = [drawn(3, 16), drawn(16, 64), None, *([drawn(32)] if text else [])]
    node, (whole,) = node_of("Projection", feeds, {"parts": 2, "epsilon": 1e-5}, text, constants=(1,))
    assert whole.shape == (3, 32) and expected(node, feeds).gap([whole]) < 1e-6


def test_layouts_that_change_nothing() -> None:
    x = drawn(2, 3, 4, 5)
    port = Port("float32", x.shape)
    node = Node("Reorder", (port,), (port,), {"layout_from": "plain", "layout_to": "channels_last"}, parse(""))
    assert expected(node, [x]).gap([x]) == 0


def test_masks_of_huge_numbers() -> None:
    """Found on a GPU: the mean of two numbers of -3.4e38 overflows, and no candidate was like the others."""
    lowest = np.full((4, 4), np.finfo(np.float32).min)
    assert difference(lowest, lowest) == 0
    assert difference(np.full((4, 4), -np.inf, np.float32), lowest) == 0
    assert difference(-lowest, lowest) > ALIKE
    half = np.array([-65504, 1], np.float16)
    assert difference(half, np.array([-np.inf, 1], np.float16)) == 0
    assert difference(half, np.array([np.inf, 1], np.float16)) == np.inf
    assert difference(np.array([np.nan]), np.array([1.0])) == np.inf
    assert difference(np.array([np.nan, 2.0]), np.array([np.nan, 2.0])) == 0

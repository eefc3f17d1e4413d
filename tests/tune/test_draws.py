"""Numbers that show what a candidate for a GPU leaves out or confuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ingot.dtypes import numpy_dtype
from ingot.ir.expression import parse
from ingot.kernels.node import Node, Port
from ingot.tune import draws, measure
from ingot.tune.expected import alike, expected
from tests.kernels.harness import node_of

WINDOW = {"strides": (1, 1), "pads": (1,) * 4, "dilations": (1, 1), "group": 1}
SUM = "Cast %0 -> float32; Cast %1 -> float32; Add $0 $1 -> float32; Cast $2 -> float16"
ALONE = "Cast %0 -> float32; Cast $0 -> float16"


def drawn(op: str, shapes: list[tuple[int, ...]], attributes: dict[str, Any], text: str = "") -> Node:
    node, _ = node_of(op, [np.zeros(shape, np.float16) for shape in shapes], attributes, text, constants=(1,))
    emptied = replace(node.input(1), constant=np.empty(0, np.float16))
    return draws.with_weights(replace(node, inputs=(node.input(0), emptied, *node.inputs[2:])))


@pytest.mark.parametrize(("op", "shapes", "attributes"), [
    ("Conv", [(1, 320, 12, 12), (64, 320, 3, 3), (64, 1, 1)], WINDOW),
    ("Conv", [(1, 320, 12, 12), (64, 320, 3, 3), (1, 64, 12, 12)], WINDOW),
    ("Linear", [(64, 3072), (3072, 64), (64,)], {}),
])  # fmt: skip
def test_what_is_added_to_many_products_shows(op: str, shapes: list[tuple[int, ...]], attributes: Any) -> None:
    node = drawn(op, shapes, attributes, SUM)
    feeds = draws.feeds(node)
    (without,) = expected(replace(node, epilogue=parse(ALONE)), feeds).results
    assert expected(node, feeds).gap([without]) > 2 * alike(node)


def test_attention_shows_which_key_belongs_to_which_value() -> None:
    attributes = {"scale": 0.16, "causal": 0, "softcap": 0.0}
    node, _ = node_of("Attention", [np.zeros((1, 4, 256, 40), np.float16)] * 3, attributes)
    query, key, value = draws.feeds(node)
    assert value is not None
    (confused,) = expected(node, [query, key, value[:, :, ::-1]]).results
    assert expected(node, [query, key, value]).gap([confused]) > 2 * alike(node)


@pytest.mark.parametrize(("dtype", "low", "high"), [(np.int8, -8, 7), (np.uint8, 0, 15)])
def test_integers_of_few_bits_stay_within_them(dtype: Any, low: int, high: int) -> None:
    inputs = [np.zeros((1, 64), np.float16), np.zeros((64, 32), dtype), None, np.ones((2, 32), np.float16),
              np.zeros((2, 32), dtype)]  # fmt: skip
    node, _ = node_of("QuantizedProjection", inputs, {"parts": 1, "epsilon": 1e-5, "bits": 4, "group": 32})
    for index in (1, 4):
        found = draws.number(node, index)
        assert found.dtype == dtype and (found.min(), found.max()) == (low, high)


def test_other_operands_stay_positive() -> None:
    node = drawn("Linear", [(64, 3072), (3072, 64), (64,)], {}, SUM)
    bias = draws.feeds(node)[2]
    assert bias is not None and (bias >= 0.2).all()


@pytest.mark.parametrize(("dtype", "scale"), [(ml_dtypes.float8_e4m3fn, 7.6e-7), (np.int8, 1e-5)])
def test_products_of_quantized_numbers_show_beside_the_bias(dtype: Any, scale: float) -> None:
    text = f"Cast %0 -> float32; Mul $0 {scale} -> float32; Add $1 %1 -> float32; Cast $2 -> float16"
    inputs = [np.zeros((64, 768), dtype), np.zeros((768, 64), dtype), np.zeros(64, np.float32)]
    node, _ = node_of("Linear", inputs, {}, text, constants=(1,))
    node = draws.with_weights(replace(node, inputs=(node.input(0), _emptied(node, 1), *node.inputs[2:])))
    feeds = draws.feeds(node)
    lacking = [np.where(np.arange(768) < 384, feeds[0], 0).astype(dtype), *feeds[1:]]
    assert expected(node, feeds).gap(expected(node, lacking).results) > 2 * alike(node)


PLAIN = "Mul %0 %1 -> float32; Cast $0 -> bfloat16"
JOINED = "Mul %0 %1 -> float32; Cast %2 -> float32; Add $0 $1 -> float32; Cast $2 -> bfloat16"


def _chain(wide: int, scale: float, dtype: Any) -> Node:
    """Three products, the last with the first one's result beside it; scales of columns."""
    weight, norm = np.zeros((wide, wide), dtype), np.ones(wide, np.float32)
    scales = np.full(wide, scale, np.float32)
    inputs = [np.zeros((1, wide), ml_dtypes.bfloat16), weight, scales, weight, norm, scales, weight, scales]
    ports = tuple(Port(x.dtype.name, x.shape, x if k else None) for k, x in enumerate(inputs))
    stated = {"parts": (1,) * 3, "norms": (0, 1, 0), "epsilons": (1e-5,) * 3, "expressions": (PLAIN, PLAIN, JOINED),
              "reads": (1, 1, 2), "sources": (-1, -1, -1, 0), "results": (2,), "early": 0}  # fmt: skip
    return Node("ProjectionChain", ports, (Port("bfloat16", (1, wide)),), stated)


@pytest.mark.parametrize(("wide", "scale", "dtype", "large"), [
    (64, 3 / 448 / 64**0.5, ml_dtypes.float8_e4m3fn, 4096), (512, 3 / 448 / 512**0.5, ml_dtypes.float8_e4m3fn, 4096),
    (512, 0.0, ml_dtypes.float8_e4m3fn, 512), (64, 1.0, ml_dtypes.bfloat16, 4096),
])  # fmt: skip
def test_every_product_of_a_chain_shows(wide: int, scale: float, dtype: Any, large: int,
                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """With scales of columns as they are, and with those that were left out with the weights, of many columns."""
    monkeypatch.setattr(measure, "_LARGE", large)
    node = measure.without_weights(_chain(wide, scale, dtype))
    emptied = [k for k, p in enumerate(node.inputs) if p and p.constant is not None and not p.constant.size]
    assert emptied == ([1, 3, 6] if wide < large else [1, 2, 3, 4, 5, 6, 7])
    node = draws.with_weights(node)
    feeds = draws.feeds(node)
    wanted = expected(node, feeds)
    assert 0.1 < float(np.abs(wanted.results[0].astype(np.float64)).max()) < 100
    for place in (1, 3, 6):
        weight = node.input(place).constant
        assert weight is not None and weight.shape == (wide, wide) and (weight < 0).any() and (weight > 0).any()
        halved = np.where(np.arange(wide)[:, None] < wide // 2, weight, 0).astype(dtype)
        less = replace(node.input(place), constant=halved)
        lacking = replace(node, inputs=(*node.inputs[:place], less, *node.inputs[place + 1 :]))
        assert wanted.gap(expected(lacking, feeds).results) > 2 * alike(node)
    alone = dict(node.attributes) | {"expressions": (PLAIN, PLAIN, PLAIN), "reads": (1, 1, 1), "sources": (-1,) * 3}
    assert wanted.gap(expected(replace(node, attributes=alone), feeds).results) > 2 * alike(node)


@pytest.mark.parametrize("left_out", [True, False])
def test_what_is_added_to_a_projection_of_float8_shows(left_out: bool) -> None:
    weight, scale = np.zeros((512, 64), ml_dtypes.float8_e4m3fn), np.full(64, 3 / 448 / 512**0.5, np.float32)
    inputs = [np.zeros((1, 512), ml_dtypes.bfloat16), weight, None, scale, np.zeros((1, 64), ml_dtypes.bfloat16)]
    node, _ = node_of("Projection", inputs, {"parts": 1, "epsilon": 1e-5}, JOINED, constants=(1, 3))
    emptied = [_emptied(node, 1), None, _emptied(node, 3) if left_out else node.input(3)]
    node = draws.with_weights(replace(node, inputs=(node.input(0), *emptied, node.input(4))))
    feeds = draws.feeds(node)
    (without,) = expected(replace(node, epilogue=parse(PLAIN)), feeds).results
    half = [np.where(np.arange(512) < 256, feeds[0], 0).astype(ml_dtypes.bfloat16), *feeds[1:]]
    for wrong in (without, *expected(node, half).results):
        assert expected(node, feeds).gap([wrong]) > 2 * alike(node)


def _emptied(node: Node, index: int) -> Port:
    port = node.input(index)
    return replace(port, constant=np.empty(0, numpy_dtype(port.dtype)))

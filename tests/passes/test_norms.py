"""A Norm takes in the Linear that it reads, where there are few rows, and means what it meant."""

from __future__ import annotations

import pytest

from ingot.passes.norms import normalise_linears
from tests.passes.support import Net, Rewritten, assert_same, check_graph, model_of, rewritten

WIDTH = 6


def made(net: Net, *outputs: str, rows: int | str = 20) -> Rewritten:
    result = rewritten(model_of(net, {"x": ("float32", (2, rows, WIDTH))}, *outputs))
    normalise_linears(result.after)
    check_graph(result.after)
    assert_same(result, rtol=1e-4, atol=1e-5, **({"N": 20} if rows == "N" else {}))
    return result


def product(net: Net, x: str) -> str:
    return net.node("Add", net.node("MatMul", x, net.draw(WIDTH, WIDTH)), net.draw(WIDTH))


def norm(net: Net, x: str, axis: int = -1) -> str:
    shape = (WIDTH,) if axis == -1 else (20, WIDTH)
    return net.node("LayerNormalization", x, net.draw(*shape), net.draw(*shape), axis=axis)


def test_a_residual_and_a_norm() -> None:
    net = Net()
    result = made(net, norm(net, net.node("Add", product(net, "x"), "x")))
    assert result.operators == {"LinearNorm": 1}
    assert len(result.only("LinearNorm").outputs) == 1


def test_one_that_others_read_gives_both() -> None:
    net = Net()
    y = net.node("Add", product(net, "x"), "x")
    z = product(net, norm(net, y))
    result = made(net, net.node("Add", z, y))
    assert result.operators == {"LinearNorm": 1, "Linear": 1}
    assert len(result.only("LinearNorm").outputs) == 2


def test_norms_after_each_other() -> None:
    net = Net()
    result = made(net, norm(net, product(net, norm(net, product(net, "x")))))
    assert result.operators == {"LinearNorm": 2}


@pytest.mark.parametrize("rows", [2, 300, "N"])
def test_few_many_or_unknown_rows_stay(rows: int | str) -> None:
    net = Net()
    assert "LinearNorm" not in made(net, norm(net, product(net, "x")), rows=rows).operators


def test_a_result_and_norms_of_more_axes_stay() -> None:
    net = Net()
    y = product(net, "x")
    assert "LinearNorm" not in made(net, norm(net, y), y).operators
    net = Net()
    assert "LinearNorm" not in made(net, norm(net, product(net, "x"), axis=1)).operators

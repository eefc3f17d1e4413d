"""Gather before the launches ahead of it have ended: what it may read then, and that results are the meaning's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ingot.ir.ops import meaning
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.standalone import generate
from ingot.kernels.node import Node, Port
from ingot.plan.lower import lower
from tests.kernels.cuda.picking import picked
from tests.passes.support import Net, model_of, rewritten


def gather(rows: int | str, columns: int, indices: int | str, axis: int, given: bool) -> Node:
    shape = (rows, columns) if axis == 0 else (3, rows, columns)
    whole = (*shape[:axis], indices, *shape[axis + 1 :])
    ports = Port("float32", shape), Port("int32", (indices,), given=given)
    return Node("Gather", ports, (Port("float32", whole),), {"axis": axis, "early": 1}, name="under_test")


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("axis", "rows", "count"), [(0, 1, 1), (0, 7, 300), (1, 5, 9), (1, 1, 1)])
def test_the_meaning(axis: int, rows: int, count: int, given: bool) -> None:
    """Of sizes that only a run knows; indices count from the end too."""
    from tests.kernels.cuda.harness import check

    rng = np.random.default_rng(count)
    x = rng.standard_normal((rows, 40) if axis == 0 else (3, rows, 40)).astype(np.float32)
    inputs = [x, rng.integers(-rows, rows, count).astype(np.int32)]
    expected = meaning("Gather")(*inputs, axis=axis)
    check(gather("T", 40, "R", axis, given), inputs, expected, 0, 0, symbols={"T": rows, "R": count})


@pytest.mark.parametrize("given", [False, True])
def test_what_comes_before_its_wait(given: bool) -> None:
    """The launch behind may begin at once; indices that a launch computes are read behind the wait."""
    node, target = gather("T", 40, "R", 0, given), architecture("sm_90")
    (candidate,) = picked(node, target, 1, None)
    (call,) = generate(node, candidate, target).launches
    text = call.unit.text
    released, waits, index, value = (
        text.index(word) for word in ("gdc_launch_dependents()", "gdc_wait()", "at = tl.load(", "value = tl.load(")
    )
    assert released < waits < value and (index < waits) == given
    (usual,) = generate(replace(node, attributes={"axis": 0}), candidate, target).launches
    assert usual.unit.text.index("gdc_wait()") < usual.unit.text.index("gdc_launch_dependents()")
    assert call.unit.beside and not usual.unit.beside


def test_inputs_of_the_run_are_given() -> None:
    """Not what is computed from them."""
    net = Net()
    first = net.node("Gather", "x", "ids", axis=0)
    second = net.node("Gather", first, net.node("Add", "ids", "ids"), axis=0)
    model = rewritten(model_of(net, {"x": ("float32", (9, 4)), "ids": ("int32", (5,))}, second)).after
    nodes = [work.node for work in lower(model, architecture("sm_90"), "cuda").works]
    gathers = [node for node in nodes if node is not None and node.op == "Gather"]
    assert [[port is not None and port.given for port in node.inputs] for node in gathers] == [
        [True, True], [False, False]]  # fmt: skip

"""Timing candidates for a GPU, on a driver that interprets kernels: what is brought there and back, and how often."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ingot.kernels import Candidate, candidates
from ingot.kernels.cuda.architecture import architecture, described
from ingot.kernels.cuda.standalone import Given, Standalone, generate
from ingot.kernels.node import Node
from ingot.runtime import cuda
from ingot.tune import cuda_measure, expected
from ingot.tune.measure import describe
from tests.kernels.harness import node_of
from tests.runtime.fake_cuda import FakeDriver, stand_in

TARGET = architecture("sm_90", "fp16")
X, W = (np.random.default_rng(k).standard_normal(s).astype(np.float16) for k, s in enumerate([(6, 128), (128, 128)]))
IMAGES = np.random.default_rng(2).standard_normal((5, 6, 8, 9)).astype(np.float16)
POOL = {"kind": "max", "kernel": (3, 3), "strides": (2, 2), "pads": (1,) * 4, "dilations": (1, 1), "p": 2,
        "indices": 0, "count_include_pad": 0}  # fmt: skip


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()
    monkeypatch.setattr(cuda, "_bindings", lambda: made)
    monkeypatch.setattr(cuda, "_DRIVERS", [])
    monkeypatch.setattr(cuda, "_CONTEXTS", {})
    return made


def linear() -> tuple[Node, list[Candidate]]:
    """With a second input that a run gives, and candidates that the driver need not add parts for."""
    node, _ = node_of("Linear", [X, W], {}, "Cast %0 -> float16", constants=(1,))
    found = [c for c in candidates(node, "cuda", TARGET) if c.tactic.get("split") == 1][:2]
    assert len(found) == 2
    return node, found


def compiled(node: Node, candidate: Candidate) -> list[Any]:
    return [stand_in(call.unit, TARGET.name) for call in generate(node, candidate, TARGET).launches]


def test_some_items_are_what_everything_has_there(fake: FakeDriver) -> None:
    """In both layouts."""
    node, (wanted,) = node_of("Pool", [IMAGES], POOL)
    items, context = np.array([0, 2, 4]), cuda.context_of(cuda.select("cuda"))
    found = {c.ports: c for c in candidates(node, "cuda", TARGET)}.values()
    assert len(found) > 1
    for candidate in found:
        (some,) = Standalone(node, candidate, TARGET, context, compiled(node, candidate))(IMAGES, items=items)
        assert np.array_equal(some, wanted[items]), candidate.ports


def test_candidates_share_what_they_are_given(fake: FakeDriver) -> None:
    node, found = linear()
    given: Given = {}
    context = cuda.context_of(cuda.select("cuda"))
    for number, candidate in enumerate(found):
        alone = Standalone(node, candidate, TARGET, context, compiled(node, candidate), given)
        before = fake.calls["cuMemcpyHtoDAsync"]
        alone(X, None)
        brought = fake.calls["cuMemcpyHtoDAsync"] - before
        assert brought == len(alone.build.constants) + (number == 0) and len(given) == 1
        alone.time([X, None], runs=1)
        assert fake.calls["cuMemcpyHtoDAsync"] - before == brought + len(alone.build.constants)


def test_without_others_every_call_brings_its_own(fake: FakeDriver) -> None:
    node, (first, *_) = linear()
    alone = Standalone(node, first, TARGET, cuda.context_of(cuda.select("cuda")), compiled(node, first))
    (one,), (two,) = alone(X, None), alone(2 * X, None)
    np.testing.assert_allclose(two, 2 * one.astype(np.float32), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("broken", [False, True])
def test_what_is_compared_are_items(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    """A result whose last item is wrong is found among those that are compared."""
    node, found = linear()
    monkeypatch.setattr(expected, "_COMPARED", 256)  # two items of 128
    fetched = Standalone._fetch

    def fetch(self: Standalone, index: int, port: Any, items: Any) -> Any:
        assert items is not None and list(items) == [0, 5]
        y = fetched(self, index, port, items)
        y[-1] += 5.0 * broken
        return y

    monkeypatch.setattr(Standalone, "_fetch", fetch)
    ready = [(describe(c), compiled(node, c)) for c in found]
    times = cuda_measure.time_candidates(node, ready, described(TARGET), 0.1, False)
    assert len(times) == len(found) and all(("wrong by" in str(t)) == broken for t in times)

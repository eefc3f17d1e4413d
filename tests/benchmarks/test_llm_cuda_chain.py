"""What a GPU is asked for by benchmarks of a layer's products: the same weights by one launch and by four, rows handed
on, counters that launches which overlap do not share."""

import json
from collections.abc import Sequence
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import llm_cuda_chain, llm_cuda_rows
from benchmarks.llm_cuda_chain import chain_of, chain_step, rings
from benchmarks.llm_cuda_rows import LAYERS, Product, Step, engine_step, node_of
from ingot.kernels.cuda.compile import Cubin
from ingot.kernels.cuda.projection_chain import SLOTS
from ingot.runtime.cubins import Code

SMALL = (Product(1536, 1024, normalised=True), Product(1024, 1024, joined=True), Product(2048, 1024, 2, True),
         Product(1024, 2048, joined=True))  # fmt: skip


class FakeBench:
    """Addresses without memory, launches that are written down."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self.rows = [self.upload(np.zeros(1)) for _ in range(5)]
        self.weights = [[self.filled(product) for product in SMALL] for _ in range(LAYERS)]
        self.stream, self.launched = None, list[tuple[Code, list[int]]]()
        nothing = lambda *given: None  # noqa: E731
        self.context = SimpleNamespace(upload=nothing, download=nothing, wait=nothing)

    def upload(self, array: np.ndarray) -> int:
        return next(self._numbers) << 8

    def filled(self, product: Product) -> int:
        return next(self._numbers) << 8

    def kernels(self, code: Code) -> Any:
        def launch(name: str, grid: Sequence[int], arguments: tuple[Any, ...], stream: Any) -> None:
            self.launched.append((code, list(arguments[0])))

        return SimpleNamespace(launch=launch)

    def microseconds(self, steps: Sequence[Step]) -> float:
        for step in steps:
            step.put(0, self.stream)
        return float(len(steps))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> FakeBench:
    monkeypatch.setattr(llm_cuda_rows, "compile_unit", lambda unit, target: Cubin(b"", 1024, 512, 80, 0))
    monkeypatch.setattr(llm_cuda_rows, "LARGE", 1 << 19)
    monkeypatch.setattr(llm_cuda_chain, "PRODUCTS", SMALL)
    monkeypatch.setattr(llm_cuda_chain, "Bench", FakeBench)
    return FakeBench()


def test_one_launch_reads_the_weights_that_four_read(bench: FakeBench) -> None:
    known = {weights for layer in bench.weights for weights in layer}
    chain, apart = chain_step(bench, SLOTS), rings(bench)  # type: ignore[arg-type]
    for layer in range(LAYERS):
        of_chain = [a for a in chain.addresses(layer) if a in known]
        assert of_chain == [a for step in apart for a in step.addresses(layer) if a in known]
        assert of_chain == [*bench.weights[layer][1:], bench.weights[(layer + 1) % LAYERS][0]]


def test_rows_are_handed_on_and_come_back() -> None:
    places = [llm_cuda_chain.PLACES[k] for k in llm_cuda_chain.ORDER]
    assert all(source == target for (_, target, _), (source, _, _) in pairwise([*places, places[0]]))
    handles = chain_of(SLOTS).launches[0].handles
    assert {(h.kind, h.index) for h in handles} >= {("input", 0), ("input", 3), ("output", 0), ("output", 1)}


def test_launches_that_overlap_have_counters_of_their_own(bench: FakeBench) -> None:
    product = Product(SMALL[0].columns, 4096, normalised=True)
    own = [bench.filled(product) for _ in range(LAYERS)]
    drawn = engine_step(bench, node_of(product), "ring16x5drawn", own, *bench.rows[:2])  # type: ignore[arg-type]
    weights = set(own) | {address for layer in bench.weights for address in layer}
    for step, counters in ((drawn, 1), (chain_step(bench, SLOTS), 2)):  # type: ignore[arg-type]
        layers = [set(step.addresses(layer)) - weights for layer in range(LAYERS)]
        shared = set.intersection(*layers)
        assert [len(layer - shared) for layer in layers] == [counters] * LAYERS
        assert len(set.union(*layers) - shared) == counters * LAYERS


def test_forms_are_timed_by_turns(bench: FakeBench, tmp_path: Path) -> None:
    llm_cuda_chain.main(["--slots", "4", "5", "--out", str(tmp_path / "it.json")])
    rows = json.loads((tmp_path / "it.json").read_text())
    assert [row["form"] for row in rows] == ["rings", "chain of 4 slots", "chain of 5 slots", "rings"]
    assert [row["layer us"] for row in rows] == [4.0, 1.0, 1.0, 4.0]
    assert [row["layer with 4 us of 38 KB us"] for row in rows] == [5.0, 2.0, 2.0, 5.0]
    assert all(row["error"] == 0 for row in rows)

"""Cold memory: evicted arrays keep their contents and are slower to read; how far a model's weights are."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ingot.kernels.cpu.standalone import native_isa
from ingot.plan.lower import Module, Tensor
from ingot.runtime.buffers import aligned_bytes
from ingot.tune import cold, tuner
from tests.tune.support import candidate, module, tensor, work

pytestmark = pytest.mark.skipif(native_isa() is None, reason="needs an x86-64 processor")


def reading(array: np.ndarray, evicted: bool) -> float:  # type: ignore[type-arg]
    """Least seconds that one pass over the array takes."""
    times = []
    for _ in range(15):
        array.sum()
        if evicted:
            cold.evict([array])
        start = time.thread_time()
        array.sum()
        times.append(time.thread_time() - start)
    return min(times)


def test_an_evicted_array_must_be_read_from_memory() -> None:
    array = aligned_bytes(256 << 10).view(np.uint64)
    array[:] = np.arange(array.size)
    assert reading(array, True) > 1.3 * reading(array, False)
    assert np.array_equal(array, np.arange(array.size))


def test_nothing_to_evict() -> None:
    cold.evict([])
    cold.evict([np.empty(0)])


def weighted(count: int, megabytes: int, op: str = "Linear") -> Module:
    """Works that read a constant each."""
    x, y = tensor("x"), tensor("y")
    arrays = [np.empty((megabytes, 1 << 18), np.float32) for _ in range(count)]
    constants = [Tensor(f"w{i}", "float32", array.shape, array) for i, array in enumerate(arrays)]
    works = [work(f"k{i}", [x, c], [y], [candidate("k")]) for i, c in enumerate(constants)]
    for one in works:
        one.op = op
    return module([x], [y], works)


def test_bytes_of_weights_but_for_tables_that_are_gathered_from() -> None:
    assert tuner.weight_bytes(weighted(3, 10)) == 30 << 20
    assert tuner.weight_bytes(weighted(4, 10, "Gather")) == 0


def test_shared_weights_count_once() -> None:
    shared = weighted(1, 20)
    assert tuner.weight_bytes(module(shared.inputs, shared.outputs, shared.works * 3)) == 20 << 20


def test_distance_goes_by_doublings_of_what_stays_in_a_cache() -> None:
    sizes = (0, cold.CACHED // 100, cold.CACHED // 2, cold.CACHED - 1, cold.CACHED, 3 * cold.CACHED, 1000 * cold.CACHED)
    assert [cold.distance(size) for size in sizes] == [-3, -3, -1, -1, 0, 1, 3]

"""The engine loader refuses every damaged file, and the mutations really damage."""

import random

import pytest

from benchmarks.fuzz import attempt, example_engine, mutated, resealed, tally


@pytest.fixture(scope="module")
def engine() -> bytes:
    return example_engine()


def test_damaged_engines_are_refused(engine: bytes) -> None:
    found = tally(mutated, engine, 500, seed=1)
    assert (found.refused, found.accepted, found.failures) == (500, 0, ())


def test_resealed_headers_never_crash_the_loader(engine: bytes) -> None:
    found = tally(resealed, engine, 500, seed=1)
    assert not found.failures
    assert found.refused > 100


def test_the_undamaged_engine_is_accepted(engine: bytes, tmp_path) -> None:
    assert attempt(tmp_path / "whole.engine", engine) == "accepted"


def test_mutants_differ() -> None:
    source, data = random.Random(0), bytes(range(256)) * 4
    assert all(mutated(source, data) != data for _ in range(200))

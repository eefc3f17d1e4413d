"""Samples in any number: what is held is what was given, wherever it lies."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import ingot
from ingot.precision.spool import held

DIGITS = Path(__file__).parent.parent.parent / "examples" / "digits" / "digits.onnx"
DTYPES = (np.float32, np.int64, np.bool_, np.uint8, ml_dtypes.bfloat16)


def drawn(seed: int, count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    shapes = ((), (3,), (2, 0), (1, 5, 2))
    return [
        {
            "x": rng.standard_normal(shapes[rng.integers(4)]).astype(DTYPES[rng.integers(len(DTYPES))]),
            "label": int(rng.integers(10)),
            "text": np.array(["a", "bcd"]),
            "names": np.array([f"n{i}"], object),
        }
        for i in range(count)
    ]


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(0, 12), st.integers(0, 400))
def test_everything_is_there_again(seed: int, count: int, limit: int) -> None:
    entries = drawn(seed, count)
    found = held(iter(entries), limit)
    assert [list(entry) for entry in found] == [list(entry) for entry in entries]
    for mine, wanted in zip(found, entries, strict=True):
        for name, value in wanted.items():
            assert np.asarray(mine[name]).dtype == np.asarray(value).dtype
            assert np.array_equal(mine[name], value) and np.shape(mine[name]) == np.shape(value)


def test_memory_is_bounded() -> None:
    def stream() -> Iterator[dict[str, Any]]:
        for i in range(64):
            yield {"x": np.full((1 << 18,), i, np.float32)}

    tracemalloc.start()
    found = held(stream(), limit=4 << 20)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 12 << 20 < 64 << 20
    assert [float(entry["x"][7]) for entry in found] == list(range(64))
    assert found[0]["x"].flags.writeable and not found[-1]["x"].flags.writeable


def test_an_engine_takes_what_is_mapped() -> None:
    rng = np.random.default_rng(0)
    images = [{"image": rng.standard_normal((1, 1, 8, 8)).astype(np.float32)} for _ in range(3)]
    with ingot.Session(ingot.build(DIGITS, level=0, verify=False)) as session:
        mapped = [session.run(sample) for sample in held(images, limit=0)]
        assert all(np.array_equal(a["scores"], session.run(b)["scores"]) for a, b in zip(mapped, images, strict=True))

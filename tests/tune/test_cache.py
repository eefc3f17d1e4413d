"""The timing cache: what it keeps and refuses, what it says about times of elsewhere; many writers, no half files."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.errors import ConfigError
from ingot.kernels import Ports
from ingot.kernels.cpu.isa import AVX2, AVX512
from ingot.kernels.cpu.workers import WorkerPool
from ingot.tune import cache
from ingot.tune.cache import TimingCache, candidate_key, merge, read, reset, signature
from tests.tune.support import candidate, node

PLACE_PARTS = 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "times.json"


def filled(path: Path, **times: float | str) -> TimingCache:
    """A saved cache: candidate → outcome of node "n"."""
    kept = TimingCache(path, AVX2)
    for name, outcome in times.items():
        kept.put("n", name, outcome)
    kept.save()
    return kept


def moved(path: Path, part: int, to: str) -> None:
    """Make all times those of another place."""
    content = json.loads(path.read_text())
    (place, times), *_ = content["machines"].items()
    words = place.split(" | ")
    words[part] = to
    content["machines"] = {" | ".join(words): times}
    path.write_text(json.dumps(content))


def test_times_and_failures_come_back(path: Path) -> None:
    filled(path, fast=1.23456, slow=99.0, broken="while it was timed: SIGSEGV")
    again = TimingCache(path, AVX2)
    assert again.get("n", "fast") == 1.235 and again.get("n", "slow") == 99.0
    assert again.get("n", "broken") is None and again.failure("n", "broken") == "while it was timed: SIGSEGV"
    assert again.get("n", "unknown") is None and again.get("m", "fast") is None and again.failure("n", "fast") is None


def test_a_file_that_was_asked_for_is_there_even_when_nothing_was_timed(path: Path) -> None:
    TimingCache(path, AVX2).save()
    assert path.exists() and read(path) == {}


def test_nothing_new_nothing_written(path: Path) -> None:
    filled(path, a=1.0)
    before = path.stat().st_mtime_ns
    TimingCache(path, AVX2).save()
    assert path.stat().st_mtime_ns == before


def test_without_a_file_it_lasts_as_long_as_the_build(tmp_path: Path) -> None:
    kept = TimingCache(None, AVX2)
    kept.put("n", "a", 1.0)
    kept.save()
    assert kept.get("n", "a") == 1.0 and not list(tmp_path.iterdir())


def test_saving_merges_with_what_others_wrote_meanwhile(path: Path) -> None:
    mine, theirs = TimingCache(path, AVX2), TimingCache(path, AVX2)
    mine.put("n", "a", 1.0)
    theirs.put("n", "b", 2.0)
    theirs.save()
    mine.save()
    assert TimingCache(path, AVX2).times == {"n": {"a": 1.0, "b": 2.0}}


def test_the_same_times_are_the_same_bytes(tmp_path: Path) -> None:
    filled(tmp_path / "one", a=1.0, b=2.0)
    filled(tmp_path / "two", b=2.0, a=1.0)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def write_many(path: str, writer: int) -> None:
    for step in range(8):
        filled(Path(path), **{f"w{writer}_{step}": float(writer)})


def test_many_processes_lose_nothing(path: Path) -> None:
    with WorkerPool(4) as pool:
        for job in [pool.submit("tests.tune.test_cache:write_many", str(path), writer) for writer in range(4)]:
            job.result()
    assert len(TimingCache(path, AVX2).times["n"]) == 32
    assert sorted(p.name for p in path.parent.iterdir()) == [".times.json.lock", "times.json"]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '"text"', "{}", '{"format": "something else"}', '{"format": "ingot timing cache 1"}',
        '{"format": "ingot timing cache 1", "machines": []}',
        '{"format": "ingot timing cache 1", "machines": {"a": 3}}',
        '{"format": "ingot timing cache 1", "machines": {"a": {"n": {"k": -1}}}}',
        '{"format": "ingot timing cache 1", "machines": {"a": {"n": {"k": NaN}}}}',
        '{"format": "ingot timing cache 1", "machines": {"a": {"n": {"k": null}}}}',
        '{"format": "ingot timing cache 1", "machines": {"a": {"n": {"k": true}}}}',
        "[" * 100_000, "\x00\xff",
    ],
)  # fmt: skip
def test_another_file_is_refused_and_left_alone(path: Path, text: str) -> None:
    path.write_text(text)
    for action in (lambda: TimingCache(path, AVX2), lambda: reset(path), lambda: merge(path, [path])):
        with pytest.raises(ConfigError, match=r"times\.json") as refused:
            action()
        assert len(str(refused.value).splitlines()) == 1 and "delete it" in str(refused.value)
    assert path.read_text() == text


def test_bytes_that_are_no_text_are_refused(path: Path) -> None:
    path.write_bytes(b"\x80\x81\x82")
    with pytest.raises(ConfigError, match="not a timing cache"):
        TimingCache(path, AVX2)


def test_a_truncated_file_is_refused(path: Path) -> None:
    filled(path, a=1.0)
    whole = path.read_bytes()
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="not a timing cache"):
            TimingCache(path, AVX2)


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        TimingCache(tmp_path / "nowhere" / "times", AVX2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(path: Path) -> None:
    kept = TimingCache(path, AVX2)
    kept.put("n", "a", 1.0)
    path.parent.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="cannot write the timing cache"):
            kept.save()
    finally:
        path.parent.chmod(0o700)


def test_a_full_disk_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path, a=1.0)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="No space left"):
        filled(path, b=2.0)
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == [".times.json.lock", "times.json"]


# -- other places


@pytest.mark.parametrize(
    ("part", "other", "said"),
    [
        (0, "Imaginary 9000 (1/2/3)", "processor 'Imaginary 9000"),
        (2, "llvmlite 0.1", "compiler 'llvmlite 0.1'"),
        (3, "0123456789abcdef", "other sources of the kernel generators"),
    ],
)
def test_times_of_elsewhere_are_kept_not_used_and_explained(path: Path, part: int, other: str, said: str) -> None:
    filled(path, a=1.0)
    moved(path, part, other)
    here = TimingCache(path, AVX2)
    assert here.get("n", "a") is None and here.mismatch is not None
    assert said in here.mismatch and here.mismatch.count(";") == 0
    here.put("n", "a", 2.0)
    here.save()
    assert len(read(path)) == 2 and TimingCache(path, AVX2).mismatch is None


def test_another_instruction_set_is_another_place(path: Path) -> None:
    filled(path, a=1.0)
    other = TimingCache(path, AVX512)
    assert other.get("n", "a") is None
    assert other.mismatch == "its times are of the instruction set 'avx2', this build's is 'avx512'"


def test_the_nearest_of_several_places_is_explained(path: Path) -> None:
    filled(path, a=1.0)
    moved(path, 0, "Imaginary 9000")
    moved(path, 2, "llvmlite 0.1")
    filled(path.with_name("near"), a=1.0)
    moved(path.with_name("near"), 2, "llvmlite 0.2")
    merge(path, [path.with_name("near")])
    mismatch = TimingCache(path, AVX2).mismatch
    assert mismatch is not None and "llvmlite 0.2" in mismatch and "Imaginary" not in mismatch


def test_a_place_names_four_things() -> None:
    assert len(cache.place_of(AVX2).split(" | ")) == PLACE_PARTS
    assert "llvmlite" in cache.place_of(AVX2) and cache.processor() in cache.place_of(AVX512)


# -- merge, reset


def test_merge_adds_and_the_last_wins(tmp_path: Path) -> None:
    filled(tmp_path / "a", x=1.0, y=1.0)
    filled(tmp_path / "b", y=2.0, z=2.0)
    merge(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
    assert TimingCache(tmp_path / "all", AVX2).times == {"n": {"x": 1.0, "y": 2.0, "z": 2.0}}
    with pytest.raises(ConfigError, match="no timing cache"):
        merge(tmp_path / "all", [tmp_path / "missing"])


def test_reset_forgets(path: Path) -> None:
    filled(path, a=1.0, broken="while it was timed: SIGKILL")
    reset(path)
    assert read(path) == {}


# -- keys


def test_a_signature_is_of_what_decides_the_speed() -> None:
    weight = np.ones((8, 4), np.float32)
    base = node("Linear", (2, 8), (8, 4), (2, 4), weight=weight)
    assert signature(base) == signature(replace(base, name="other", origins=("other",)))
    assert signature(base) == signature(node("Linear", (2, 8), (8, 4), (2, 4), weight=weight * 2))
    others = [
        node("Linear", (3, 8), (8, 4), (3, 4), weight=weight),
        node("Linear", (2, 8), (8, 4), (2, 4)),
        node("MatMul", (2, 8), (8, 4), (2, 4), weight=weight),
        node("Linear", (2, 8), (8, 4), (2, 4), weight=weight, x_zero_point=3),
    ]
    assert len({signature(base, distance=1), *(signature(n) for n in (base, *others))}) == 6


def test_a_candidate_is_known_by_kernel_tactic_and_layouts() -> None:
    plain, blocked = candidate("k"), candidate("k", ["blocked"], ["blocked"])
    keys = [candidate_key(c) for c in (plain, blocked, replace(plain, tactic={"rows": 2}))]
    assert len(set(keys)) == 3 and candidate_key(replace(blocked, ports=Ports(("blocked",), ("blocked",)))) == keys[1]


def test_infinity_is_no_time(path: Path) -> None:
    kept = TimingCache(path, AVX2)
    kept.put("n", "a", math.inf)
    kept.save()
    with pytest.raises(ConfigError, match="inf"):
        TimingCache(path, AVX2)

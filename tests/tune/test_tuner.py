"""Whole builds that tune: levels, the cache, bytes, candidates that crash or hang, Ctrl-C, progress."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ingot
from ingot.errors import BuildError
from ingot.kernels import Candidate
from ingot.kernels.cpu import workers
from ingot.kernels.cpu.isa import AVX2
from ingot.kernels.cpu.standalone import native_isa
from ingot.report import BuildLog, last_log
from ingot.tune import trials, tuner
from ingot.tune.cache import candidate_key
from ingot.tune.tuner import LEVELS, Level
from tests.tune.support import abs_model, candidate, module, planted, saved, tensor, work

pytestmark = pytest.mark.skipif(native_isa() is None, reason="needs AVX2")


def layers(count: int = 3) -> onnx.ModelProto:
    """Linear layers of as many shapes."""
    rng = np.random.default_rng(0)
    widths = [96 + 32 * i for i in range(count + 1)]
    weights = [
        numpy_helper.from_array((rng.standard_normal((a, b)) / 16).astype(np.float32), f"w{i}")
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    ]
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], f"layer{i}") for i in range(count)]
    ends = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [64, widths[i]]) for i in (0, count)]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_two_builds_from_one_cache_have_the_same_bytes(tmp_path: Path, level: int) -> None:
    cache = tmp_path / "times"
    first = saved(ingot.build(layers(), level=level, timing_cache=cache), tmp_path / "a")
    assert last_log().figures["candidates timed"] > 0
    times = cache.read_bytes()
    for name in "bc":
        assert saved(ingot.build(layers(), level=level, timing_cache=cache), tmp_path / name) == first
        assert last_log().figures["candidates timed"] == 0
    assert cache.read_bytes() == times


def test_a_higher_level_times_more_and_keeps_what_is_known(tmp_path: Path) -> None:
    cache, timed = tmp_path / "times", []
    for level in (1, 3, 5):
        before = json.loads(cache.read_text())["machines"] if cache.exists() else {}
        ingot.build(layers(1), level=level, timing_cache=cache)
        timed.append(last_log().figures["candidates timed"])
        after = json.loads(cache.read_text())["machines"]
        for place, nodes in before.items():
            assert all(after[place][n].items() >= outcomes.items() for n, outcomes in nodes.items())
    assert timed[0] > 0 and timed[2] > 0


def test_equal_nodes_are_timed_once() -> None:
    ingot.build(layers(1), level=2)
    alone = last_log().figures["candidates timed"]
    model = layers(1)
    for i, (a, b) in enumerate([("x1", "y1"), ("y1", "y2")]):  # back and forth: transposed shapes, the first again
        weight = np.full((128, 96) if i == 0 else (96, 128), 0.01, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, f"v{i}"))
        model.graph.node.append(helper.make_node("MatMul", [a, f"v{i}"], [b], f"more{i}"))
    model.graph.output[0].name = "y2"
    ingot.build(model, level=2)
    assert alone < last_log().figures["candidates timed"] <= 2 * alone + 2


def test_without_permission_to_measure_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="layer0"):
        ingot.build(layers(), level=1, timing_cache=tmp_path / "times", timing_cache_only=True)
    ingot.build(layers(), level=1, timing_cache=tmp_path / "times")
    ingot.build(layers(), level=1, timing_cache=tmp_path / "times", timing_cache_only=True)


def test_times_of_another_machine_are_explained(tmp_path: Path) -> None:
    cache = tmp_path / "times"
    ingot.build(layers(1), level=1, timing_cache=cache)
    text = cache.read_text()
    cache.write_text(text.replace("llvmlite ", "llvmlite 9"))
    ingot.build(layers(1), level=1, timing_cache=cache)
    notice = next(n for n in last_log().notices if n.kind == "timing cache")
    assert "compiler 'llvmlite 9" in notice.reason and "measures its own" in notice.remedy
    assert len(json.loads(cache.read_text())["machines"]) == 2


def test_a_variant_this_machine_cannot_run_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "features", lambda target: frozenset())
    ingot.build(layers(1), level=5, variants=("avx2",), verify=False)
    assert [n.node for n in last_log().notices if n.kind == "not timed"] == ["avx2"]


def test_progress_only_moves_forward() -> None:
    told: list[tuple[str, float]] = []
    ingot.build(layers(2), level=1, progress=lambda stage, share: told.append((stage, share)))
    tuning = [share for stage, share in told if stage.startswith("tune ")]
    assert tuning[0] == 0 and tuning[-1] == 1 and tuning == sorted(tuning) and len(set(tuning)) > 3


def test_ctrl_c_keeps_what_has_been_measured(tmp_path: Path) -> None:
    cache = tmp_path / "times"

    def interrupt(stage: str, share: float) -> None:
        if stage.startswith("tune") and 0.8 < share < 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ingot.build(layers(4), level=1, timing_cache=cache, progress=interrupt)
    (known,) = json.loads(cache.read_text())["machines"].values()
    assert 0 < len(known) < 4
    ingot.build(layers(4), level=1, timing_cache=cache)
    assert last_log().figures["candidates timed"] > 0
    (known,) = json.loads(cache.read_text())["machines"].values()
    assert len(known) == 4


def test_two_builds_at_once_share_a_cache(tmp_path: Path) -> None:
    job = "tests.tune.test_tuner:build_layers"
    with workers.WorkerPool(2) as pool:
        for done in [pool.submit(job, count, str(tmp_path / "times")) for count in (1, 2)]:
            done.result()
    ingot.build(layers(2), level=1, timing_cache=tmp_path / "times")
    assert last_log().figures["candidates timed"] == 0


def build_layers(count: int, cache: str) -> None:
    """Called in a child."""
    ingot.build(layers(count), level=1, timing_cache=cache)


# -- kernels that go wrong


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel with four ways to fail, seemingly the cheapest; little patience with it."""
    monkeypatch.setattr(trials, "_PATIENCE", 6.0)
    monkeypatch.setitem(LEVELS, 5, Level(10_000, 0.02, hopeless=float("inf"), worth=0.0))
    yield from (None for _ in planted(monkeypatch, "tests.tune.faulty"))


def failures() -> dict[str, str]:
    return {n.reason.partition(":")[0]: n.reason for n in last_log().notices if n.kind == "dropped tactic"}


def test_each_fault_loses_its_candidate_only_and_is_named(faulty: None, tmp_path: Path) -> None:
    cache = tmp_path / "times"
    engine = ingot.build(abs_model(), level=5, timing_cache=cache)
    told = failures()
    assert set(told) == {f"faulty(fault={fault})" for fault in ("refuse", "garble", "crash", "hang")}
    assert "does not like the shape" in told["faulty(fault=refuse)"] and "compiled" in told["faulty(fault=refuse)"]
    assert "not valid LLVM IR" in told["faulty(fault=garble)"]
    assert "SIGSEGV" in told["faulty(fault=crash)"] and "timed" in told["faulty(fault=crash)"]
    assert "no answer within" in told["faulty(fault=hang)"]
    assert all(n.node == "users_abs" for n in last_log().notices if n.kind == "dropped tactic")
    x = np.linspace(-1, 1, 64 * 1024, dtype=np.float32).reshape(64, 1024)
    assert np.array_equal(ingot.Session(engine).run({"x": x})["y"], np.abs(x))

    again = ingot.build(abs_model(), level=5, timing_cache=cache)
    assert last_log().figures["candidates timed"] == 0 and failures() == told
    assert saved(again, tmp_path / "b") == saved(engine, tmp_path / "a")


def test_when_all_timed_candidates_fail_others_are_timed(
    faulty: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(LEVELS, 3, Level(4, 0.02, worth=0.0))  # the faulty ones make all others look hopeless
    cache = tmp_path / "times"
    engine = ingot.build(abs_model(), level=3, timing_cache=cache)
    assert len(failures()) == 4 and last_log().figures["candidates timed"] > 4
    (known,) = json.loads(cache.read_text())["machines"].values()
    assert sum(not isinstance(t, str) for times in known.values() for t in times.values()) > 0
    (told,) = (n for n in last_log().notices if n.kind == "second choice")
    assert told.node == "users_abs" and "all 4 candidates" in told.reason
    (segment,) = engine.variants[0].plan.segments
    assert "faulty" not in str(segment)
    again = ingot.build(abs_model(), level=3, timing_cache=cache, timing_cache_only=True)
    assert last_log().figures["candidates timed"] == 0 and told in last_log().notices
    assert saved(again, tmp_path / "b") == saved(engine, tmp_path / "a")


def test_the_last_candidate_is_found_behind_any_number_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    log, tried = BuildLog(), []

    def run(todo: list[trials.Trial], *_: object) -> Iterator[tuple[trials.Trial, list[trials.Outcome]]]:
        for trial in todo:
            tried.append([c.tactic["t"] for c in trial.candidates])
            yield trial, [5.0 if c.tactic["t"] == 40 else "wrong" for c in trial.candidates]

    monkeypatch.setattr(trials, "run", run)
    x, y = tensor("x", (64, 64, 64, 64)), tensor("y", (64, 64, 64, 64))
    choices = [replace(candidate("k"), tactic={"t": t}) for t in range(41)]
    node = work("w", [x], [y], choices)
    price = tuner.prices(module([x], [y], [node]), AVX2, {}, ingot.BuildConfig(level=2), log)
    assert list(map(len, tried)) == [2, 8, 31] and [t for more in tried for t in more] == list(range(41))
    assert [price(node, c) for c in choices] == [float("inf")] * 40 + [5.0]


def test_equal_nodes_may_have_unequal_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def run(todo: list[trials.Trial], *_: object) -> Iterator[tuple[trials.Trial, list[trials.Outcome]]]:
        for trial in todo:
            tried.append([c.tactic["t"] for c in trial.candidates])
            yield trial, [10.0 - c.tactic["t"] for c in trial.candidates]

    monkeypatch.setattr(trials, "run", run)
    x, y, z = (tensor(name, (64, 64, 64, 64)) for name in "xyz")
    choices = [replace(candidate("k"), tactic={"t": t}) for t in range(4)]
    nodes = [work("a", [x], [y], choices[:2]), work("b", [y], [z], choices)]
    price = tuner.prices(module([x], [z], nodes), AVX2, {}, ingot.BuildConfig(level=4), BuildLog())
    assert tried == [[0, 1, 2, 3]]
    assert [[price(node, c) for c in node.choices] for node in nodes] == [[10.0, 9.0], [10.0, 9.0, 8.0, 7.0]]


def test_kernels_that_do_not_apply_to_the_typical_size_are_chosen_by_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot import kernels

    def any_size(entry: kernels.Kernel) -> kernels.Kernel:
        return replace(entry, when=lambda n, isa: entry.when(n, isa) and isinstance(n.output.shape[0], str))

    kernels._load("cpu")
    table = kernels._TABLE["Pointwise", "cpu"]
    monkeypatch.setitem(kernels._TABLE, ("Pointwise", "cpu"), list(map(any_size, table)))
    monkeypatch.setitem(LEVELS, 3, Level(4, 0.02, worth=0.0))
    profile = ingot.Profile(x=((1, 1024), (8, 1024), (64, 1024)))
    engine = ingot.build(abs_model(("N", 1024)), level=3, profiles=[profile])
    assert not failures() and last_log().figures["candidates timed"] == 0
    x = np.linspace(-1, 1, 8 * 1024, dtype=np.float32).reshape(8, 1024)
    assert np.array_equal(ingot.Session(engine).run({"x": x})["y"], np.abs(x))


def test_when_every_candidate_fails_the_build_says_so(faulty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot import kernels

    table = kernels._TABLE["Pointwise", "cpu"]
    monkeypatch.setitem(kernels._TABLE, ("Pointwise", "cpu"), [k for k in table if k.name == "faulty"])
    with pytest.raises(BuildError, match=r"every kernel for Pointwise users_abs failed.*level 0"):
        ingot.build(abs_model(), level=5)


def test_no_child_is_left_spinning(faulty: None) -> None:
    ingot.build(abs_model(), level=5)
    workers.dismiss()
    listed = [p for p in Path("/proc").iterdir() if p.name.isdigit() and _is_mine(p)]
    assert not listed


def _is_mine(process: Path) -> bool:
    try:
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        return parent == os.getpid() and b"cpu.workers" in (process / "cmdline").read_bytes()
    except OSError:
        return False


# -- prices


def shortlist(level: Level) -> list[str]:
    """Of two kernels, "good" with three tactics and "modest", each plain and blocked: the costs grow in this order."""
    x, y = tensor("x", (64, 64, 64, 64)), tensor("y", (64, 64, 64, 64))
    tactics = [("good", 1), ("good", 2), ("good", 3), ("modest", 1)]
    choices = [
        replace(candidate(name, [layout], [layout]), tactic={"t": t})
        for name, t in tactics
        for layout in ("", "blocked")
    ]
    cost = {candidate_key(c): 10.0 + i for i, c in enumerate(choices)}

    def price(_: object, c: Candidate) -> float:
        return cost[candidate_key(c)]

    lists = tuner.shortlists(module([x], [y], [work("w", [x], [y], choices)]), price, level)  # type: ignore[arg-type]
    return [candidate_key(c) for chosen in lists.values() for c in chosen]


def test_shortlists_give_every_kernel_and_layout_a_seat() -> None:
    ends = (">", "blocked>blocked")
    assert sorted(shortlist(Level(1, 0.1))) == sorted(f"{k}(t=1) {end}" for k in ("good", "modest") for end in ends)
    assert len(shortlist(Level(2, 0.1))) == 6 and len(shortlist(Level(9, 0.1))) == 8


def test_shortlists_leave_out_the_hopeless_and_what_is_cheap_anyway() -> None:
    assert len(shortlist(Level(9, 0.1, hopeless=1.15))) == 2
    assert shortlist(Level(9, 0.1, worth=100.0)) == []


def test_half_of_the_seats_are_for_different_tiles() -> None:
    points = [("big", 1), ("big", 2), ("big", 4), ("wide", 1), ("small", 1), ("small", 2)]
    group = [replace(candidate("k"), tactic={"tile": tile, "split": split}) for tile, split in points]

    def seated(seats: int, varied: bool) -> list[tuple[str, int]]:
        return [tuple(c.tactic.values()) for c in tuner._seated(group, Level(seats, 0.1, varied=varied))]

    assert seated(4, False) == points[:4]
    assert seated(4, True) == [("big", 1), ("wide", 1), ("big", 2), ("big", 4)]
    assert sorted(seated(9, True)) == sorted(points)

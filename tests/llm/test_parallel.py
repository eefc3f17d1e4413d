"""Several ranks give what one gives; a rank that ends ends the requests, clearly, and nothing hangs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from examples.tiny_llm import FOLDER
from ingot.cli import main
from ingot.engine import Engine
from ingot.errors import ConfigError, DeviceError, EngineError
from ingot.llm import engine as loops
from ingot.llm.batch import Batch
from ingot.llm.build import BuildOptions, build_llm, build_ranks
from ingot.llm.parallel import LeadingRunner, RankRunner, _written, follow, local_ranks, rank_path
from ingot.llm.request import Event, Overloaded, Request, Sampling
from ingot.llm.runner import Stepping, open_runner
from ingot.runtime.group import GroupLost, SharedGroup, shared_groups
from tests.llm.checkpoints import LOGITS, TOKENS, write_family
from tests.llm.packers import Packing, write_packed
from tests.llm.test_families import OPTIONS, WITHIN, batch_of

TWO = replace(OPTIONS, ranks=2)


@pytest.mark.parametrize(("name", "ranks"), [
    ("llama_yarn_one_key", 4), ("qwen3_moe", 2), ("gemma2", 2), ("phi3", 2), ("gpt2", 4),
])  # fmt: skip
def test_ranks_give_the_logits_of_transformers(name: str, ranks: int, tmp_path: Path) -> None:
    engines = build_ranks(write_family(tmp_path, name), replace(OPTIONS, ranks=ranks))
    with np.load(LOGITS) as known:
        expected = known[name]
    with closing(local_ranks(engines, 64, alike=True)) as runner:
        first = runner.step(batch_of(runner, [(0, 0, TOKENS[:25]), (1, 0, TOKENS[:3])]))
        runner.copy_blocks([(kind, n, runner.width * 2 + n) for kind in range(len(runner.kinds)) for n in (0, 1)])
        rest = runner.step(batch_of(runner, [(2, 25, TOKENS[25:])]))
    found = np.concatenate([first[:25], rest])
    assert np.abs(found - expected).max() < WITHIN
    assert np.abs(first[25:] - expected[:3]).max() < WITHIN


@pytest.mark.parametrize("precision", ["int8", "w8a8"])
def test_ranks_of_narrow_weights(precision: str, tmp_path: Path) -> None:
    """Verified while they are built; states and the likeliest tokens come as from one rank."""
    folder = write_family(tmp_path, "llama")
    one = open_runner(build_llm(folder, replace(OPTIONS, precision=precision)))
    with closing(local_ranks(build_ranks(folder, replace(TWO, precision=precision)), 64)) as two:
        batch = batch_of(two, [(0, 0, TOKENS[:9])])
        (logits, states), (others, more) = (
            runner.step_states(replace(batch, states=batch.rows[-2:])) for runner in (one, two)
        )
        spread = float(logits.std())
        assert np.abs(logits - others).max() < spread * 0.2
        assert states.shape == more.shape == (2, 48)
        assert two.choose(batch).tolist() == others.argmax(-1).tolist()
    one.close()


@pytest.mark.parametrize(("name", "ranks", "reason"), [
    ("llama", 3, "4 heads that share 2 keys cannot be divided among 3 ranks"),
    ("llama", 8, "4 heads that share 2 keys cannot be divided among 8 ranks"),
])  # fmt: skip
def test_a_model_that_cannot_be_divided(name: str, ranks: int, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_ranks(write_family(tmp_path, name), replace(OPTIONS, ranks=ranks))
    with pytest.raises(ConfigError, match="build_ranks"):
        build_llm(tmp_path, TWO)
    with pytest.raises(ConfigError, match="ranks must be at least 1"):
        BuildOptions(ranks=0)


def test_packed_integers_are_shared_by_whole_groups(tmp_path: Path) -> None:
    folder, floats = write_packed(tmp_path, "llama", Packing(group=8))
    with closing(open_runner(build_llm(floats, OPTIONS))) as one:
        expected = one.step(batch_of(one, [(0, 0, TOKENS[:9])]))
    with closing(local_ranks(build_ranks(folder, TWO), 64)) as two:
        found = two.step(batch_of(two, [(0, 0, TOKENS[:9])]))
    assert np.abs(found - expected).max() < 1e-2 * float(expected.std())
    with pytest.raises(ConfigError, match="groups of 16, ranks would get"):
        build_ranks(write_packed(tmp_path / "wide", "llama", Packing(group=16))[0], replace(OPTIONS, ranks=4))
    with pytest.raises(ConfigError, match="desc_act"):
        build_ranks(write_packed(tmp_path / "ordered", "llama", Packing(group=8, ordered=True))[0], TWO)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_family(tmp_path_factory.mktemp("ranks"), "llama")
    path = folder / "model.engine"
    for rank, engine in enumerate(build_ranks(folder, TWO)):
        engine.save(rank_path(path, rank))
    return path


@dataclass
class Following:
    """As much of a rank's runner as `follow` asks for; a step's result is there when `over` says so, then it fails or
    not."""

    group: SharedGroup
    failing: bool = False
    ahead: bool = True
    done: list[Any] = field(default_factory=list)
    steps: dict[int, threading.Event] = field(default_factory=lambda: {n: threading.Event() for n in range(3)})
    over: threading.Event = field(default_factory=threading.Event)
    session: Any = field(default_factory=lambda: SimpleNamespace(context=SimpleNamespace(activate=lambda: None)))

    def begin(self, batch: Batch, *wanted: str) -> Stepping:
        number = int(batch.token_ids[0])
        self.done.append((number, wanted, batch.carried.tolist()))
        self.steps[number].set()

        def result() -> dict[str, Any]:
            assert self.over.wait(30)
            if self.failing:
                raise DeviceError("a kernel failed")
            self.done.append(f"end of {number}")
            return {}

        return Stepping(result)

    def copy_blocks(self, pairs: Any) -> None:
        self.done.append(pairs)


def told(number: int) -> bytes:
    """A step of one token, for other ranks."""
    one, none = np.full(1, number, np.int32), np.zeros(1, np.int32)
    carried = np.zeros((number, 2), np.int32)
    batch = Batch(one, none, none, np.array([0, 1], np.int32), one, none[None], none, carried=carried)
    return _written({"do": "step", "wanted": ["chosen"]}, astuple(batch))


@contextmanager
def followed(failing: bool) -> Iterator[tuple[SharedGroup, Following, Future[None]]]:
    """The group's leader, who follows it, and what comes of that."""
    mine, theirs = shared_groups(2, 30.0)
    runner = Following(theirs, failing)
    with ThreadPoolExecutor(1) as threads, closing(mine), closing(theirs):
        yield mine, runner, threads.submit(follow, cast(RankRunner, runner))


def test_ranks_begin_steps_behind_one_another() -> None:
    with followed(failing=False) as (leader, runner, following):
        for number in range(2):
            leader.tell(told(number))
            assert runner.steps[number].wait(30), "before the one before has ended"
        runner.over.set()
        leader.tell(_written({"do": "copy"}, [np.array([[1, 3, 4]], np.int32)]))
        leader.tell(_written({"do": "end"}, []))
        following.result(30)
    assert runner.done[:2] == [(0, ("chosen",), []), (1, ("chosen",), [[0, 0]])]
    assert sorted(map(str, runner.done[2:])) == ["[(1, 3, 4)]", "end of 0", "end of 1"]


def test_a_step_that_fails_on_a_rank_ends_the_group() -> None:
    with followed(failing=True) as (leader, runner, following):
        leader.tell(told(0))
        assert runner.steps[0].wait(30)
        runner.over.set()
        with pytest.raises(DeviceError, match="a kernel failed"):
            following.result(30)
        with pytest.raises(GroupLost, match=r"rank 1 .*has ended"):
            leader.all_gather(np.zeros(1))


def test_files_of_ranks(saved: Path, tmp_path: Path) -> None:
    engines = [Engine.load(rank_path(saved, rank)) for rank in range(2)]
    with pytest.raises(EngineError, match="by their path"):
        open_runner(engines[0])
    engines[0].save(tmp_path / "model.engine")
    with pytest.raises(EngineError, match=r"model.rank1.engine must lie beside it"):
        open_runner(tmp_path / "model.engine")
    with pytest.raises(EngineError, match="asked to be rank 0"):
        local_ranks(engines[::-1], 64)
    other = build_ranks(saved.parent, replace(TWO, precision="bf16", verify=False))
    with pytest.raises(EngineError, match="another build"):
        local_ranks([engines[0], other[1]], 64)


@pytest.fixture
def runner(saved: Path) -> Iterator[LeadingRunner]:
    made = open_runner(saved, threads=1, blocks=64)
    assert isinstance(made, LeadingRunner)
    yield made
    made.close()


def test_ranks_in_processes(runner: LeadingRunner) -> None:
    with np.load(LOGITS) as known:
        expected = known["llama"]
    found = runner.step(batch_of(runner, [(0, 0, TOKENS)]))
    assert np.abs(found - expected).max() < WITHIN
    runner.close()
    assert [process.returncode for process in runner.processes] == [0]
    with pytest.raises(GroupLost, match="left its group"):
        runner.step(batch_of(runner, [(0, 0, TOKENS)]))


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.engine"
    assert main(["llm", "build", str(FOLDER), "-o", str(path), "--tp", "2", "--level", "0", "--quiet"]) == 0
    assert "tiny.rank1.engine: rank 1 of 2" in capsys.readouterr().out
    assert main(["llm", "generate", str(path), "--chat", "Who are you?"]) == 0
    assert capsys.readouterr().out.startswith("I am a tiny model")
    assert main(["llm", "build", str(FOLDER), "-o", str(path), "--tensor-parallel", "0", "--quiet"]) == 1
    assert "ranks must be at least 1" in capsys.readouterr().err


def test_a_rank_that_dies_ends_the_requests_and_the_loop(runner: LeadingRunner) -> None:
    loop, events = loops.Engine(runner), queue.SimpleQueue[Event]()
    loop.start()
    try:
        loop.submit(Request(TOKENS[:5].tolist(), Sampling(max_tokens=80, ignore_eos=True)), events.put)
        assert events.get(timeout=60).tokens
        runner.processes[0].kill()
        last = events.get(timeout=60)
        while last.finish is None:
            last = events.get(timeout=60)
        assert last.finish == "error"
        assert "rank 1" in last.error
        assert "rank 1" in loop.health
        with pytest.raises(Overloaded, match="rank 1"):
            loop.submit(Request(TOKENS[:5].tolist(), Sampling(max_tokens=4)), events.put)
    finally:
        loop.close()

"""Blocks that have left a window are given back, in every kind of layers by themselves; the tokens stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ingot.llm.decoder
import ingot.llm.runner
from ingot.engine import Engine as EngineFile
from ingot.errors import ConfigError, DeviceError, EngineError, InputError
from ingot.llm import commands_build
from ingot.llm.batch import Kind
from ingot.llm.build import BuildOptions, build_llm, build_ranks
from ingot.llm.commands_serve import _held_by
from ingot.llm.engine import Engine
from ingot.llm.options import EngineOptions
from ingot.llm.parallel import local_ranks
from ingot.llm.pools import DevicePools
from ingot.llm.request import Event, Request, Sampling
from ingot.llm.runner import EngineRunner
from tests.llm.checkpoints import TOKENS, write_family
from tests.llm.test_engine import greedy, run, tokens
from tests.llm.test_families import batch_of
from tests.llm.test_runner import greedy as by_hand

OPTIONS = BuildOptions(context=96, token_budget=48, sequence_budget=4, level=0, verify=False)
LONG = BuildOptions(context=240, token_budget=32, sequence_budget=3, level=0, verify=False)
MIXED = {"gemma2": 40, "gemma3_text": 24, "qwen2_sliding": 33}  # windows of a few blocks of 16
PROMPT = np.random.default_rng(8).integers(3, 64, 200).astype(np.int32)


def test_an_engine_with_a_window(tmp_path: Path) -> None:
    made = build_llm(write_family(tmp_path, "mistral"), OPTIONS)
    requests = [Request(TOKENS[at : at + 20].tolist(), Sampling(temperature=0.0, max_tokens=70, ignore_eos=True))
                for at in range(0, 12, 4)]  # fmt: skip
    told = []
    for blocks, window in ((24, 0), (9, 7)):
        runner = EngineRunner(made, threads=1, blocks=blocks)
        assert runner.kinds == (Kind(blocks, 7),)
        runner.kinds = (Kind(blocks, window),)
        engine = Engine(runner)
        told.append([tokens(events) for events in run(engine, *requests)])
        assert not engine.scheduler.preemptions, "three answers of six blocks each, two at a time are in the window"
        engine.close()
    assert told[0] == told[1] and all(len(answer) == 70 for answer in told[0])


@pytest.mark.parametrize(("family", "windows", "kinds"), [
    ("gemma2", [0, 8], [1, 0, 1]), ("gemma3_text", [0, 8], [1, 0, 1]), ("qwen2_sliding", [0, 9], [0, 1, 1]),
    ("phi3", [11], [0, 0, 0]), ("llama", [0], [0, 0, 0]),
])  # fmt: skip
def test_layers_are_of_kinds(family: str, windows: list[int], kinds: list[int], tmp_path: Path) -> None:
    engine = build_llm(write_family(tmp_path, family), OPTIONS)
    facts, inputs = engine.details["llm"], [spec.name for spec in engine.inputs]
    assert (facts["windows"], facts["kinds"], facts["form"]) == (windows, kinds, len(windows))
    more = ["slots.1", "tables.1"] if len(windows) > 1 else []
    assert inputs == ["token_ids", "positions", "slots", "owners", "tables", "rows", *more, "cache.0", "cache.1",
                      "cache.2", "states"]  # fmt: skip


def test_windows_that_hold_the_context_see_all(tmp_path: Path) -> None:
    engine = build_llm(write_family(tmp_path, "gemma3_text", sliding_window=96), OPTIONS)
    assert (engine.details["llm"]["windows"], engine.details["llm"]["form"]) == ([0], 1)


def written(folder: Path, family: str) -> Path:
    return write_family(folder, family, sliding_window=MIXED[family], max_position_embeddings=256)


@pytest.fixture(scope="module", params=MIXED)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineFile:
    return build_llm(written(tmp_path_factory.mktemp("mixed"), request.param), LONG)


def requests() -> list[Request]:
    """Prompts of several windows, two that begin alike, two answers to one; tokens that are drawn show small changes of
    logits."""
    asked = Sampling(temperature=1.0, seed=5, max_tokens=25, ignore_eos=True)
    return [Request(PROMPT[:150].tolist(), replace(asked, temperature=0.0)), Request(PROMPT[:187].tolist(), asked),
            Request(PROMPT[50:131].tolist(), replace(asked, n=2)), Request(PROMPT[:9].tolist(), asked)]  # fmt: skip


def answers(engine: Engine, *asked: Request) -> list[list[list[int]]]:
    """The tokens of each request's answers; the engine is closed."""
    told = run(engine, *asked)
    engine.close()
    return [[tokens(events, n) for n in range(each.sampling.n)] for each, events in zip(asked, told, strict=True)]


def keeping(made: EngineFile) -> EngineRunner:
    """A runner none of whose layers gives a block back."""
    runner = EngineRunner(made, threads=1, alike=True)
    runner.kinds = tuple(replace(kind, window=0) for kind in runner.kinds)
    return runner


@pytest.fixture(scope="module")
def expected(mixed: EngineFile) -> list[list[list[int]]]:
    """One after the other, every block of every layer kept; the first by hand too."""
    found = [answers(Engine(keeping(mixed)), request)[0] for request in requests()]
    with closing(keeping(mixed)) as runner:
        assert found[0] == by_hand(runner, [requests()[0].tokens], 25, chunk=32)
    assert all(len(set(answer)) > 8 for each in found[1:] for answer in each)
    return found


@pytest.mark.parametrize("way", ["together", "alone", "prefix", "few", "ngrams", "model", "chunks"])
def test_tokens_are_the_same(mixed: EngineFile, expected: list[list[list[int]]], way: str) -> None:
    """Batched, single, behind a prefix of the cache, out of a window's blocks, with drafts, in the smallest chunks."""
    runner = EngineRunner(mixed, threads=1)
    first, second = runner.kinds
    assert second.blocks < first.blocks == 45, "what windows need is less"
    if way == "few":
        runner.kinds = first, replace(second, blocks=-(-(second.window + 32) // 16) + 1)  # one request's
    draft = EngineRunner(mixed, threads=1, blocks=runner.blocks, alike=True) if way == "model" else None
    engine = Engine(runner, None, EngineOptions(drafts=3 * (way in ("ngrams", "model"))), draft)
    if way == "chunks":
        engine.scheduler.limits = replace(engine.scheduler.limits, tokens=5)
    rounds = 2 if way == "prefix" else 1
    if way in ("alone", "prefix"):
        told = [[tokens(events, n) for n in range(request.sampling.n)]
                for request in requests() * rounds for events in run(engine, request)]  # fmt: skip
    else:
        told = answers(engine, *requests())
    assert told == expected * rounds
    assert bool(engine.scheduler.preemptions) == (way == "few")
    assert engine.scheduler.cache.found or way not in ("alone", "prefix")
    assert engine.counters.accepted or way != "model"
    engine.close()
    if draft is not None:
        draft.close()


def spoil(engine: Engine, runner: EngineRunner) -> None:
    """What nobody owns holds no numbers, and no prefix is found."""
    for kind, pool in enumerate(engine.scheduler.cache.pools):
        pool.forget()
        for number, of in enumerate(runner._kinds):
            if of == kind:
                runner._pools.feeds[f"cache.{number}"][list(pool._empty)] = np.nan


def test_what_was_given_back_is_not_read(mixed: EngineFile, expected: list[list[list[int]]]) -> None:
    runner = EngineRunner(mixed, threads=1)
    engine, told = Engine(runner), [list[Event]() for _ in requests()]
    for request, events in zip(requests(), told, strict=True):
        engine.submit(request, events.append)
    while engine.step() or engine._posted:
        spoil(engine, runner)
    assert [[tokens(events, n) for n in range(request.sampling.n)]
            for request, events in zip(requests(), told, strict=True)] == expected  # fmt: skip
    engine.close()


def test_a_prefix_is_found_again(mixed: EngineFile, expected: list[list[list[int]]]) -> None:
    """A prompt that goes on where another ended finds its last window."""
    runner = EngineRunner(mixed, threads=1)
    engine, first = Engine(runner), requests()[0]
    run(engine, first)
    events = run(engine, Request([*first.tokens, *expected[0][0]], greedy(max_tokens=1)))[0]
    assert events[-1].cached == 144 + 16, "all but what is not a whole block"
    engine.close()


@pytest.mark.parametrize("layers", ["windows", "kept"])
def test_how_many_blocks_a_long_prompt_holds(mixed: EngineFile, layers: str) -> None:
    """At most what its window, a chunk and both ends touch; without windows all of it."""
    runner = keeping(mixed) if layers == "kept" else EngineRunner(mixed, threads=1)
    engine, held = Engine(runner), list[list[int]]()
    engine.submit(Request(PROMPT[:190].tolist(), greedy(max_tokens=50, ignore_eos=True)), lambda event: None)
    while engine.step() or engine._posted:
        held.append([pool.blocks - pool.free for pool in engine.scheduler.cache.pools])
    whole, window = (max(counts) for counts in zip(*held, strict=True))
    most = -(-(runner.kinds[1].window + runner.token_budget) // 16) + 1
    assert whole == 15 and (window <= most < whole if layers == "windows" else window == 15)
    engine.close()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2, 0.05])
def test_how_memory_is_divided(mixed: EngineFile, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is used, windows have no more than sequences can hold, and the longest request that the others
    hold runs."""
    with closing(EngineRunner(mixed, threads=1, alike=True)) as alike:
        spare = int(alike.memory["cache"] * share)
        assert alike.kinds[0].blocks == alike.kinds[1].blocks == 45
    monkeypatch.setattr(ingot.llm.runner, "spare_memory", lambda *_: spare)
    runner = EngineRunner(mixed, threads=1)
    first, second = runner.kinds
    most = 3 * (-(-second.window // 16) + 2) + 2
    assert first.blocks == 45 or runner._cache_bytes(first.blocks + 1) > spare >= runner.memory["cache"]
    assert second.blocks == min(first.blocks, most) and runner.memory["cache"] == runner._cache_bytes(first.blocks)
    engine = Engine(runner)
    assert engine.longest == min(240, first.blocks * 16)
    told = run(engine, *[Request(PROMPT[: engine.longest - 1][: 190 - n].tolist(),
                                 greedy(max_tokens=engine.longest, ignore_eos=True)) for n in range(2)])  # fmt: skip
    assert len(tokens(told[0])) == engine.longest - min(engine.longest - 1, 190)
    assert f"; {second.blocks} more those of layers that see {second.window}" in _held_by(runner)
    engine.close()


def test_what_does_not_fit_is_refused(mixed: EngineFile, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(EngineRunner(mixed, threads=1)) as runner:
        batch, blocks = batch_of(runner, [(0, 0, TOKENS[:2])]), runner.kinds[1].blocks
        for slots in (np.zeros((3, 2), np.int32), np.zeros((2, 3), np.int32)):
            with pytest.raises(InputError, match="do not fit 2 tokens and 2 kinds of layers"):
                runner.step(replace(batch, slots=slots))
        with pytest.raises(InputError, match=f"tables.1 must be within 0 and {blocks - 1}"):
            runner.step(replace(batch, tables=np.full((1, 1), blocks, np.int32)))
        with pytest.raises(ConfigError, match=f"has {blocks} blocks where the model has 45"):
            Engine(runner, options=EngineOptions(drafts=2), draft=runner)
    monkeypatch.setattr(ingot.llm.runner, "free_memory", lambda *_: 1000)
    with pytest.raises(DeviceError, match=r"20 and 1\d blocks of 16 tokens"):
        EngineRunner(mixed, threads=1, blocks=20)


def test_engines_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose layers share blocks run as they did; what this Ingot does not know is refused."""
    folder = written(tmp_path, "gemma2")
    new = build_llm(folder, LONG)
    monkeypatch.setattr(ingot.llm.decoder, "KINDS", 1)
    made = build_llm(folder, LONG)
    facts = {key: value for key, value in made.details["llm"].items() if key not in ("windows", "kinds")}
    old = replace(made, details={"llm": {**facts, "window": 0}})
    assert facts["form"] == 1 and "tables.1" not in [spec.name for spec in old.inputs]
    before, after = (answers(Engine(EngineRunner(engine, threads=1)), *requests()) for engine in (old, new))
    assert before == after
    with pytest.raises(EngineError, match="no language model of this Ingot"):
        EngineRunner(replace(new, details={"llm": {**new.details["llm"], "form": 3}}))


def test_the_build_tells_what_windows_hold(mixed: EngineFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 bytes, two groups of 12 or 16, keys and values, of three layers; those with windows beside."""
    monkeypatch.setattr(commands_build, "last_log", lambda: SimpleNamespace(seconds={}))
    mixed.save(path := tmp_path / "model.engine")
    facts = mixed.details["llm"]
    layer, windows = 16 * facts["depth"] / 1024, facts["kinds"].count(1)
    assert (f"keys and values {3 * layer:.1f} KiB a token, of them {windows * layer:.1f} within windows of "
            f"{facts['windows'][1]}") in commands_build.as_text(mixed, path)  # fmt: skip


def test_ranks_have_the_same_blocks(tmp_path: Path) -> None:
    folder = written(tmp_path, "gemma3_text")
    expected = answers(Engine(EngineRunner(build_llm(folder, LONG), threads=1)), *requests())
    engine = Engine(local_ranks(build_ranks(folder, replace(LONG, ranks=2)), 40))
    assert [kind.blocks for kind in engine.runner.kinds] == [40, 14]
    assert answers(engine, *requests()) == expected


@dataclass
class Driver:
    """As much of a GPU's context as pools ask for."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    places: Iterator[int] = field(default_factory=lambda: iter(range(1000, 9000, 1000)))

    def allocate(self, size: int, purpose: str) -> SimpleNamespace:
        self.calls.append(("allocate", size))
        return SimpleNamespace(address=next(self.places))

    def call(self, *call: Any) -> None:
        self.calls.append(call)

    def activate(self) -> None:
        """Nothing."""


def test_pools_of_a_gpu_differ_by_kind() -> None:
    """Layers 0 and 2 have four blocks, layer 1 has ten; a copy is made in the layers of its kind."""
    driver, kept = Driver(), dict[str, Any]()
    session: Any = SimpleNamespace(context=driver, keep=kept.update)
    pools = DevicePools(session, [1, 0, 1], [(10, 2, 1, 8), (4, 2, 1, 8)], "bfloat16")
    assert kept == {"cache.0": (1000, (4, 2, 1, 8)), "cache.1": (2000, (10, 2, 1, 8)), "cache.2": (3000, (4, 2, 1, 8))}
    assert pools.nbytes == (4 + 10 + 4) * 32 and [c[1] for c in driver.calls[:3]] == [128, 320, 128]
    driver.calls.clear()
    pools.copy([(1, 2, 3), (0, 9, 0)])
    assert [call for call in driver.calls if call[0] == "cuMemcpyDtoD"] == [
        ("cuMemcpyDtoD", 1000 + 3 * 32, 1000 + 2 * 32, 32), ("cuMemcpyDtoD", 3000 + 3 * 32, 3000 + 2 * 32, 32),
        ("cuMemcpyDtoD", 2000, 2000 + 9 * 32, 32),
    ]  # fmt: skip

"""Language models on a GPU, by Triton's interpreter: the same tokens as the CPU's engines give."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.llm.batch import Batch, Kind, Wanted
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.engine import Engine
from ingot.llm.request import Event, Request, Sampling
from ingot.llm.runner import EngineRunner
from tests.llm import interpreted
from tests.llm.checkpoints import LOGITS, TOKENS, write_family
from tests.llm.test_engine import run, tokens
from tests.llm.test_families import batch_of
from tests.llm.test_window import spoil

OPTIONS = BuildOptions(target="cuda:sm_90", context=64, token_budget=48, sequence_budget=4, level=0)
WITHIN = {"fp32": 5e-4, "fp8": 0.8, "fp8_cache": 0.8}  # of logits, whose spread is about 3


@pytest.mark.parametrize(("family", "precision"), [
    ("gemma2", "fp32"), ("qwen3", "fp8_cache"), ("qwen3_moe", "fp32"), ("mixtral", "fp8"),
])  # fmt: skip
def test_a_family_gives_its_logits(
    family: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted.use(monkeypatch)
    runner = EngineRunner(build_llm(write_family(tmp_path, family), replace(OPTIONS, precision=precision)), alike=True)
    with np.load(LOGITS) as known:
        expected = known[family]
    prompt = runner.step(batch_of(runner, [(2, 0, TOKENS[:3])]))
    mixed = runner.step(batch_of(runner, [(1, 0, TOKENS[:1]), (2, 3, TOKENS[3:5])]))[1:]
    batch = batch_of(runner, [(2, 5, TOKENS[5:6])])
    found = np.concatenate([prompt, mixed])
    assert np.abs(found - expected[:5]).max() < WITHIN[precision]
    gap = expected[5] - expected[5].max()
    assert gap[runner.choose(batch)[0]] > -WITHIN[precision]


def test_steps_behind_one_another_give_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that the host has not seen go from a step to the next; a runner that is waited for says the same."""
    interpreted.use(monkeypatch)
    made = build_llm(write_family(tmp_path, "llama"), OPTIONS)
    requests = [Request([int(token) for token in TOKENS[:length]], Sampling(temperature=heat, seed=7, max_tokens=4))
                for length, heat in ((3, 0.0), (1, 1.0))]  # fmt: skip
    told = []
    for ahead in (False, True):
        runner = EngineRunner(made)
        runner.ahead, begin, carried = ahead, runner.begin, list[int]()

        def watched(batch: Batch, *wanted: Wanted, begin: Any = begin, carried: list[int] = carried) -> Any:
            carried.append(len(batch.carried))
            return begin(batch, *wanted)

        monkeypatch.setattr(runner, "begin", watched)
        told.append([tokens(events) for events in run(Engine(runner), *requests)])
        assert carried == ([0, 2, 2, 2] if ahead else [0] * 4)
    assert told[0] == told[1] and len(told[0][0]) == len(told[0][1]) == 4


def test_kinds_of_layers_have_blocks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is longer than a window and a block beside a short one: what layers with the window gave back holds
    no numbers when the next step reads; the tokens are a CPU's."""
    folder = write_family(tmp_path, "gemma2", sliding_window=4)
    asked = Sampling(temperature=1.0, seed=3, max_tokens=3, ignore_eos=True)
    requests = [Request(TOKENS[at:end].tolist(), asked) for at, end in ((0, 19), (5, 7))]
    cpu = EngineRunner(build_llm(folder, replace(OPTIONS, target="cpu", verify=False)))
    expected = [tokens(events) for events in run(Engine(cpu), *requests)]
    interpreted.use(monkeypatch)
    runner = EngineRunner(build_llm(folder, replace(OPTIONS, verify=False)))
    runner.ahead = True
    assert runner.kinds == (Kind(16), Kind(15, 4)) and "tables.1" in [spec.name for spec in runner.engine.inputs]
    engine, told, free = Engine(runner), [list[Event](), list[Event]()], list[list[int]]()
    for request, events in zip(requests, told, strict=True):
        engine.submit(request, events.append)
    while engine.step() or engine._posted:
        spoil(engine, runner)
        free.append([pool.free for pool in engine.scheduler.cache.pools])
    assert [tokens(events) for events in told] == expected
    assert [13, 12] in free and [13, 13] in free, "three blocks are held, then one less by the layers with the window"


@pytest.mark.parametrize(("name", "ranks"), [("llama_tiny", 1), ("llama_tiny", 2), ("moe_tiny", 1)])
def test_a_random_engine_is_a_file(name: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What benchmarks.llm_cuda opens on a GPU: every matrix has a place of its own, the rest is there."""
    from benchmarks import llm_cuda_engine as random_engine

    interpreted.use(monkeypatch)
    monkeypatch.setattr(random_engine, "filler", lambda: ("", 0, 0))
    random_engine.main(["--folder", str(tmp_path), "--shapes", name, "--precisions", "fp8", "--context", "64",
                        "--token-budget", "32", "--sequence-budget", "2", "--ranks", str(ranks)])  # fmt: skip
    held = json.loads((tmp_path / random_engine.name_of(name, "fp8", ranks)).read_text())
    shape = random_engine.SHAPES[name]
    outputs = shape.layers * shape.hidden * shape.heads * shape.depth // ranks
    small = outputs if outputs // shape.layers < 1 << 16 else 0  # lies with what is written as it is
    assert sum(size for _, size, kind in held["matrices"] if kind == "float8_e4m3fn") == shape.every // ranks - small
    assert (held["facts"]["ranks"], held["facts"]["groups"]) == (ranks, shape.groups // ranks)
    places = sorted((offset, offset + size) for offset, size, _ in held["matrices"])
    assert all(end <= start for (_, end), (start, _) in pairwise(places)) and places[-1][1] <= held["size"]
    assert {spec.name for spec in random_engine._specs(held["outputs"])} == {"logits", "chosen", "hidden", "likely"}

"""Keys and values of eight bits: half the cache, nearly the same text, the same whatever runs beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ingot.errors import BuildError, ConfigError, VerificationFailed
from ingot.llm.build import BuildOptions, build_llm
from ingot.llm.commands import main
from ingot.llm.engine import Engine
from ingot.llm.request import Request, Sampling
from ingot.llm.runner import EngineRunner
from tests.llm.checkpoints import LOGITS, TOKENS, write_family
from tests.llm.test_engine import run, tokens
from tests.llm.test_families import batch_of

SMALL = BuildOptions(context=64, token_budget=48, sequence_budget=3, level=0, kv="int8")


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_logits_are_near(family: str, tmp_path: Path) -> None:
    """In a chunk, and token by token: what was written is read again."""
    runner = EngineRunner(build_llm(write_family(tmp_path, family), SMALL), threads=1, alike=True)
    with np.load(LOGITS) as known:
        expected = known[family]
    whole = runner.step(batch_of(runner, [(0, 0, TOKENS)]))
    assert 0 < np.sqrt(np.mean((whole - expected) ** 2)) < 0.03 * expected.std()
    first = runner.step(batch_of(runner, [(1, 0, TOKENS[:17]), (2, 0, TOKENS[3:9])]))[:17]
    rest = [runner.step(batch_of(runner, [(1, place, TOKENS[place : place + 1])])) for place in range(17, 40)]
    assert np.abs(np.concatenate([first, *rest]) - whole).max() < 1e-3 * expected.std()
    runner.close()


def test_the_cache_is_smaller(tmp_path: Path) -> None:
    folder, sizes = write_family(tmp_path, "qwen3"), {}
    for kv in ("fp32", "bf16", "int8"):
        runner = EngineRunner(build_llm(folder, replace(SMALL, kv=kv, verify=False)), threads=1, blocks=6)
        sizes[kv] = runner.memory["cache"]
        runner.close()
    tokens_kept = 6 * 16 * 3 * 2 * 2  # of three layers, two groups, keys and values
    assert sizes == {"fp32": tokens_kept * 64, "bf16": tokens_kept * 32, "int8": tokens_kept * 20}


def test_an_answer_is_the_same_in_any_company(tmp_path: Path) -> None:
    made = build_llm(write_family(tmp_path, "qwen3"), replace(SMALL, verify=False))
    requests = [Request(TOKENS[:length].tolist(), Sampling(temperature=0.0, max_tokens=20, n=count, ignore_eos=True))
                for length, count in ((20, 1), (9, 2), (20, 1), (3, 1))]  # fmt: skip
    alone = []
    for request in requests:
        engine = Engine(EngineRunner(made, threads=1))
        alone.append(tokens(run(engine, request)[0]))
        engine.close()
    engine = Engine(EngineRunner(made, threads=1, blocks=8))
    assert [tokens(events) for events in run(engine, *requests)] == alone
    assert engine.scheduler.cache.found, "a prefix was taken over"
    engine.close()


def test_the_rise_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_family(tmp_path / "model", "qwen3")
    np.save(tmp_path / "text.npy", TOKENS)
    words = ["build", str(folder), "-o", str(tmp_path / "x.engine"), "--quiet", "--level", "0", "--context", "64",
             "--kv", "int8", "--text", str(tmp_path / "text.npy")]  # fmt: skip
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "keys and values 0.2 KiB a token" in said and "mean negative log-likelihood" in said
    with pytest.raises(VerificationFailed, match=r"rises from .* more than --max-rise -1"):
        main([*words, "--max-rise", "-1"])


def test_other_types_are_refused(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "qwen3")
    with pytest.raises(ConfigError, match="cannot be kept as 'int4'; use one of fp32, bf16, int8"):
        build_llm(folder, replace(SMALL, kv="int4"))
    with pytest.raises(ConfigError, match="kept as int8 on a GPU where precision is bf16: leave --kv out"):
        replace(SMALL, target="cuda:sm_90", precision="bf16")


def test_a_step_without_a_native_form_is_named(tmp_path: Path) -> None:
    """The first one, and what may be done: an option that nobody checked beforehand."""
    options = replace(SMALL, kv=None, verify=False)
    object.__setattr__(options, "precision", "fp8")
    with pytest.raises(BuildError, match=r"no native form on cpu; host step: .*: no cpu kernel takes .* more\)\. Take"):
        build_llm(write_family(tmp_path, "qwen3"), options)

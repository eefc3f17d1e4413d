"""Requests that draw by chance beside greedy ones on one GPU: the time of a step, random weights.

    python -m benchmarks.llm_cuda_engine --folder build/llm_cuda --precisions fp8_cache --context 2304  # anywhere
    python -m benchmarks.llm_cuda_draw --folder build/llm_cuda --precision fp8_cache [--out result.json]

Kinds take turns in one run. "host" draws the usual way from logits that are copied to the host; "logprobs" tells five
likeliest tokens beside the usual ones, and these are compared with what the host says. Steps are waited for
one by one; answers come from the engine that serves, which prepares a step while the one before is computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llm_cuda import Sequences
from benchmarks.llm_cuda_engine import SHAPES, opened
from ingot.ir.ops_likely import likely
from ingot.ir.ops_sample import sample
from ingot.llm.batch import Batch, Integers, Wanted
from ingot.llm.engine import Engine
from ingot.llm.options import EngineOptions
from ingot.llm.request import Event, Request, Sampling
from ingot.llm.runner import EngineRunner
from ingot.llm.sampling import Drawing, asked_of, draw
from ingot.runtime import cuda

WANTED = 1.02  # of a greedy step's time
USUAL = Sampling(temperature=0.7, top_p=0.9, seed=1)
KINDS: Mapping[str, Sampling] = {
    "greedy": Sampling(temperature=0),
    "usual": USUAL,
    "top_k": replace(USUAL, top_k=50),
    "penalties": replace(USUAL, presence_penalty=0.5, frequency_penalty=0.3),
    "logprobs": replace(USUAL, logprobs=5),
}
_WAITED = ("usual", "top_k", "logprobs")  # that must be as fast
_SAID = 200  # tokens that penalties find in an answer
_BEFORE = 512  # tokens of every sequence
_COMPARED = 64  # answers at once, at most, that the host draws too


class Kind:
    """A runner that draws a batch's rows in one way, on the GPU or from logits that come to the host."""

    def __init__(self, runner: EngineRunner, sampling: Sampling, count: int, on_host: bool) -> None:
        self.runner, self.on_host = runner, on_host
        self.blocks, self.block_size = runner.blocks, runner.block_size
        self.drawings = [Drawing(sampling, seed, np.arange(8)) for seed in range(count)]
        for drawing in self.drawings:
            for token in range(_SAID if drawing.penalised else 0):
                drawing.accept(token * 7)

    def choose(self, batch: Batch) -> Integers:
        """The rows' tokens."""
        if self.on_host:
            drawn = draw(self.runner.step(batch), [(drawing, None) for drawing in self.drawings])
            return np.array([each.token for each in drawn], np.int32)
        asked = asked_of([(drawing, drawing.count, None) for drawing in self.drawings])
        wanted: tuple[Wanted, ...] = ("chosen", "likely") if len(asked["told"]) else ("chosen",)
        found: Integers = self.runner.begin(replace(batch, **asked), *wanted).result()["chosen"]
        return found


@dataclass
class Compared:
    """A runner whose tokens and words about them are compared with the host's, from the same logits."""

    runner: EngineRunner
    drawings: list[Drawing]
    wrong: int = 0

    @property
    def blocks(self) -> int:
        """The runner's."""
        return self.runner.blocks

    @property
    def block_size(self) -> int:
        """The runner's."""
        return self.runner.block_size

    def choose(self, batch: Batch) -> Integers:
        """The rows' tokens."""
        asked = asked_of([(drawing, drawing.count, None) for drawing in self.drawings])
        found = self.runner.begin(replace(batch, **asked), "chosen", "likely", "logits").result()
        tokens = sample(found["logits"], asked["draws"], asked["edits"], asked["masks"])
        words = likely(found["logits"], tokens, asked["told"])
        self.wrong += int((tokens != found["chosen"]).sum() + (words != found["likely"]).any(1).sum())
        return np.asarray(tokens)


def wrong(runner: EngineRunner, count: int) -> int:
    """Of two steps' rows how many have another token, or other words about its probability, than the host finds."""
    compared = Compared(runner, [Drawing(KINDS["logprobs"], seed, np.arange(8)) for seed in range(count)])
    sequences = Sequences(compared, count, 64)  # type: ignore[arg-type]
    tokens = np.ones((count, 1), np.int32)
    for _ in range(2):
        tokens = sequences.step(tokens).astype(np.int32)[:, None]
    return compared.wrong


def steps(runner: EngineRunner, count: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of steps of `count` sequences, by kind."""
    kinds = {name: Kind(runner, sampling, count, False) for name, sampling in KINDS.items()}
    kinds["host"] = Kind(runner, USUAL, count, True)
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, kind in kinds.items():
            sequences = Sequences(kind, count, _BEFORE + 16)  # type: ignore[arg-type]
            sequences.length, tokens = _BEFORE, np.ones((count, 1), np.int32)
            for _ in range(2 if name == "host" else 8):
                start = time.perf_counter()
                tokens = sequences.step(tokens).astype(np.int32)[:, None]
                found[name] += [1e3 * (time.perf_counter() - start)] if number else []
                for drawing in kind.drawings:
                    drawing.count += 1
    return found


def answers(runner: EngineRunner, sampling: Sampling, count: int, length: int) -> float:
    """Milliseconds of a step of the engine that serves, of so many answers at once."""
    engine, times, told = Engine(runner, None, EngineOptions(requests=count, interval=1e3)), list[float](), _Told()
    asked = replace(sampling, max_tokens=length, ignore_eos=True)
    for number in range(count):
        prompt = tuple(np.random.default_rng(number).integers(0, runner.vocabulary, 64).tolist())
        engine.submit(Request(prompt, replace(asked, seed=number)), told)
    while engine.step():
        times.append(time.perf_counter())
    assert told.tokens == count * length, "tokens are missing"
    return 1e3 * statistics.median(np.diff(times[len(times) // 4 :]))


class _Told:
    """Counts tokens; whatever fails, fails here."""

    tokens = 0

    def __call__(self, event: Event) -> None:
        assert not event.error, event.error
        self.tokens += len(event.tokens)


def row_of(runner: EngineRunner, count: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Everything about steps of `count` answers."""
    waited = {name: statistics.median(times) for name, times in steps(runner, count, asked.rounds).items()}
    engine: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(asked.answers):
        for name, sampling in KINDS.items():
            engine[name].append(answers(runner, sampling, count, asked.length))
    served = {name: min(times) for name, times in engine.items() if times}
    return {"answers": count, "wrong": wrong(runner, min(count, _COMPARED)),
            "step ms": waited, "engine's step ms": served,
            "beside greedy": {name: waited[name] / waited["greedy"] for name in waited},
            "engine's beside greedy": {name: served[name] / served["greedy"] for name in served}}  # fmt: skip


def shown(row: Mapping[str, Any]) -> str:
    """A row in words."""
    keys = ("step ms", "beside greedy", "engine's step ms", "engine's beside greedy")
    told = {key: ", ".join(f"{name} {value:.3f}" for name, value in row[key].items()) for key in keys}
    head = f"{row['answers']} answers, {row['wrong']} not as by the host"
    return "\n  ".join([head, *(f"{key}: {words}" for key, words in told.items())])


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/llm_cuda"))
    parser.add_argument("--shape", default="llama_8b", choices=sorted(SHAPES))
    parser.add_argument("--precision", default="fp8_cache")
    parser.add_argument("--together", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--rounds", type=int, default=6, help="of steps that are waited for, 8 of each kind")
    parser.add_argument("--answers", type=int, default=2, help="rounds of answers by the engine")
    parser.add_argument("--length", type=int, default=64, help="tokens of such an answer")
    parser.add_argument("--blocks", type=int, default=24000)
    parser.add_argument("--out", type=Path, help="JSON to write")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """0 where drawing costs no more than is allowed."""
    asked, device = parsed(words), cuda.select("cuda")
    runner = EngineRunner(opened(asked.folder / f"{asked.shape}_{asked.precision}.json", device), blocks=asked.blocks)
    rows = []
    for count in asked.together:
        rows.append(row_of(runner, count, asked))
        print(shown(rows[-1]), flush=True)
    runner.close()
    if asked.out:
        found = {"device": str(device), "shape": asked.shape, "precision": asked.precision, "rows": rows}
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(row["wrong"] or row["beside greedy"][name] > WANTED for row in rows for name in _WAITED))


if __name__ == "__main__":
    raise SystemExit(main())

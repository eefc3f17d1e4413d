"""Many requests at once on one GPU, by the engine that serves: prompts and answers of equal length, random weights.

    python -m benchmarks.llm_cuda_engine --folder build/llm_cuda --precisions fp8_cache --context 2304  # anywhere
    python -m benchmarks.llm_cuda_offline --folder build/llm_cuda --precision fp8_cache [--out result.json]

Output tokens a second are those of the whole run, from the first request to the last token. With --seconds the run is
ended there, and the rate is that of what was answered until then. --waiting: no step is begun before the one before has
ended, as on a runner that cannot; what its clients are told must be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llm_cuda_engine import SHAPES, opened
from ingot.llm.batch import Batch, Wanted
from ingot.llm.engine import Engine
from ingot.llm.options import EngineOptions
from ingot.llm.request import Event, Request, Sampling
from ingot.llm.runner import EngineRunner, Stepping
from ingot.runtime import cuda

WANTED = 12000.0  # output tokens a second, of 1,000 after 1,000


@dataclass(frozen=True)
class Noted:
    """A step: when its result was asked for and when it was there; its tokens and sequences."""

    asked: float
    ended: float
    tokens: int
    sequences: int


class Watched(EngineRunner):
    """Notes when steps end."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.steps: list[Noted] = []

    def begin(self, batch: Batch, *wanted: Wanted) -> Stepping:
        """As it is."""
        begun = super().begin(batch, *wanted)
        return Stepping(partial(self._result, begun, len(batch.token_ids), len(batch.lengths)))

    def _result(self, begun: Stepping, tokens: int, sequences: int) -> Mapping[str, Any]:
        asked = time.perf_counter()
        found = begun.result()
        self.steps.append(Noted(asked, time.perf_counter(), tokens, sequences))
        return found


class Counted:
    """What clients were told: tokens, ends."""

    def __init__(self, wanted: int) -> None:
        self.tokens = self.ended = self.digest = 0
        self.errors = list[str]()
        self.places = [0] * wanted
        self._wanted, self.done = wanted, threading.Event()

    def told(self, number: int, event: Event) -> None:
        """The client of request `number` is told."""
        self.tokens += len(event.tokens)
        for place, token in enumerate(event.tokens):
            self.digest ^= hash((number, self.places[number] + place, token))
        self.places[number] += len(event.tokens)
        if event.finish is not None:
            self.ended += 1
            self.errors += [event.error] if event.error else []
            if self.ended == self._wanted:
                self.done.set()


def run(runner: Watched, asked: argparse.Namespace) -> dict[str, Any]:
    """All requests at once; tokens a second, and where the time went."""
    rng, counted = np.random.default_rng(0), Counted(asked.requests)
    prompts = rng.integers(0, runner.vocabulary, (asked.requests, asked.input))
    sampling = Sampling(temperature=0, max_tokens=asked.output, ignore_eos=True)
    requests = [Request(tuple(prompt.tolist()), sampling) for prompt in prompts]
    engine = Engine(runner, None, EngineOptions(requests=asked.requests, interval=1e3))
    begin = time.perf_counter()
    for number, request in enumerate(requests):
        engine.submit(request, partial(counted.told, number))
    engine.start()  # behind them, so that every run has the same steps
    whole = counted.done.wait(asked.seconds)
    seconds, tokens = time.perf_counter() - begin, counted.tokens
    steps = list(runner.steps)
    engine.close()
    assert not counted.errors, counted.errors[0]
    return {
        "requests": asked.requests, "input": asked.input, "output": asked.output, "ended": whole, "seconds": seconds,
        "output tokens": tokens, "output tokens/s": tokens / seconds, "ahead": runner.ahead,
        "digest of the answers": counted.digest, **shares(begin, steps, asked.requests),
    }  # fmt: skip


def shares(begin: float, steps: Sequence[Noted], requests: int) -> dict[str, Any]:
    """How long steps took, from the end of one to the end of the next: those of prompts, those of all answers. How long
    the host waited for one that was under way: what its own work could still grow by."""
    ends = [begin, *(step.ended for step in steps)]
    lasting = [(step, end - before) for step, (before, end) in zip(steps, pairwise(ends), strict=True)]
    answers = [(step, seconds) for step, seconds in lasting if step.tokens == step.sequences == requests]
    prompts = [(step, seconds) for step, seconds in lasting if step.tokens > 2 * requests]
    tenth = max(len(answers) // 10, 1)

    def typical(times: Sequence[float]) -> float:
        return 1e3 * statistics.median(times or [0.0])

    return {
        "steps": len(steps), "prompt steps": len(prompts), "prompts' seconds": sum(s for _, s in prompts),
        "prompt tokens/s": sum(step.tokens for step, _ in prompts) / max(sum(s for _, s in prompts), 1e-9),
        "first answers' step ms": typical([s for _, s in answers[:tenth]]),
        "last answers' step ms": typical([s for _, s in answers[-tenth:]]),
        "answers' seconds": sum(s for _, s in answers),
        "host waits ms": typical([step.ended - step.asked for step, _ in answers]),
    }  # fmt: skip


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/llm_cuda"))
    parser.add_argument("--shape", default="llama_8b", choices=sorted(SHAPES))
    parser.add_argument("--precision", default="fp8_cache")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--input", type=int, default=1000)
    parser.add_argument("--output", type=int, default=1000)
    parser.add_argument("--blocks", type=int, help="of keys and values; as many as fit unless said")
    parser.add_argument("--seconds", type=float, help="end the run then")
    parser.add_argument("--waiting", action="store_true", help="no step begins before the one before has ended")
    parser.add_argument("--out", type=Path, help="JSON to write")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """0 where the rate is what is wanted."""
    asked, device = parsed(words), cuda.select("cuda")
    runner = Watched(opened(asked.folder / f"{asked.shape}_{asked.precision}.json", device), blocks=asked.blocks)
    for size in (8192, asked.requests):  # kernels loaded, graphs captured
        runner.choose(_warm(size, runner))
    runner.steps.clear()
    runner.ahead = runner.ahead and not asked.waiting
    found = {"device": str(device), "shape": asked.shape, "precision": asked.precision, **run(runner, asked)}
    print(json.dumps(found), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(found["output tokens/s"] < WANTED)


def _warm(tokens: int, runner: EngineRunner) -> Batch:
    """One sequence's first tokens."""
    count = min(tokens, runner.token_budget, runner.context)
    places = np.arange(count, dtype=np.int32)
    table = np.arange(-(-count // runner.block_size), dtype=np.int32)[None]
    ends = np.array([0, count], np.int32)
    return Batch(places % 7, places, places, ends, ends[1:], table, ends[1:] - 1)


if __name__ == "__main__":
    raise SystemExit(main())

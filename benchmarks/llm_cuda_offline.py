"""Many requests at once on one GPU, by the engine that serves: prompts and answers of equal length, random weights.

    python -m benchmarks.llm_cuda_engine --folder build/llm_cuda --precisions fp8_cache --context 2304  # anywhere
    python -m benchmarks.llm_cuda_offline --folder build/llm_cuda --precision fp8_cache [--out result.json]

Output tokens a second are those of the whole run, from the first request to the last token. With --seconds the run is
ended there, and the rate is that of what was answered until then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llm_cuda_engine import SHAPES, opened
from ingot.llm.batch import Batch, Integers
from ingot.llm.engine import Engine, EngineOptions
from ingot.llm.request import Event, Request, Sampling
from ingot.llm.runner import EngineRunner
from ingot.runtime import cuda

WANTED = 12000.0  # output tokens a second, of 1,000 after 1,000


class Watched(EngineRunner):
    """Notes when steps begin and end."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.steps: list[tuple[float, float, int, int]] = []  # begin, end, tokens, sequences

    def choose(self, batch: Batch) -> Integers:
        """The likeliest tokens."""
        begin = time.perf_counter()
        chosen = super().choose(batch)
        self.steps.append((begin, time.perf_counter(), len(batch.token_ids), len(batch.lengths)))
        return chosen


class Counted:
    """What clients were told: tokens, ends."""

    def __init__(self, wanted: int) -> None:
        self.tokens = self.ended = 0
        self.errors = list[str]()
        self._wanted, self.done = wanted, threading.Event()

    def __call__(self, event: Event) -> None:
        self.tokens += len(event.tokens)
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
    engine.start()
    begin = time.perf_counter()
    for request in requests:
        engine.submit(request, counted)
    whole = counted.done.wait(asked.seconds)
    seconds, tokens = time.perf_counter() - begin, counted.tokens
    steps = list(runner.steps)
    engine.close()
    assert not counted.errors, counted.errors[0]
    return {
        "requests": asked.requests, "input": asked.input, "output": asked.output, "ended": whole, "seconds": seconds,
        "output tokens": tokens, "output tokens/s": tokens / seconds, **shares(steps, asked.requests),
    }  # fmt: skip


def shares(steps: Sequence[tuple[float, float, int, int]], requests: int) -> dict[str, Any]:
    """Of the steps: how long those of prompts took, those of all answers, and what lay between steps."""
    answers = [step for step in steps if step[2] == step[3] == requests]
    prompts = [step for step in steps if step[2] > 2 * requests]
    between = [b[0] - a[1] for a, b in pairwise(steps)]

    def lasting(some: Sequence[tuple[float, float, int, int]]) -> list[float]:
        return [1e3 * (end - begin) for begin, end, _, _ in some] or [0.0]

    tenth = max(len(answers) // 10, 1)
    return {
        "steps": len(steps), "prompt steps": len(prompts), "prompt tokens/s":
        sum(s[2] for s in prompts) / max(sum(s[1] - s[0] for s in prompts), 1e-9),
        "first answers' step ms": statistics.median(lasting(answers[:tenth])),
        "last answers' step ms": statistics.median(lasting(answers[-tenth:])),
        "between steps ms": 1e3 * statistics.median(between or [0.0]),
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
    parser.add_argument("--out", type=Path, help="JSON to write")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """0 where the rate is what is wanted."""
    asked, device = parsed(words), cuda.select("cuda")
    runner = Watched(opened(asked.folder / f"{asked.shape}_{asked.precision}.json", device), blocks=asked.blocks)
    for size in (8192, asked.requests):  # kernels loaded, graphs captured
        runner.choose(_warm(size, runner))
    runner.steps.clear()
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

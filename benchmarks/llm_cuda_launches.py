"""What each launch of a decode step costs within the step's graph, where launches overlap, and alone.

    python -m benchmarks.llm_cuda_engine --folder build/llm_cuda --precisions fp8       # anywhere
    python -m benchmarks.llm_cuda_launches build/llm_cuda/llama_8b_fp8.json [--out FILE]  # on a GPU

Within: by how many microseconds a step, in a graph of some, is shorter without the launches of that name. Alone: by
events between the launches, which cost some 1.3 microseconds themselves. A step of a graph of one is longer than one of
several by what lies between two graphs. Drawn: the same with the launches for steps that draw. Tokens are compared with
numpy's of the same logits.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.llm_cuda import Sequences, answering
from benchmarks.llm_cuda_engine import opened
from ingot.ir.ops_sample import DRAW, sample
from ingot.llm.batch import Batch
from ingot.llm.runner import EngineRunner
from ingot.plan.plan import GraphSegment, Launch
from ingot.runtime import cuda
from ingot.runtime.cuda_executor import CudaFrame

PROMPT, STEPS, ROUNDS = 512, 3, 8


def kind_of(name: str) -> str:
    """Steps of all layers are of one kind."""
    return re.sub(r"layers\.\d+\.", "", name)


class Step:
    """The frame of a step of one sequence, which has been run."""

    def __init__(self, runner: EngineRunner) -> None:
        sequences = Sequences(runner, 1, PROMPT + 8)
        sequences.length = PROMPT - 1
        for _ in range(2):
            sequences.step(np.ones((1, 1), np.int32))
        executor = runner.session._executor
        frame = next(reversed(executor._free.values()))[-1]
        assert isinstance(frame, CudaFrame)
        ((self.numbers, _),) = frame._graphs
        self.frame, segment = frame, frame.plan.segments[self.numbers[0]]
        assert isinstance(segment, GraphSegment) and len(self.numbers) == 1
        self.segment, self.kinds = segment, list(dict.fromkeys(kind_of(step.name) for step in segment.steps))

    def microseconds(self, steps: int, without: str = "") -> float:
        """Of a step, in a graph of so many; without the launches of a kind."""
        frame, context, put = self.frame, self.frame.context, self.frame._launches._put

        def some(launch: Launch, *rest: Any) -> None:
            if kind_of(self.segment.steps[launch.step].name) != without:
                put(launch, *rest)

        def enqueue() -> None:
            for _ in range(steps):
                frame._enqueue(self.numbers, capturing=True)

        with mock.patch.object(frame._launches, "_put", some):
            graph = context.capture(frame.stream, enqueue)
        begin, end, times = context.event(), context.event(), list[float]()
        for _ in range(4):
            context.call("cuEventRecord", begin, frame.stream)
            for _ in range(ROUNDS):
                context.call("cuGraphLaunch", graph, frame.stream)
            context.call("cuEventRecord", end, frame.stream)
            context.wait(frame.stream, "timing")
            times.append(1e3 * context.call("cuEventElapsedTime", begin, end) / ROUNDS / steps)
        context.call("cuGraphExecDestroy", graph)
        return min(times)

    def alone(self) -> dict[str, float]:
        """Microseconds of a kind, the best of some runs, all layers together."""
        found: dict[str, float] = defaultdict(float)
        for step, span in zip(self.segment.steps, self.frame.step_times(self.segment, 10), strict=True):
            found[kind_of(step.name)] += span
        return {name: round(span, 2) for name, span in found.items()}


def compared(runner: EngineRunner, counts: Sequence[int] = (1, 3, 8)) -> dict[str, bool]:
    """Whether tokens of so many rows are numpy's of the same logits, and those that draws say."""
    rng, found = np.random.default_rng(0), dict[str, bool]()
    for count in counts:
        draws = np.zeros((count, DRAW), np.int32)
        each = np.arange(count, dtype=np.int32)
        tokens = rng.integers(0, runner.vocabulary, count).astype(np.int32)
        starts = np.arange(count + 1, dtype=np.int32)
        slots, lengths = each * runner.block_size, np.ones(count, np.int32)
        batch = Batch(tokens, 0 * each, slots, starts, lengths, each[:, None], each, draws=draws)
        told = runner.begin(batch, "logits", "chosen").result()
        found[str(count)] = bool((told["chosen"] == sample(told["logits"], draws)).all())
        with mock.patch.object(runner, "_undrawn", False):
            found[f"{count} drawn"] = bool((runner.choose(batch) == told["chosen"]).all())
    return found


def measured(path: Path, device: cuda.Device, kinds: Sequence[str]) -> dict[str, Any]:
    """Of one engine."""
    runner = EngineRunner(opened(path, device), blocks=400)
    row: dict[str, Any] = {"as numpy": compared(runner), "tokens": answered(runner)}
    row["client ms"] = answering(runner, PROMPT, 128)["ms"]
    row |= times(Step(runner), kinds)
    with mock.patch.object(runner, "_undrawn", False):
        row["drawn"] = times(Step(runner), ["chosen"])
    runner.close()
    return row


def answered(runner: EngineRunner, count: int = 8) -> list[int]:
    """One after the other: engines of the same weights have the same ones."""
    sequences, chosen = Sequences(runner, 1, 64), [5]
    for _ in range(count):
        chosen.append(int(sequences.step(np.array([[chosen[-1]]], np.int32))[0]))
    return chosen[1:]


def times(step: Step, kinds: Sequence[str]) -> dict[str, Any]:
    """Of a step and its launches."""
    whole = [round(step.microseconds(count), 2) for count in (1, 2, STEPS)]
    within = {name: round(whole[-1] - step.microseconds(STEPS, name), 2) for name in kinds or step.kinds}
    return {"us of a step": whole, "alone": step.alone(), "within": within}


def main(words: Sequence[str] | None = None) -> int:
    """As the module says; 1 where a token is not numpy's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, nargs="+")
    parser.add_argument("--kinds", nargs="*", default=[], help="of launches that are left out in turn; all")
    parser.add_argument("--out", type=Path, help="JSON to write")
    given, found = parser.parse_args(words), dict[str, Any]()
    device = cuda.select("cuda")
    for path in given.engines:
        found[path.stem] = measured(path, device, given.kinds)
        print(path.stem, json.dumps(found[path.stem]), flush=True)
        if given.out:
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(not all(all(row["as numpy"].values()) for row in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())

"""Language models of random weights on one GPU: decoding beside the speed of its memory, a prefill beside its products.

    python -m benchmarks.llm_cuda_engine --folder build/llm_cuda        # anywhere
    python -m benchmarks.llm_cuda --folder build/llm_cuda --precisions bf16 fp8 [--out result.json]

Both ceilings are measured in the same run: a kernel that only reads, and torch's product of bfloat16. The time of a
token of one sequence is what the engine's client sees, from one to the next; beside it and of several sequences a whole
step of the runner, from the tokens on the host to the next ones there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llm_cuda_engine import SHAPES, Shape, opened
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.build import NAME, Unit
from ingot.kernels.cuda.compile import compile_unit
from ingot.llm.batch import Batch
from ingot.llm.engine import Engine
from ingot.llm.formats import FORMATS
from ingot.llm.request import Request, Sampling
from ingot.llm.runner import EngineRunner
from ingot.runtime import cuda
from ingot.runtime.cubins import Code
from ingot.runtime.session import Begun

WANTED = {"decode": 0.8, "prefill": 0.5}
READ = """
import triton
import triton.language as tl


@triton.jit
def KERNEL(words, sums):
    at = tl.program_id(0).to(tl.int64) * {block} + tl.arange(0, {block})
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(words + at, eviction_policy='evict_first'), 0))
"""
_READ_BYTES = 8 << 30


class Sequences:
    """`count` sequences of equal length in a runner's pools."""

    def __init__(self, runner: EngineRunner, count: int, most: int) -> None:
        self.runner, self.count, self.length = runner, count, 0
        width = -(-most // runner.block_size)
        assert count * width <= runner.blocks, "the pools are too small"
        self.tables = np.random.default_rng(0).permutation(count * width).astype(np.int32).reshape(count, width)

    def step(self, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The next tokens of all sequences, computed after `tokens` [count, any]."""
        count, each = tokens.shape
        places = np.tile(np.arange(self.length, self.length + each), (count, 1))
        size = self.runner.block_size
        slots = np.take_along_axis(self.tables, places // size, 1) * size + places % size
        self.length += each
        starts = np.arange(count + 1) * each
        parts = (tokens.reshape(-1), places.reshape(-1), slots.reshape(-1), starts, np.full(count, self.length),
                 self.tables[:, : -(-self.length // size)], starts[1:] - 1)  # fmt: skip
        return self.runner.choose(Batch(*(np.asarray(part, np.int32) for part in parts)))


def decoding(runner: EngineRunner, count: int, prompt: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a step in which `count` sequences of about `prompt` tokens get one more."""
    sequences = Sequences(runner, count, prompt + steps + 8)
    sequences.length = prompt - 1  # what is there are zeros: the time does not depend on it
    tokens, times = _any_tokens(runner, count, 1), []
    for number in range(steps + 5):
        start = time.perf_counter()
        tokens = sequences.step(tokens).astype(np.int32)[:, None]
        if number >= 5:
            times.append((time.perf_counter() - start) * 1e3)
    return {"sequences": count, "context": prompt, "ms": statistics.median(times), "best ms": min(times)}


def _any_tokens(runner: EngineRunner, count: int, each: int) -> np.ndarray[Any, Any]:
    """Other ones for each sequence: those of different tokens choose different experts."""
    return np.random.default_rng(2).integers(0, runner.vocabulary, (count, each)).astype(np.int32)


def answering(runner: EngineRunner, prompt: int, steps: int) -> dict[str, Any]:
    """Milliseconds from one token of the only answer to the next, as the engine tells them."""
    times = list[float]()
    asked = Request(tuple(range(1, prompt + 1)), Sampling(temperature=0, max_tokens=steps + 5, ignore_eos=True))
    engine = Engine(runner, None)
    engine.submit(asked, lambda event: times.append(time.perf_counter()))
    while engine.step():
        pass
    taken = [1e3 * (after - before) for before, after in pairwise(times[4:])]
    return {"sequences": 1, "context": prompt, "ms": statistics.median(taken), "best ms": min(taken)}


def prefill(runner: EngineRunner, tokens: int, rounds: int = 3) -> dict[str, Any]:
    """Milliseconds of one step that computes a prompt."""
    prompt = np.random.default_rng(1).integers(0, runner.vocabulary, (1, tokens))
    times = []
    for _ in range(rounds + 1):
        sequences = Sequences(runner, 1, tokens)
        start = time.perf_counter()
        sequences.step(prompt)
        times.append((time.perf_counter() - start) * 1e3)
    return {"tokens": tokens, "ms": statistics.median(times[1:]), "first ms": times[0]}


def reading(device: cuda.Device) -> float:
    """Bytes a second that a kernel reads."""
    context = cuda.context_of(device)
    memory, stream = context.allocate(_READ_BYTES, "reading"), context.stream()
    context.call("cuMemsetD32Async", memory.address, 0x3F9D70A4, _READ_BYTES // 4, stream)
    best = 0.0
    for block, warps in ((8192, 8), (16384, 8), (4096, 4)):
        unit = Unit(READ.format(block=block).lstrip(), (("words", "*i32"), ("sums", "*i32")), (), warps, 1)
        made = compile_unit(unit, architecture(f"sm_{device.capability}").name)
        kernels = cuda.Kernels(context, {"read": Code(made.code, NAME, made.threads, made.shared, False)})
        blocks = _READ_BYTES // 4 // block
        sums = context.allocate(blocks * 4, "sums")
        arguments = ((memory.address, sums.address, 0, 0), (ctypes.c_void_p,) * 4)
        launch = lambda k=kernels, b=blocks, a=arguments: k.launch("read", (b, 1, 1), a, stream)  # noqa: E731
        best = max(best, _READ_BYTES / seconds(context, stream, launch))
        sums.release()
    memory.release()
    return best


def seconds(context: cuda.Context, stream: Any, launch: Callable[[], None], runs: int = 8) -> float:
    """Of one launch, by events; the best of some."""
    begin, end, times = context.event(), context.event(), []
    for _ in range(runs):
        context.call("cuEventRecord", begin, stream)
        launch()
        context.call("cuEventRecord", end, stream)
        context.wait(stream, "timing")
        times.append(context.call("cuEventElapsedTime", begin, end) / 1e3)
    return float(min(times))


def products() -> float:
    """Operations a second of torch's product of bfloat16, 8192 each way."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            torch.matmul(a, b)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 4)
    del a, b
    torch.cuda.empty_cache()
    return float(2 * 8192**3 / statistics.median(times[2:]))


def profiled(runner: EngineRunner, tokens: int, context: int, count: int = 1) -> dict[str, list[float]]:
    """[microseconds of all, how many] of the parts of a step of `count` sequences, layers together."""
    sequences = Sequences(runner, count, context + tokens)
    sequences.length = context
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    feeds: dict[str, Any] = {}
    begin = runner.session.begin

    def kept(given: Mapping[str, Any], *rest: Any) -> Begun:
        feeds.update(given)
        return begin(given, *rest)

    runner.session.begin = kept  # type: ignore[method-assign, assignment]
    sequences.step(_any_tokens(runner, count, tokens))
    runner.session.begin = begin  # type: ignore[method-assign]
    for step in runner.session.profile(feeds):
        entry = found[re.sub(r"layers\.\d+\.", "", step.name)]
        entry[0] += step.microseconds
        entry[1] += 1
    return {name: [round(total, 1), count] for name, (total, count) in found.items()}


def operations(shape: Shape, tokens: int) -> float:
    """Of a prefill: weights, and attention to what is before."""
    body = shape.matrices + shape.routers - shape.hidden * shape.vocabulary  # logits of the last token alone
    return 2.0 * body * tokens + 2.0 * shape.layers * tokens**2 * shape.heads * shape.depth


def measured(name: str, precision: str, asked: argparse.Namespace, device: cuda.Device,
             ceilings: Mapping[str, float]) -> dict[str, Any]:  # fmt: skip
    """Everything about one engine."""
    shape = SHAPES[name]
    start = time.perf_counter()
    engine = opened(asked.folder / f"{name}_{precision}.json", device)
    runner = EngineRunner(engine, blocks=asked.blocks)
    row: dict[str, Any] = {"shape": name, "precision": precision, "opened s": time.perf_counter() - start}
    start = time.perf_counter()
    waited = decoding(runner, 1, asked.prompt, asked.steps)
    row["first steps s"] = time.perf_counter() - start
    alone = row["decode"] = {**answering(runner, asked.prompt, asked.steps), "each waited for ms": waited["ms"]}
    cache = 2 * shape.layers * shape.groups * shape.depth * 2 * asked.prompt
    alone["bytes"] = shape.read(FORMATS[precision]) + 2 * shape.routers + cache
    alone["share of reading"] = alone["bytes"] / alone["ms"] * 1e3 / ceilings["read B/s"]
    print(f"{name} {precision} decode {alone['ms']:.3f} ms ({waited['ms']:.3f} where each step is waited for), "
          f"{alone['share of reading']:.1%} of reading", flush=True)  # fmt: skip
    if asked.profile:
        row["profile"] = profiled(runner, 1, asked.prompt)
        print(json.dumps(row["profile"]), flush=True)
    row["together"] = [decoding(runner, count, asked.prompt, 20) for count in asked.together]
    for entry in row["together"]:
        print(f"  {entry['sequences']} sequences {entry['ms']:.3f} ms", flush=True)
        if asked.profile:
            entry["profile"] = profiled(runner, 1, asked.prompt, entry["sequences"])
            print(json.dumps(entry["profile"]), flush=True)
    if asked.prefill:
        row["prefill"] = prefill(runner, asked.prefill)
        rate = operations(shape, asked.prefill) / row["prefill"]["ms"] * 1e3
        row["prefill"]["share of products"] = rate / ceilings["bf16 FLOP/s"]
        print(f"  prefill {row['prefill']['ms']:.1f} ms, {row['prefill']['share of products']:.1%}", flush=True)
        if asked.profile:
            row["prefill profile"] = profiled(runner, asked.prefill, 0)
            print(json.dumps(row["prefill profile"]), flush=True)
    runner.close()
    return row


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/llm_cuda"))
    parser.add_argument("--shape", default="llama_8b", choices=sorted(SHAPES))
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens before those that are decoded")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--together", type=int, nargs="*", default=[8, 32, 128, 256])
    parser.add_argument("--prefill", type=int, default=8192)
    parser.add_argument("--blocks", type=int, default=20000)
    parser.add_argument("--profile", action="store_true", help="times of the parts too")
    parser.add_argument("--out", type=Path, help="JSON to write")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Ceilings, then each engine; 1 where a measure falls short."""
    asked, device = parsed(words), cuda.select("cuda")
    ceilings = {"read B/s": reading(device), "bf16 FLOP/s": products()}
    read, rate = (value / 1e12 for value in ceilings.values())
    print(f"{device}: {read:.2f} TB/s read, {rate:.0f} TFLOP/s", flush=True)
    rows = [measured(asked.shape, precision, asked, device, ceilings) for precision in asked.precisions]
    if asked.out:
        asked.out.write_text(json.dumps({"device": str(device), "ceilings": ceilings, "rows": rows}, indent=1) + "\n")
    missed = [row for row in rows if row["decode"]["share of reading"] < WANTED["decode"]
              or row.get("prefill", {}).get("share of products", 1.0) < WANTED["prefill"]]  # fmt: skip
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())

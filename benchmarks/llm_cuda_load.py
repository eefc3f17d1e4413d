"""From an engine file to its first token on a GPU, in a process of its own.

    python -m benchmarks.llm_cuda_engine --folder build/llm_cuda --precisions fp8        # anywhere
    python -m benchmarks.llm_cuda_load --folder build/llm_cuda --precision fp8 [--scratch /tmp] [--out result.json]

The file is written first, with weights that the GPU has drawn; the operating system still holds it in memory when it
is opened. Seconds count from the start of the process: its imports, the header, the weights' way to the GPU, a prompt,
and the capture of its graph, which is timed by itself. The weights' digests are checked meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.llm_cuda import Sequences
from benchmarks.llm_cuda_engine import SHAPES, name_of, opened
from ingot.engine import Engine
from ingot.llm.runner import open_runner
from ingot.runtime import cuda, cuda_executor

WANTED = 10.0  # seconds, captures left out


def write(source: Path, path: Path) -> int:
    """The engine with its weights as a file; its bytes."""
    device = cuda.select("cuda")
    engine = opened(source, device)
    (variant,) = engine.variants
    memory = cuda_executor.load(variant, device, np.zeros(0, np.uint8)).on_device
    weights = np.empty(memory.size, np.uint8)
    cuda.context_of(device).call("cuMemcpyDtoH", weights.ctypes.data, memory.address, memory.size)
    replace(engine, variants=(replace(variant, weights=weights.data),)).save(path)
    return path.stat().st_size


def first(path: Path, began: float, tokens: int) -> dict[str, float]:
    """Seconds after `began` (by the system's clock) at which things were there; those that captures took."""
    marks, captured = {"imports": time.time() - began}, 0.0
    capture = cuda.Context.capture

    def timed(*arguments: Any) -> Any:
        nonlocal captured
        start = time.perf_counter()
        made = capture(*arguments)
        captured += time.perf_counter() - start
        return made

    with mock.patch.object(cuda.Context, "capture", timed):
        engine = Engine.load(path)
        marks["header"] = time.time() - began
        runner = open_runner(engine)
        marks["opened"] = time.time() - began
        sequences = Sequences(runner, 1, tokens + 8)
        token = sequences.step(np.random.default_rng(0).integers(0, runner.vocabulary, (1, tokens)))
        marks["first token"], marks["captures"] = time.time() - began, captured
        sequences.step(token.astype(np.int32)[:, None])
        marks["second token"] = time.time() - began
    runner.close()
    return marks


def _child(*words: str) -> Any:
    """What this program prints in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.llm_cuda_load", *words]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/llm_cuda"))
    parser.add_argument("--shape", default="llama_8b", choices=sorted(SHAPES))
    parser.add_argument("--precision", default="fp8")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"), help="where the file is written, and removed")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON to write")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """0 where the first token came soon enough."""
    asked = parsed(words)
    if asked.first:
        print(json.dumps(first(asked.first, asked.began, asked.prompt)))
        return 0
    if asked.write:
        print(write(asked.folder / name_of(asked.shape, asked.precision), asked.write))
        return 0
    path = asked.scratch / f"{asked.shape}_{asked.precision}.engine"
    try:
        size = _child("--write", str(path), "--folder", str(asked.folder), "--shape", asked.shape, "--precision",
                      asked.precision)  # fmt: skip
        marks = [_child("--first", str(path), "--prompt", str(asked.prompt), "--began", str(time.time()))
                 for _ in range(2)]  # fmt: skip
    finally:
        path.unlink(missing_ok=True)
    found = {"device": str(cuda.select("cuda")), "shape": asked.shape, "precision": asked.precision, "bytes": size,
             "prompt": asked.prompt, "seconds": marks}  # fmt: skip
    print(json.dumps(found), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(min(mark["first token"] - mark["captures"] for mark in marks) > WANTED)


if __name__ == "__main__":
    raise SystemExit(main())

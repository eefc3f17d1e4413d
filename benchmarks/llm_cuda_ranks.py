"""A large language model of random weights on two GPUs beside one: the time of a token of one sequence.

    python -m benchmarks.llm_cuda_engine --shapes llama_70b --precisions fp8 --context 1024 --token-budget 1 \\
        --sequence-budget 1 [--ranks 2]                                                     # anywhere, both
    python -m benchmarks.llm_cuda_ranks --folder build/llm_cuda [--out result.json]         # where two GPUs are

The time of a token is what the engine's client sees, from one to the next, as of `benchmarks/llm_cuda.py`. Every rank
is a process with a GPU, as `ingot llm serve` has them; rank 0 is this one. Weights are drawn on the GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llm_cuda import answering, decoding, reading
from benchmarks.llm_cuda_engine import SHAPES, Shape, name_of, opened
from ingot.llm.batch import Batch
from ingot.llm.formats import FORMATS
from ingot.llm.parallel import LeadingRunner, RankRunner, follow
from ingot.llm.runner import EngineRunner
from ingot.runtime import cuda
from ingot.runtime.group import GroupLost, SharedGroup, shared_groups

WANTED = 1.6  # times as fast as one


def follower(told: dict[str, Any]) -> None:
    """Another rank's life."""
    sockets = {int(rank): socket.socket(fileno=number) for rank, number in told["sockets"].items()}
    group = SharedGroup(told["rank"], told["ranks"], told["memory"], sockets)
    try:
        runner = RankRunner(_engine(told["path"], group.rank), group, 1, told["blocks"], "cuda")
        follow(runner)
        runner.close()
    except GroupLost as lost:
        print(f"rank {group.rank}: {lost}", file=sys.stderr, flush=True)


def _engine(path: str | Path, rank: int) -> Any:
    return opened(Path(path), cuda.select(f"cuda:{rank}"), rank)


def leader(path: Path, ranks: int, blocks: int) -> LeadingRunner:
    """Rank 0 of new processes."""
    groups, processes = shared_groups(ranks), []
    for group in groups[1:]:
        sockets = {rank: each.fileno() for rank, each in group.sockets.items()}
        told = {"path": str(path), "rank": group.rank, "ranks": ranks, "memory": group.memory, "blocks": blocks,
                "sockets": sockets}  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.llm_cuda_ranks", "--follow", json.dumps(told)]
        processes.append(subprocess.Popen(command, pass_fds=(group.memory, *sockets.values())))
    for group in groups[1:]:
        group.close()
    runner = LeadingRunner(_engine(path, 0), groups[0], 1, blocks, "cuda")
    runner.processes = processes
    return runner


def measured(runner: EngineRunner, shape: Shape, asked: argparse.Namespace, ranks: int, rate: float) -> dict[str, Any]:
    """Decoding one sequence."""
    waited = decoding(runner, 1, asked.prompt, asked.steps)["ms"]
    row = {"ranks": ranks, **answering(runner, asked.prompt, asked.steps), "each waited for ms": waited}
    cache = 2 * shape.layers * shape.groups * shape.depth * 2 * asked.prompt
    row["bytes"] = shape.read(FORMATS[asked.precision]) + cache
    row["share of reading"] = row["bytes"] / row["ms"] * 1e3 / (rate * ranks)
    print(f"{ranks} GPUs: {row['ms']:.3f} ms, {row['share of reading']:.1%} of reading "
          f"({waited:.3f} ms where each step is waited for)", flush=True)
    return row


def lost(runner: LeadingRunner) -> dict[str, Any]:
    """What happens where a rank is killed in the middle of a run, and how soon."""
    (process,) = runner.processes
    sequence = Batch(*(np.array(part, np.int32) for part in ([1], [0], [0], [0, 1], [1], [[0]], [0])))
    process.kill()
    began = time.perf_counter()
    try:
        runner.choose(sequence)
        said = "nothing"
    except GroupLost as error:
        said = str(error)
    process.wait()
    return {"said": said, "seconds": time.perf_counter() - began}


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/llm_cuda"))
    parser.add_argument("--shape", default="llama_70b", choices=sorted(SHAPES))
    parser.add_argument("--precision", default="fp8", choices=sorted(FORMATS))
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=512, help="tokens before those that are decoded")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--follow", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON to write")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """0 where two are as much faster as wanted."""
    asked = parsed(words)
    if asked.follow:
        follower(asked.follow)
        return 0
    device, shape = cuda.select("cuda"), SHAPES[asked.shape]
    rate, blocks = reading(device), asked.prompt // 8
    found: dict[str, Any] = {"device": str(device), "shape": asked.shape, "precision": asked.precision,
                             "read B/s": rate, "nvls": os.environ.get("NCCL_NVLS_ENABLE", ""), "rows": []}  # fmt: skip
    for ranks in asked.ranks:
        path = asked.folder / name_of(asked.shape, asked.precision, ranks)
        runner = EngineRunner(_engine(path, 0), 1, blocks) if ranks == 1 else leader(path, ranks, blocks)
        found["rows"].append(measured(runner, shape, asked, ranks, rate))
        if ranks > 1:
            found["killed"] = lost(runner)  # type: ignore[arg-type]
        runner.close()
        if asked.out:
            asked.out.write_text(json.dumps(found, indent=1) + "\n")
    times = {row["ranks"]: row["ms"] for row in found["rows"]}
    faster = times.get(1, 0.0) / min(times.values())
    print(f"{faster:.2f} times as fast; killed: {found.get('killed')}", flush=True)
    return int(faster < WANTED)


if __name__ == "__main__":
    raise SystemExit(main())

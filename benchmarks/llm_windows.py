"""Keys and values of a model whose layers see differently far, by the scheduler alone: no weights, no GPU.

    python -m benchmarks.llm_windows [--json results.json]

Layers as Gemma 3 27B has them: ten see all, 52 see 1,024 positions. Held are the most blocks of 16 tokens that a prompt
and its answer own at once, in GiB of bfloat16 (16 heads of 128), and with all layers in one kind, as if none had a
window.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS, write_json
from ingot.llm.batch import Kind
from ingot.llm.scheduler import Limits, Scheduler, Tokens
from ingot.llm.tables import Cache

SIZE, BYTES = 16, 2 * 16 * 128 * 2  # tokens of a block; of a token and layer
LAYERS = {"one kind": (62,), "by window": (10, 52)}
WINDOWS = (0, 1024)


def held(layers: Sequence[int], prompt: int, answer: int, chunk: int) -> float:
    """GiB of keys and values that a request owns at most."""
    blocks = (prompt + answer) // SIZE + 1
    one = Scheduler(Limits(chunk, 1), Cache([Kind(blocks, window) for window in WINDOWS[: len(layers)]], SIZE))
    sequence, most = Tokens(0, [place % 1000 for place in range(prompt)], prompt), 0
    one.add(sequence, 0.0)
    while len(sequence.tokens) < prompt + answer:
        for share in one.schedule(0.0).shares:
            most = max(most, sum(len(table.held) * n for table, n in zip(sequence.tables, layers, strict=True)))
            one.advance(share, [7] if share.draws else [], 0.0)
    one.end(sequence)
    one.cache.check_integrity([])
    return most * SIZE * BYTES / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "llm_windows.json")
    arguments, rows = parser.parse_args(), list[dict[str, Any]]()
    for prompt in (1000, 8000, 32000):
        gib = {name: round(held(layers, prompt, 500, 512), 2) for name, layers in LAYERS.items()}
        rows.append({"prompt": prompt, "answer": 500, **{f"{name} GiB": each for name, each in gib.items()},
                     "ratio": round(gib["one kind"] / gib["by window"], 2)})  # fmt: skip
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    write_json(arguments.json, "a request of 32,000 tokens holds less than a quarter", rows)
    return int(rows[-1]["ratio"] < 4)


if __name__ == "__main__":
    sys.exit(main())

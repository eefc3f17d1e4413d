"""Attention of one token on a GPU: the engine's launch and one of one-warp blocks, beside numpy and beside each other.

    python -m benchmarks.llm_cuda_lone [--out result.json]            # on a GPU: values, microseconds in a row
    python -m benchmarks.llm_cuda_lone --engines build/lone           # anywhere: engines with this form for one token
    python -m benchmarks.llm_cuda --folder build/lone --precisions fp8 --together --prefill 0

Sizes are Llama-3.1-8B's. "alone": one launch behind the other; "behind update": each behind a CacheUpdate, as in a
layer. In a row of their own launches are faster than between products: only an engine's step tells which is better.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import llm_cuda_engine
from benchmarks.llm_cuda_lone_form import lone_attention
from ingot.dtypes import numpy_dtype
from ingot.ir.ops import meaning
from ingot.kernels import candidates
from ingot.kernels.cuda.architecture import Architecture, architecture
from ingot.kernels.cuda.standalone import Standalone
from ingot.kernels.node import Node, Port
from ingot.runtime import cuda

Array = np.ndarray[Any, Any]
HEADS, GROUPS, DEPTH, BLOCK, WIDTH = 32, 8, 128, 16, 544
ATTENTION = {"scale": DEPTH**-0.5, "window": 0, "softcap": 0.0}
UPDATE = {"heads": HEADS, "groups": GROUPS, "epsilon": 1e-5}
FORMS: dict[str, Callable[[], AbstractContextManager[None]]] = {"engine": nullcontext, "lone": lone_attention}
WITHIN = 2e-2  # of a result, whose numbers are about one


def drawn(kept: str, context: int) -> dict[str, Array]:
    """One token behind `context` others, blocks in any order."""
    rng, kind = np.random.default_rng(context), numpy_dtype("bfloat16")
    table = rng.permutation(2 * WIDTH)[:WIDTH].astype(np.int32)
    place = table[context // BLOCK] * BLOCK + context % BLOCK
    return {
        "cache": rng.standard_normal((2 * WIDTH, 2, GROUPS, BLOCK * DEPTH)).astype(numpy_dtype(kept)),
        "projected": rng.standard_normal((1, (HEADS + 2 * GROUPS) * DEPTH)).astype(kind),
        "query": rng.standard_normal((1, HEADS, DEPTH)).astype(kind),
        "positions": np.array([context], np.int32), "slots": np.array([place], np.int32),
        "owners": np.zeros(1, np.int32), "tables": table[None],
    }  # fmt: skip


def node_of(op: str, inputs: Sequence[Array], outputs: Sequence[Array], attributes: dict[str, Any]) -> Node:
    """A node of these operands."""
    ports, made = (tuple(Port(x.dtype.name, x.shape) for x in some) for some in (inputs, outputs))
    return Node(op, ports, made, attributes, name=op)


def measured(kept: str, context: int, target: Architecture, gpu: cuda.Context) -> dict[str, Any]:
    """The forms' errors and microseconds."""
    x = drawn(kept, context)
    read = [x[name] for name in ("query", "cache", "positions", "owners", "tables")]
    written = [x[name] for name in ("cache", "projected", "positions", "slots")]
    (wanted,) = meaning("PagedAttention")(*read, **ATTENTION)
    before = node_of("CacheUpdate", written, [x["cache"], x["query"]], UPDATE)
    update = Standalone(before, next(candidates(before, "cuda", target)), target, gpu)
    update(*written)
    row: dict[str, Any] = {"kept": kept, "context": context}
    node = node_of("PagedAttention", read, [x["query"]], ATTENTION)
    for name, form in FORMS.items():
        with form():
            made = Standalone(node, next(candidates(node, "cuda", target)), target, gpu)
        (result,) = made(*read)
        error = np.abs(np.asarray(result).astype(np.float32) - np.asarray(wanted).astype(np.float32)).max()
        row[name] = {"error": float(error), "alone us": made.time(read, 9),
                     "behind update us": made.time(read, 9, before=update)}  # fmt: skip
    return row


def engines(folder: Path, precisions: Sequence[str]) -> None:
    """As benchmarks.llm_cuda_engine makes them, but for attention of one token."""
    with lone_attention():
        llm_cuda_engine.main(["--folder", str(folder), "--precisions", *precisions, "--context", "2048",
                              "--token-budget", "256", "--sequence-budget", "64"])  # fmt: skip


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[0, 37, 512, 1500, 5000])
    parser.add_argument("--kept", nargs="+", default=["bfloat16", "float8_e4m3fn"], help="types of keys and values")
    parser.add_argument("--engines", type=Path, help="a folder for engines, in the place of measuring")
    parser.add_argument("--precisions", nargs="+", default=["fp8"], help="of these engines")
    parser.add_argument("--out", type=Path, help="JSON to write")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """1 where a result is not numpy's."""
    asked = parsed(words)
    if asked.engines:
        engines(asked.engines, asked.precisions)
        return 0
    device = cuda.select("cuda")
    target, gpu, rows = architecture(f"sm_{device.capability}"), cuda.context_of(device), []
    for kept in asked.kept:
        for context in asked.contexts:
            rows.append(measured(kept, context, target, gpu))
            print(json.dumps(rows[-1]), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps({"device": str(device), "rows": rows}, indent=1) + "\n")
    return int(any(row[name]["error"] > WITHIN for row in rows for name in FORMS))


if __name__ == "__main__":
    raise SystemExit(main())

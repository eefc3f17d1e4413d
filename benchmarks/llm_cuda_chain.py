"""A layer's products behind attention in one launch, as the engine has them, beside a launch for each, on a GPU.

    python -m benchmarks.llm_cuda_chain --out build/chain.json [--slots 5 6]

A chain (`ingot/kernels/cuda/projection_chain.py`) is output, gate, down and the next layer's projection of a
Llama-3.1-8B; `rings` are the same by four launches, before the chains and behind them. Row and residual of layers that
follow each other are compared with what rings make of them (`error`, relative: both add in the same order). Timed are
graphs of layers with weights of their own, behind a pause of about 4 us in the place of attention too, and behind one
that has attention's shared memory. Measured on 2026-11-22: rings 59.7 us behind the latter, 5 slots 56.6; reading 46.4.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llm_cuda_rows import (
    ATTENTION,
    LAYERS,
    PRODUCTS,
    STREAMS,
    Array,
    Bench,
    Step,
    engine_step,
    node_of,
    pause_of,
    step_of,
)
from ingot.dtypes import numpy_dtype
from ingot.kernels.cuda.architecture import architecture
from ingot.kernels.cuda.build import CudaBuilder, Handle
from ingot.kernels.cuda.projection_chain import SLOTS, Link, chain

PROJECTION, OUTPUT, GATE, DOWN = range(4)  # of PRODUCTS
ORDER = (OUTPUT, GATE, DOWN, PROJECTION)
ROW, RESIDUAL, JOINED, INNER = 2, 1, 3, 4  # where in the bench's rows: attention's result, and what is made of it
# What a launch for each reads and writes, and where the residual is.
PLACES = {OUTPUT: (ROW, JOINED, RESIDUAL), GATE: (JOINED, INNER, 0), DOWN: (INNER, RESIDUAL, JOINED),
          PROJECTION: (RESIDUAL, ROW, 0)}  # fmt: skip
TURNS = 3  # of all layers
_WEIGHTS = 100  # the index from which on constants are weights of the products in order
_BFLOAT = numpy_dtype("bfloat16")


def weights_of(bench: Bench, product: int) -> list[int]:
    """Of each layer; the projection is the next layer's."""
    ahead = int(product == PROJECTION)
    return [bench.weights[(layer + ahead) % LAYERS][product] for layer in range(LAYERS)]


def rings(bench: Bench) -> list[Step]:
    """A launch for each product."""
    found = list[Step]()
    for k in ORDER:
        places = [bench.rows[place] for place in PLACES[k]]
        found.append(engine_step(bench, node_of(PRODUCTS[k]), STREAMS["ring"][k], weights_of(bench, k), *places))
    return found


def chain_of(slots: int) -> CudaBuilder:
    """Input 0 is the row, 3 the residual; outputs are the next residual and row."""
    nodes = [node_of(PRODUCTS[k]) for k in ORDER]
    operands: dict[int, dict[int, Handle | int]] = {OUTPUT: {3: Handle("input", 3, "bfloat16")}, DOWN: {3: 0}}
    outputs = {DOWN: Handle("output", 0, "bfloat16"), PROJECTION: Handle("output", 1, "bfloat16")}
    links = [Link(node, Handle("constant", _WEIGHTS + k, "float8_e4m3fn"), operands.get(k, {}), outputs.get(k))
             for k, node in zip(ORDER, nodes, strict=True)]  # fmt: skip
    build = CudaBuilder(nodes[0], architecture("sm_90"))
    chain(build, Handle("input", 0, "bfloat16"), links, slots)
    return build


def chain_step(bench: Bench, slots: int) -> Step:
    """One launch for all, with so many slots of a ring."""
    weights = {k: weights_of(bench, k) for k in ORDER}
    row, residual = bench.rows[ROW], bench.rows[RESIDUAL]
    places = {("input", 0): row, ("input", 3): residual, ("output", 0): residual, ("output", 1): row}

    def elsewhere(handle: Handle, layer: int) -> int:
        if handle.kind == "constant":
            return weights[handle.index - _WEIGHTS][layer]
        return places[handle.kind, handle.index]

    return step_of(bench, chain_of(slots), elsewhere)


def result(bench: Bench, steps: Sequence[Step]) -> Array:
    """Residual and row behind some turns of all layers."""
    rng, sizes = np.random.default_rng(5), {RESIDUAL: PRODUCTS[DOWN].columns, ROW: PRODUCTS[PROJECTION].columns}
    rows = {place: (rng.standard_normal(size) * 3).astype(_BFLOAT) for place, size in sizes.items()}
    for place, row in rows.items():
        bench.context.upload(bench.rows[place], row, bench.stream)
    for layer in [*range(LAYERS)] * TURNS:
        for step in steps:
            step.put(layer, bench.stream)
    for place, row in rows.items():
        bench.context.download(row, bench.rows[place], bench.stream)
    bench.context.wait(bench.stream, "products")
    return np.concatenate([row.astype(np.float64) for row in rows.values()])


def measured(bench: Bench, steps: Sequence[Step], pauses: dict[str, Step], wanted: Array) -> dict[str, float]:
    """Error, and microseconds of a layer."""
    apart = result(bench, steps) - wanted
    row = {"error": float(np.linalg.norm(apart) / np.linalg.norm(wanted)), "layer us": bench.microseconds(steps)}
    return row | {f"layer with {name} us": bench.microseconds([pause, *steps]) for name, pause in pauses.items()}


def main(words: Sequence[str] | None = None) -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", nargs="+", type=int, default=[SLOTS], help="of a chain's ring, 16 KB each")
    parser.add_argument("--out", type=Path, required=True, help="JSON that is written")
    given, found = parser.parse_args(words), list[dict[str, Any]]()
    bench = Bench()
    pauses = {"4 us": pause_of(bench, 4), "4 us of 38 KB": pause_of(bench, 4, ATTENTION)}
    apart = rings(bench)
    wanted = result(bench, apart)
    forms = {f"chain of {slots} slots": [chain_step(bench, slots)] for slots in given.slots}
    for name, steps in (("rings", apart), *forms.items(), ("rings", apart)):
        found.append({"form": name} | measured(bench, steps, pauses, wanted))
        print(found[-1], flush=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

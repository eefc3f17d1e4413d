"""Where the microseconds of a small model's run go: kernels, the call into them, and Python around it.

    python -m benchmarks.overhead [--only mnist] [--threads 1] [--json overhead.json]

`run` is what a user waits for. `native` is its call into generated code, of which `kernels` is what its steps take by
the time-stamp counter; the rest is Python: checking the inputs, finding a frame, allocating the outputs. The last line
is the claim: `a run takes R µs in Python, K of them in kernels`.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import ingot
from benchmarks.models import MODELS, example_inputs, model_path
from benchmarks.timing import milliseconds, pinned, write_json

CALLS, ROUNDS, LIMIT = 2000, 9, 15.0


def microseconds(call: Callable[[], object]) -> float:
    """Of one call: the median over rounds of many."""

    def many() -> None:
        for _ in range(CALLS):
            call()

    many()
    return float(np.median([milliseconds(many) for _ in range(ROUNDS)])) * 1e3 / CALLS


def measure(name: str, threads: int) -> dict[str, float]:
    config = ingot.BuildConfig(verify=False, timing_cache=Path("build/timing.cache"))
    inputs = example_inputs(name)
    with pinned(threads), ingot.Session(ingot.build(model_path(name), config), threads=threads) as session:
        outputs = {key: np.empty_like(y) for key, y in session.run(inputs).items()}
        executor = session._executor
        arrays, shapes = session._checked(inputs)
        frame = executor.take(shapes)
        found = {
            "run": microseconds(lambda: session.run(inputs)),
            "run into given buffers": microseconds(lambda: session.run(inputs, outputs)),
            "native": microseconds(lambda: [action(frame) for action in executor.actions]),
            "checks": microseconds(lambda: session._checked(inputs)),
            "frame": microseconds(lambda: executor.give(executor.take(shapes))),
            "binding": microseconds(lambda: frame.run(arrays, None, [_nothing])),
        }
        executor.give(frame)
        steps = [session.profile(inputs) for _ in range(50)]
    kernels = float(np.median([sum(step.microseconds for step in run) for run in steps]))
    return {what: round(time, 2) for what, time in (found | {"kernels": kernels}).items()}


def _nothing(frame: object) -> None:
    """In the place of native code."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, default="mnist")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    chosen = parser.parse_args()
    found = measure(chosen.only, chosen.threads)
    print("\n".join(f"{what:<26}{time:>8.2f} µs" for what, time in found.items()))
    line = f"a run takes {found['run']:.1f} µs in Python, {found['kernels']:.1f} of them in kernels"
    if chosen.json:
        write_json(chosen.json, f"where a run of {chosen.only} spends its time", [found], line=line)
    print(line)
    return 0 if found["run"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())

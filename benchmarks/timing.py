"""Paired timing: several runtimes take turns on the same work, so that a busy machine hits all alike."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAUSE = 0.03  # seconds between runtimes: a thread pool that still spins would slow the next one
SLICE = 0.03  # seconds of calls in one turn, where one call is shorter
MOST_CALLS = 500


@dataclass(frozen=True)
class Timing:
    """The median call of every turn a runtime took, in milliseconds."""

    turns: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.turns)

    def ratio(self, other: "Timing") -> float:
        """How many times faster than `other`: the median over the turns of other / self."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.turns, other.turns, strict=True))


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def turn(call: Callable[[], object]) -> float:
    """The median of as many calls as fill a slice, at least three, after one that wakes the runtime's threads."""
    time.sleep(PAUSE)
    calls = min(MOST_CALLS, max(3, int(SLICE * 1e3 / max(milliseconds(call), 1e-3))))
    return statistics.median(milliseconds(call) for _ in range(calls))


def paired(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Every runtime's timing over `rounds` rounds; another begins each time."""
    for call in calls.values():
        call()
    names, turns = list(calls), {name: list[float]() for name in calls}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            turns[name].append(turn(calls[name]))
    return {name: Timing(tuple(values)) for name, values in turns.items()}


def available_threads() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """This thread, and those started meanwhile, stay on as many cores as they are threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def processor() -> str:
    names = [
        line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return names[0].strip() if names else platform.machine()


def instruction_sets() -> list[str]:
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    wanted = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
    return [name for name in wanted if name in flags.split()]


def versions(packages: Sequence[str] = ("numpy", "llvmlite", "onnx", "onnxruntime", "openvino")) -> dict[str, str]:
    """The version of each package that is installed."""
    installed = {distribution.name.lower() for distribution in metadata.distributions()}
    return {name: metadata.version(name) for name in packages if name in installed}


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "processor": processor(),
        "instruction_sets": instruction_sets(),
        "threads": available_threads(),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }


def write_json(path: Path, claim: str, rows: Sequence[Mapping[str, Any]], **totals: Any) -> None:
    """A result file: what was measured, on what, row by row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"claim": claim, "machine": machine(), **totals, "rows": list(rows)}, indent=1) + "\n")

"""The tables of docs/server.md, from what the server's benchmarks wrote."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _found(results: Path, name: str) -> Any:
    path = results / name
    return json.loads(path.read_text()) if path.exists() else None


def server_table(results: Path) -> Iterator[str]:
    """Every claim beside its figure; what the load generator, chaos and the gRPC fronts said."""
    measured = _found(results, "server.json")
    if measured is None:
        yield "Nothing measured yet: `python -m benchmarks.server --json benchmarks/results/server.json`."
        return
    yield from claims(measured)
    yield ""
    for name in ("server_loadgen.json", "server_chaos.json"):
        if (more := _found(results, name)) is not None:
            yield f"- `benchmarks.{name.removesuffix('.json')}`: {more['claim']} (load {more['machine']['load']})"
    if (fronts := _found(results, "server_grpc_fronts.json")) is not None:
        yield ""
        yield from grpc_fronts(fronts)


def claims(measured: Any) -> Iterator[str]:
    yield "| claim | aim | measured | holds | load |"
    yield "|---" * 5 + "|"
    for section in measured["sections"].values():
        for claim in section["claims"]:
            aim = f"≥ {claim['least']:g}" if claim["least"] is not None else f"≤ {claim['most']:g}"
            figure = "–" if claim["measured"] is None else f"{claim['measured']:.3g}"
            holds, load = "yes" if claim["holds"] else "**no**", section["machine"]["load"]
            yield f"| {claim['text']} | {aim} | {figure} | {holds} | {load} |"


def grpc_fronts(fronts: Any) -> Iterator[str]:
    """Medians; p50 of one blocking caller, calls a second of eight."""
    runs: dict[tuple[str, str, str], list[Any]] = {}
    for row in fronts["rows"]:
        runs.setdefault((row["front"], row["does"], row["client"]), []).append(row)

    def middle(front: str, does: str, client: str, figure: str = "p50") -> str:
        found = runs.get((front, does, client))
        return f"{statistics.median(row[figure] for row in found):,.0f}" if found else "–"

    yield "| gRPC, µs | echo | its client alone | echo of 600 kB | MNIST | MNIST, tritonclient | MNIST, 8 callers, /s |"
    yield "|---" * 7 + "|"
    for front in dict.fromkeys(row["front"] for row in fronts["rows"]):
        asked = [("echo", "bytes", "p50"), ("echo", "bytes", "cpu"), ("echo", "600 kB", "p50")]
        asked += [("engine", "bytes", "p50"), ("engine", "tritonclient", "p50"), ("engine", "8 of bytes", "rate")]
        yield f"| {front} | {' | '.join(middle(front, *which) for which in asked)} |"
    yield ""
    yield f"`benchmarks.server_grpc_fronts`: {fronts['claim']} (load {fronts['machine']['load']})"

"""The tables of docs/cuda.md, from benchmarks/results/h200-*.json."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cuda_rows import ROWS
from benchmarks.timing import RESULTS

PEERS = ("eager", "graph", "compile")
DEPTHS = (768, 3072, 16384)  # of sums, in the table
SLOW = 60.0  # microseconds of a step that has a line of its own


def cuda_table(results: Path = RESULTS) -> Iterator[str]:
    """Networks beside PyTorch, then ResNet-50's steps beside their limits."""
    if not all((results / f"h200-{name}.json").exists() for name in ("peers", "limits")):
        yield "Nothing measured yet: `python -m benchmarks.cuda_peers` and `…cuda_limits`, on a GPU."
        return
    peers = json.loads((results / "h200-peers.json").read_text())
    yield from _networks(peers)
    yield ""
    yield from _limits(json.loads((results / "h200-limits.json").read_text()))
    yield ""
    yield from _narrow(peers)
    if (results / "h200-sums.json").exists():
        yield ""
        yield from _sums(json.loads((results / "h200-sums.json").read_text()))


def _sums(run: Mapping[str, Any]) -> Iterator[str]:
    """The largest errors of every depth and kind of numbers."""
    yield _line(["sums of float8", "depth", "fast", "at most", "not fast", "generated"])
    yield "|---|---|---|---|---|---|"
    for row in (row for row in run["rows"] if row["depth"] in DEPTHS):
        errors = (row["fast"]["largest"], row["allowed"], row["other"]["largest"], row["generated"]["largest"])
        yield _line([row["signs"], str(row["depth"]), *(f"{error:.1e}" for error in errors)])
    same = min(share for row in run["rows"] for share in row["as modelled"])
    yield ""
    yield "`python -m benchmarks.cuda_sums`: the largest error relative to the magnitudes multiplied; `at most` is what"
    yield f"a build reckons with. {same:.0%} of the fast results are those of the unit's model there, bit by bit."


def _narrow(run: Mapping[str, Any]) -> Iterator[str]:
    """Networks whose layers are narrow where they can be, beside the same in fp16."""
    yield _line(["network", "form", "ms", "items a second", "x fp16", "signal to noise dB"])
    yield "|---|---|---|---|---|---|"
    measured = {row["row"]: row for row in run["rows"]}
    wide = dict.fromkeys(row.wide.name for row in ROWS if row.form)
    for row in (row for name in wide for row in ROWS if row.wide.name == name):
        ms, noise = measured[row.name]["ours ms"], measured[row.name]["SNR dB"]
        cells = [f"{ms:.2f}", f"{1e3 * row.batch / ms:,.0f}", f"{measured[row.wide.name]['ours ms'] / ms:.2f}"]
        yield _line([row.wide.name, row.form or "fp16", *cells, _number(noise, ".0f")])
    yield ""
    yield "Of the same rows (`python -m benchmarks.cuda_peers`), with every layer narrow that can be; the newest runs,"
    speeds = sorted(machine["fp16 matmul TFLOP/s"] for machine in run["ours on"])
    yield f"on H200s whose matmul reached {speeds[0]:.0f} to {speeds[-1]:.0f} TFLOP/s."


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _networks(run: Mapping[str, Any]) -> Iterator[str]:
    yield _line(["ms", "Ingot", "earlier runs", *PEERS, "x", "alone: Ingot", "compile", "x", "what does not hold"])
    yield "|---" * (len(PEERS) + 8) + "|"
    for row in run["rows"]:
        peers, held = row["peers ms"], "library" if row["peers ms"].get("library") else "compile"
        failed = "; ".join(what for what, held in row["checks"].items() if held is False)
        earlier = ", ".join(map(_number, row.get("earlier ms") or [])) or "–"
        alone = [row.get("ours alone ms"), row.get("peers alone ms", {}).get(held)]
        yield _line([row["row"], _number(row["ours ms"]), earlier, *(_number(peers[which]) for which in PEERS),
                     _number(_ratio(peers["compile"], row["ours ms"]), ".2f"), *map(_number, alone),
                     _number(row.get("ratio alone"), ".2f"), failed or "–"])  # fmt: skip
    yield from _of_libraries(run["rows"])
    ours, theirs = run["ours on"][-1], run["peers on"][-1]
    yield ""
    yield f"`python -m benchmarks.cuda_peers`, on {ours['devices'][0].partition(' (')[0]}, torch {ours['torch']}, fp16"
    yield f"where no other type is named. The same matmul and copy: {_ceilings(ours)} in Ingot's run,"
    yield f"{_ceilings(theirs)} in the peers'. A dash: not measured."


def _of_libraries(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the rows are held against whose module is a library's."""
    for row in (r for r in rows if r["peers ms"].get("library")):
        yield ""
        yield f"{row['row']} `alone` is held against transformers' BertModel, which is what people compile:"
        own, theirs = row["peers alone ms"].get("compile"), row["peers alone ms"]["library"]
        yield f"{_number(theirs)} ms (in a row {_number(row['peers ms']['library'])}); our leaner module compiled takes"
        yield f"{_number(own)}, {_number(_ratio(own, row['ours alone ms']), '.2f')} x."


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if ours and theirs else None


def _ceilings(machine: Mapping[str, Any]) -> str:
    return f"{machine['fp16 matmul TFLOP/s']:.0f} TFLOP/s and {machine['copy TB/s']:.2f} TB/s"


def _limits(run: Mapping[str, Any]) -> Iterator[str]:
    yield _line(["step", "kernel", "µs", "MB", "GFLOP", "bound by", "limit µs", "share of it"])
    yield "|---" * 8 + "|"
    steps = sorted(run["steps"], key=lambda step: -step["microseconds"])
    for step in (s for s in steps if s["microseconds"] >= SLOW):
        yield _line([step["step"], step["kernel"], f"{step['microseconds']:.0f}", f"{step['bytes'] / 1e6:.0f}",
                     f"{step['operations'] / 1e9:.1f}", step["bound"], f"{step['limit']:.0f}",
                     f"{step['share']:.0%}"])  # fmt: skip
    yield ""
    yield f"`python -m benchmarks.cuda_limits resnet50`, 128 images in fp16: {len(steps)} steps, above are those of"
    yield f"{SLOW:.0f} µs and more. The graph takes {run['graph ms']:.2f} ms,"
    yield f"all steps' limits are {run['limit ms']:.2f} ms."


def _number(value: float | None, form: str = ".3g") -> str:
    return "–" if value is None else format(value, form)

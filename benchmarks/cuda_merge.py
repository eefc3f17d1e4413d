"""What runs of cuda_peers measured, put into the committed result: a row keeps what was not measured again.

Of ours the newest time counts, what it replaces joins the row's `earlier ms`; of a peer's times the best one, as some
hosts are slow enough to show in it. Files may be given in any order and again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cuda_rows import ROWS, Row

PEERS = ("eager", "graph", "compile", "library")
TOLERANCE = 3e-2  # of the largest magnitude, against float32
NARROW_TOLERANCE = 0.2  # of int8, every layer of it: what may stay narrow is another question (docs/precision.md)
FIRST, PYTHON = 1.0, 15.0  # seconds from the file to the first result, microseconds of Python an inference
CLAIM = "networks in fp16 (and int8) on one GPU beside PyTorch, by model and batch"
_KEPT = ("run ms", "launch us", "python us", "build s", "first result s", "difference", "SNR dB", "launches",
         "host steps", "torch imported", "measured")  # fmt: skip
_PEERS_TIMES = {"peers ms": "ms", "peers alone ms": "alone ms", "call ms": "call ms"}
Found = Mapping[str, Any]


def merged(known: Found, runs: Sequence[Found]) -> dict[str, Any]:
    """The result `known` (or {}) with what the runs measured: {"claim", "ours on", "peers on", "passed", "failed",
    "rows"}."""
    before = {row["row"]: row for row in known.get("rows", [])}
    rows = {row.name: figures(row, before.get(row.name, {}), runs) for row in ROWS}
    judged = [{**rows[row.name], **verdict(row, rows)} for row in ROWS]
    passed = [row["passed"] for row in judged]
    return {"claim": CLAIM, "ours on": _machines(known, runs, "ours"), "peers on": _machines(known, runs, "peers"),
            "passed": sum(p is True for p in passed), "failed": sum(p is False for p in passed),
            "rows": judged}  # fmt: skip


def figures(row: Row, before: Found, runs: Sequence[Found]) -> dict[str, Any]:
    """The row as known before, with the newest of ours and the best of each peer's."""
    made = {"row": row.name, "ours ms": None, "ours alone ms": None, "earlier ms": [], **dict.fromkeys(_KEPT), **before}
    for name in _PEERS_TIMES:
        made[name] = {**dict.fromkeys(PEERS), **before.get(name, {})}
    for own in sorted(_of(row.name, runs), key=_when):
        if _when(own) > _when(made):
            _renew(made, own)
    for which in PEERS:
        for found in _of(f"{row.name} {which}", runs):
            for name, kind in _PEERS_TIMES.items():
                times = (made[name][which], found.get(kind))
                made[name][which] = min((ms for ms in times if ms is not None), default=None)
    return made


def _of(key: str, runs: Sequence[Found]) -> Iterator[Found]:
    """What the runs have under that key, but for what failed."""
    return (run["rows"][key] for run in runs if key in run["rows"] and "failed" not in run["rows"][key])


def _when(found: Found) -> str:
    return found.get("measured") or ""


def _renew(made: dict[str, Any], own: Found) -> None:
    if made["ours ms"] is not None:
        made["earlier ms"] = [*(made["earlier ms"] or []), round(made["ours ms"], 4)]
    made["ours ms"], made["ours alone ms"] = own["graph ms"], own.get("alone ms")
    made["call ms"]["ours"] = own.get("call ms")
    made.update({name: own.get(name) for name in _KEPT})


def verdict(row: Row, rows: Mapping[str, Found]) -> dict[str, Any]:
    """How often faster than what the row is held against, which of what is asked holds, and whether all does: None
    where something was not measured."""
    mine = rows[row.name]
    ms, held = mine["ours ms"], "library" if row.library else "compile"
    in_row, one = _ratio(mine["peers ms"][held], ms), _ratio(mine["peers alone ms"][held], mine["ours alone ms"])
    ratio = one if row.batch == 1 and one else in_row
    checks = dict(_checks(row, mine, ratio, rows[row.wide.name]["ours ms"]))
    passed = None if None in checks.values() else all(checks.values())
    return {"ratio in a row": in_row, "ratio alone": one, "ratio": ratio, "checks": checks, "passed": passed}


def _checks(row: Row, mine: Found, ratio: float | None, wide: float | None) -> Iterator[tuple[str, bool | None]]:
    ms, most = mine["ours ms"], NARROW_TOLERANCE if row.form else TOLERANCE
    yield "as float32", None if ms is None else mine["difference"] <= most
    if row.ratio is not None:
        yield f"at least {row.ratio} x torch.compile", None if ratio is None else ratio >= row.ratio
    if row.faster is not None:
        yield f"at least {row.faster} x fp16", None if ms is None or wide is None else wide / ms >= row.faster
    if row.most is not None:
        yield f"at most {row.most:.3g} ms", None if ms is None else ms <= row.most
    if ms is not None:
        yield "without torch", not mine["torch imported"]
        yield f"first result in {FIRST} s", mine["first result s"] <= FIRST
    if mine["python us"] is not None:  # older rows lack it
        yield f"{PYTHON:g} us of Python", mine["python us"] <= PYTHON


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if ours and theirs else None


def _machines(known: Found, runs: Sequence[Found], kind: str) -> list[Any]:
    """Those of the result and of the runs that measured ours, or peers; each once."""
    found = list(known.get(f"{kind} on", []))
    for run in runs:
        peers = any(key.endswith(f" {which}") for key in run["rows"] for which in PEERS)
        found += [m for m in run["machines"] if m not in found and peers == (kind == "peers")]
    return found


def write(path: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The result at `path`, gone on from with the files of runs (ours.json, peers.json of cuda_peers)."""
    known = json.loads(path.read_text()) if path.exists() else {}
    whole = merged(known, [json.loads(file.read_text()) for file in files])
    path.write_text(json.dumps(whole, indent=1) + "\n")
    return whole


def lines(whole: Found) -> Iterator[str]:
    """A table of the result."""
    for cells in (["row", "ours ms", *PEERS, "x compile", "verdict"], *map(_cells, whole["rows"])):
        yield f"{cells[0]:20}" + "".join(f"{cell:>11}" for cell in cells[1:-1]) + f"   {cells[-1]}"


def _cells(row: Found) -> list[str]:
    def number(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    failed = [what for what, held in row["checks"].items() if held is False]
    word = "not measured" if row["passed"] is None and not failed else "passed" if row["passed"] else "FAILED"
    peers = [number(row["peers ms"][which]) for which in PEERS]
    return [row["row"], number(row["ours ms"]), *peers, number(row["ratio"], ".2f"),
            f"{word} {'; '.join(failed)}".strip()]  # fmt: skip

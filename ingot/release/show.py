"""What the command line prints of the API's answers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Answer = Mapping[str, Any]


def listed(rollouts: Sequence[Answer]) -> str:
    """A table with a line for each."""
    head = ("MODEL", "PHASE", "STEP", "WEIGHTS", "STABLE", "MESSAGE")
    rows = [(r["model"], r["phase"], r["step"], _weights(r["weights"]), r["stable"], r["message"]) for r in rollouts]
    return _table([head, *rows])


def _weights(weights: Mapping[str, float]) -> str:
    return " ".join(f"{version}={weight:g}%" for version, weight in weights.items())


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def status(found: Answer) -> str:
    """The phase, why, and who really serves."""
    return f"{found['phase']}: {found['message']}\n{_served(found)}"


def _served(found: Answer) -> str:
    """What the gateways saw: after a rollback the old version serves, whatever was being tried."""
    shares = ", ".join(f"{version} {100 * share:.3g} %" for version, share in found["serving"].items())
    effect = "" if found["in_effect"] else " (not yet in effect at every gateway)"
    return f"serving: {shares or 'no requests lately'}{effect}"


def rollout(found: Answer) -> str:
    """The whole picture."""
    return "\n".join(_rollout_lines(found))


def _rollout_lines(found: Answer) -> Iterator[str]:
    yield f"{found['model']}: {found['phase']} ({found['message']})"
    yield f"weights: {_weights(found['weights'])}   {_served(found)}"
    marks = {"done": "✔", "current": "▶", "to come": "·"}
    for step in found["steps"]:
        yield f"  {marks[step['status']]} {step['kind']} {json.dumps(step['what'], ensure_ascii=False)}"
    rows: list[tuple[str, ...]] = [("VERSION", "QPS", "ERRORS", "P50", "P90", "P99", "USERS", "AGREEMENT")]
    rows += [_figures(name, figures) for name, figures in found["versions"].items()]
    yield _table(rows)
    for verdict in found["verdicts"]:
        yield f"  {verdict['metric']} of {verdict['version']}: {verdict['outcome']}: {verdict['reason']}"


def _figures(name: str, figures: Answer) -> tuple[str, ...]:
    latencies = (milliseconds(figures[quantile]) for quantile in ("p50", "p90", "p99"))
    return (name, f"{figures['qps']:g}", _percent(figures["error_rate"]), *latencies, str(figures["users"]),
            _percent(figures["agreement"]))  # fmt: skip


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"


def milliseconds(seconds: float | None) -> str:
    """0.0123 => 12.3 ms"""
    return "–" if seconds is None else f"{1e3 * seconds:.3g} ms"


def history(entries: Iterable[Answer], figures: bool) -> str:
    """A line for each entry."""
    lines = []
    for one in entries:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["time"]))
        lines.append(f"{one['sequence']:4} {moment} {one['actor']}: {one['what']} {one['why']}".rstrip())
        if figures and one["figures"]:
            lines.append(f"     {json.dumps(one['figures'], ensure_ascii=False)}")
    return "\n".join(lines)

"""The report's part on precision: what each choice scores and takes, what every layer costs and saves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ingot.precision.report import SUFFIX, summary
from ingot.tools.html_style import Point, line_svg

Report = Mapping[str, Any]


def found(engine: str, details: Mapping[str, Any]) -> Report | None:
    """The report beside the engine where it is of this engine, else what the engine itself keeps; None without any."""
    lasting: Report | None = details.get("precision")
    beside = Path(engine + SUFFIX)
    if lasting is None or not beside.is_file():
        return lasting
    try:
        report = json.loads(beside.read_text())
        same = report["rest"] == lasting["rest"] and report["chosen"] == lasting["nodes"]
    except (ValueError, KeyError, TypeError):
        same = False
    return report if same else lasting


def section(report: Report | None) -> str:
    """Heading, sentences, plot and tables; empty for an engine that nothing was chosen for."""
    if report is None:
        return ""
    if "trials" not in report:
        return f"<h2>Precision</h2>{_lasting(report)}"
    lines = "".join(f"<p>{escape(line)}</p>" for line in summary(report))
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return f"<h2>Precision</h2>{lines}<ul>{notes}</ul>{_front(report)}{_layers(report)}{_groups(report)}"


def _lasting(report: Report) -> str:
    held, reference = report["heldout"], report["heldout_reference"]
    return (
        f"<p>{len(report['nodes'])} layers narrow, {len(report['wide'])} in {escape(report['rest'])}; "
        f"{escape(report['metric'])} {held['score']:.6g} on {held['samples']} held-out samples, float32 "
        f"{reference['score']:.6g} (budget {escape(report['budget'])}). What else was tried stands in the file "
        f"<code>{SUFFIX}</code> that is written beside an engine; one of this engine is not there.</p>"
    )


def _front(report: Report) -> str:
    trials = [t for t in report["trials"] if t["microseconds"] is not None]
    best, others = (_points([t for t in trials if t["best"] is kind]) for kind in (True, False))
    rows = "".join(_trial(t) for t in sorted(trials, key=lambda t: t["microseconds"]))
    head = _head("narrow layers", "in", "rest", "ms", "score", "±", "held out", "within", "front")
    return (
        f"<h3>Choices measured</h3>{line_svg(best, 'ms', report['metric'], others)}"
        f'<p class="muted">Joined: no other choice is both faster and better. Grey: beaten.</p>'
        f"<table>{head}{rows}</table>"
    )


def _points(trials: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Of those with a finite score; JSON has null for the others."""
    return sorted((t["microseconds"] / 1e3, t["score"], _said(t)) for t in trials if t["score"] is not None)


def _said(trial: Mapping[str, Any]) -> str:
    return (
        f"{trial['narrow']} narrow, rest {trial['rest']}: {trial['score']:.6g} in {trial['microseconds'] / 1e3:.3f} ms"
    )


def _head(*names: str) -> str:
    return f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"


def _trial(t: Mapping[str, Any]) -> str:
    held = "" if t["heldout"] is None else _number(t["heldout"])
    within = '<td class="good">yes</td>' if t["within"] else '<td class="bad">no</td>'
    return (
        f"<tr><td>{t['narrow']}</td><td>{escape(', '.join(t['kinds']))}</td><td>{escape(t['rest'])}</td>"
        f"<td>{t['microseconds'] / 1e3:.3f}</td>"
        f"<td>{_number(t['score'])}</td><td>{_number(t['margin'])}</td><td>{held}</td>{within}"
        f"<td>{'*' if t['best'] else ''}</td></tr>"
    )


def _layers(report: Report) -> str:
    """From the cheapest to the dearest, as the search took them."""
    if not report["layers"]:
        return ""
    chosen = report["chosen"]
    rows = "".join(
        f"<tr><td>{escape(s['node'])}</td><td>{_decibels(s['noise'])}</td><td>{s['gain']:.1f}</td>"
        f"<td>{escape(s['precision'])}</td>"
        f"<td>{escape(chosen.get(s['node'], report['rest']))}</td></tr>"
        for s in report["layers"]
    )
    head = _head("layer", "signal to noise at the outputs, narrow alone", "µs saved", "in", "chosen")
    return f'<h3>Layers, cheapest noise first</h3><div class="scroll"><table>{head}{rows}</table></div>'


def _groups(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{escape(g['nodes'][0])}</td><td>{len(g['nodes'])}</td><td>{_decibels(g['noise'])}</td>"
        f"<td>{_decibels(g['expected'])}</td></tr>"
        for g in report["groups"]
    )
    head = _head("group from", "layers", "signal to noise together", "if errors only added up")
    return f"<h3>Groups</h3><table>{head}{rows}</table>" if rows else ""


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def _decibels(noise: float | None) -> str:
    return "none is left" if noise is None or math.isinf(noise) else f"{-10 * math.log10(max(noise, 1e-20)):.1f} dB"

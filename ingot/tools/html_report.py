"""`ingot report model.engine -o report.html`: one self-contained page about an engine."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

import ingot
from ingot.errors import EngineError, IngotError
from ingot.plan.extent import evaluate, symbols_of
from ingot.plan.packing import Interval, lower_bound, pack
from ingot.plan.plan import MemoryPlan, Plan, Step
from ingot.runtime.profiler import StepTime
from ingot.tools import files, html_precision
from ingot.tools.html_drawing import graph_svg, memory_svg, step_colour
from ingot.tools.html_style import STYLE
from ingot.tools.inputs import make_feeds
from ingot.tools.inspect import steps_of
from ingot.tools.shapes import parse_shapes

_PROFILE_RUNS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("engine", help="an engine file")
    parser.add_argument("-o", "--output", default="report.html")
    parser.add_argument("--shapes", default="", help="shapes to time at; default: the profile's typical ones")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print the same figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Write the page; an engine of another machine is reported without times."""
    engine = ingot.Engine.load(arguments.engine).verified()
    figures = gather(engine, arguments.shapes, arguments.threads)
    figures["precision"] = html_precision.found(arguments.engine, engine.details)
    files.write(arguments.output, page(Path(arguments.engine).name, engine, figures))
    print(files.json_text(_plain(figures)) if arguments.json else f"report written to {arguments.output}")
    return 0


def gather(engine: ingot.Engine, shapes: str, threads: int | None) -> dict[str, Any]:
    """What the page shows: the plan, times per step, memory, sizes bound."""
    try:
        session = ingot.Session(engine, threads=threads)
    except EngineError as error:
        return {"plan": engine.variants[0].plan, "times": [], "note": str(error), "symbols": {}, "latency": None}
    with session:
        feeds = make_feeds(engine.inputs, parse_shapes(shapes))
        symbols = {
            d: n
            for spec in engine.inputs
            for d, n in zip(spec.shape, np.shape(feeds[spec.name]), strict=False)
            if isinstance(d, str) and d.isidentifier()
        }
        try:
            times, latency = _timed(session, feeds)
        except IngotError as error:
            if shapes:  # the user's choice; without one the sizes were only a guess
                raise
            return {"plan": session.plan, "times": [], "note": f"not timed: {error}; give --shapes",
                    "symbols": symbols, "latency": None}  # fmt: skip
        return {"plan": session.plan, "times": times, "note": "", "symbols": symbols, "latency": latency,
                "threads": session.threads}  # fmt: skip


def _timed(session: ingot.Session, feeds: Mapping[str, Any]) -> tuple[list[StepTime], float]:
    session.run(feeds)
    runs = [session.profile(feeds) for _ in range(_PROFILE_RUNS)]
    medians = [statistics.median(t.microseconds for t in column) for column in zip(*runs, strict=True)]
    times = [
        StepTime(t.name, t.nodes, t.kernel, m, t.bytes, t.flops) for t, m in zip(runs[0], medians, strict=True)
    ]  # fmt: skip
    return times, statistics.median(sum(t.microseconds for t in r) for r in runs)


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    plan: Plan = figures["plan"]
    return {
        "latency_us": figures["latency"], "note": figures["note"], "symbols": figures["symbols"],
        "steps": [vars(t) for t in figures["times"]], "memory": [m.bytes for m in plan.memory],
        "memory_lower_bound": [m.lower_bound for m in plan.memory], "precision": figures.get("precision"),
    }  # fmt: skip


def page(name: str, engine: ingot.Engine, figures: Mapping[str, Any]) -> str:
    """The whole document."""
    plan: Plan = figures["plan"]
    sections = [
        _head(name, engine, figures),
        "<h2>Graph before and after fusion</h2>" + _graphs(engine, plan, figures["times"]),
        "<h2>Time per step</h2>" + _times(plan, figures),
        "<h2>Memory over time</h2>" + _memory(plan, figures["symbols"]),
        html_precision.section(figures.get("precision")),
        "<h2>Evidence</h2>" + _evidence(engine.details.get("evidence") or []),
        "<h2>Notices</h2>" + _notices(engine.details.get("notices") or []),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}</title>'
        f"<style>{STYLE}</style><body>{''.join(sections)}</body></html>\n"
    )


def _head(name: str, engine: ingot.Engine, figures: Mapping[str, Any]) -> str:
    plan: Plan = figures["plan"]
    nodes, steps = len(engine.details.get("graph") or []), len(steps_of(plan))
    boxes = [
        ("model nodes", str(nodes)), ("engine steps", str(steps)), ("host steps", str(len(plan.host_steps))),
        ("weights", _size(len(engine.variants[0].weights))), ("code", _size(len(engine.variants[0].code))),
    ]  # fmt: skip
    if plan.memory:
        boxes.append(("activations", _size(plan.memory[0].bytes)))
    if figures["latency"]:
        boxes.insert(0, (f"one run, {figures['threads']} thread(s)", f"{figures['latency'] / 1e3:.3f} ms"))
    shown = "".join(f"<div><b>{escape(value)}</b>{escape(label)}</div>" for label, value in boxes)
    variants = ", ".join(f"{v.target} {v.isa}".strip() for v in engine.variants)
    specs = "; ".join(f"{s.name}: {s.dtype}{list(s.shape)}" for s in (*engine.inputs, *engine.outputs))
    note = f'<p class="bad">{escape(figures["note"])}</p>' if figures["note"] else ""
    line = f'<p class="muted">{escape(variants)} · {escape(specs)}</p>'
    return f'<h1>{escape(name)}</h1>{line}<div class="figures">{shown}</div>{note}'


def _graphs(engine: ingot.Engine, plan: Plan, times: Sequence[StepTime]) -> str:
    outline = [(n, op, list(sources)) for n, op, sources in engine.details.get("graph") or []]
    steps = steps_of(plan)
    owner = {node: i for i, step in enumerate(steps) for node in step.nodes}
    before = graph_svg([(n, op, sources, owner.get(n)) for n, op, sources in outline])
    sources = _sources(plan, steps)
    after = graph_svg(
        [(" + ".join(s.nodes) or s.name, f"{s.op} · {s.kernel}", sources[i], i) for i, s in enumerate(steps)]
    )
    return (
        f'<div class="two"><div><p>{len(outline)} nodes of the model; a colour is a step, grey needs none</p>'
        f'<div class="scroll">{before}</div></div>'
        f'<div><p>{len(steps)} steps of the engine</p><div class="scroll">{after}</div></div></div>'
    )


def _sources(plan: Plan, steps: Sequence[Step]) -> list[list[int]]:
    """Per step: the earlier steps that wrote what it reads, seen through views, which share a storage."""
    wrote: dict[int, int] = {}
    found = []
    for number, step in enumerate(steps):
        read = {plan.values[v].storage for v in step.inputs if v is not None}
        found.append(sorted({wrote[storage] for storage in read if storage in wrote}))
        wrote.update({plan.values[v].storage: number for v in step.outputs})
    return found


def _times(plan: Plan, figures: Mapping[str, Any]) -> str:
    times: Sequence[StepTime] = figures["times"]
    if not times:
        return '<p class="muted">This machine cannot run the engine, so there are no times.</p>'
    total = sum(t.microseconds for t in times) or 1.0
    longest = max(t.microseconds for t in times) or 1.0
    rows = []
    for index, t in enumerate(times):
        rate = f"{t.flops / t.microseconds / 1e3:.1f}" if t.flops and t.microseconds else ""
        bandwidth = f"{t.bytes / t.microseconds / 1e3:.1f}" if t.bytes and t.microseconds else ""
        width = max(1, round(220 * t.microseconds / longest))
        rows.append(
            f'<tr><td class="n">{index}</td><td>{escape(" + ".join(t.nodes) or t.name)}</td><td>{escape(t.kernel)}</td>'
            f'<td class="n">{t.microseconds:.1f}</td><td class="n">{100 * t.microseconds / total:.1f}</td>'
            f'<td class="n">{rate}</td><td class="n">{bandwidth}</td>'
            f'<td><span class="bar" style="width:{width}px;background:{step_colour(index)}"></span></td></tr>'
        )
    head = (
        '<tr><th class="n">#</th><th>nodes</th><th>kernel</th><th class="n">µs</th><th class="n">%</th>'
        '<th class="n">GFLOP/s</th><th class="n">GB/s</th><th></th></tr>'
    )
    return f'<p>Medians of {_PROFILE_RUNS} runs.</p><div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _memory(plan: Plan, symbols: Mapping[str, int]) -> str:
    memory = plan.memory[0] if plan.memory else _placed(plan, symbols)
    bounds = {**symbols, **memory.bounds}
    boxes = []
    for index, (storage, offset) in enumerate(zip(plan.storages, memory.offsets, strict=True)):
        if offset is not None and symbols_of(storage.bytes) <= bounds.keys():
            names = ", ".join(v.name for v in plan.values if v.storage == index)
            boxes.append((names or "temporary", storage.first, storage.last, offset, evaluate(storage.bytes, bounds)))
    ratio = memory.bytes / memory.lower_bound if memory.lower_bound else 1.0
    return (
        f"<p>One arena of {_size(memory.bytes)}, {ratio:.2f} times the most that is live at any step. "
        f"Across: steps; up: bytes.</p>{memory_svg(boxes, len(steps_of(plan)), memory.bytes)}"
    )


def _placed(plan: Plan, symbols: Mapping[str, int]) -> MemoryPlan:
    """Without a profile storages are placed when sizes are known: as a run of these sizes does it."""
    here = [i for i, s in enumerate(plan.storages) if s.place == "arena" and symbols_of(s.bytes) <= symbols.keys()]
    storages = [plan.storages[i] for i in here]
    intervals = [Interval(evaluate(s.bytes, symbols), s.first, s.last) for s in storages]
    offsets, total = pack(intervals)
    placed = dict(zip(here, offsets, strict=True))
    return MemoryPlan({}, tuple(placed.get(i) for i in range(len(plan.storages))), total, lower_bound(intervals))


def _evidence(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return '<p class="bad">This engine was not verified when it was built.</p>'
    cells = "".join(
        f"<tr><td>{escape(str(r['output']))}</td><td>{escape(str(r['shapes']))}</td>"
        f"<td class='n'>{r['largest']:.1e}</td><td class='n'>{r['relative']:.1e}</td>"
        f"<td class='n'>{r['cosine']:.6f}</td>"
        f"<td class='{'good' if r['passed'] else 'bad'}'>{'passed' if r['passed'] else 'FAILED'}</td></tr>"
        for r in rows
    )
    figures = "".join(f"<th class='n'>{name}</th>" for name in ("largest difference", "relative", "cosine"))
    head = f"<tr><th>output</th><th>shapes</th>{figures}<th></th></tr>"
    return f"<p>Beside the reference on the model as it was imported.</p><table>{head}{cells}</table>"


def _notices(lines: Sequence[str]) -> str:
    if not lines:
        return '<p class="good">None: every node runs natively and no tactic was dropped.</p>'
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"

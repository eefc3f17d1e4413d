"""trtexec's report in its own words: users grep it. Exports keep its JSON keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ingot.plan.plan import HostSegment, Plan, steps_of
from ingot.runtime.profiler import StepTime
from ingot.tools.latency import UNSTABLE, Sample, Summary, summarise


def number(x: float) -> str:
    """Six significant digits, as there."""
    return f"{x:.6g}"


def trace(samples: Sequence[Sample], group: int) -> list[str]:
    """The lines of `=== Trace details ===`."""
    lines = ["=== Trace details ===", f"Trace averages of {group} runs:"]
    for begin in range(0, len(samples) - group + 1, group):
        part = samples[begin : begin + group]
        latency = sum(s.latency for s in part) / group
        enqueue = sum(s.enqueue for s in part) / group
        lines.append(
            f"Average on {group} runs - GPU latency: {number(latency)} ms - Host latency: {number(latency)} ms "
            f"(enqueue {number(enqueue)} ms)"
        )
    return lines


def performance(samples: Sequence[Sample], percentiles: Sequence[float]) -> tuple[list[str], dict[str, Any]]:
    """The lines of `=== Performance summary ===` and the same as data."""
    wall = max(s.end for s in samples) - min(s.start for s in samples)
    latency = summarise([s.latency for s in samples], percentiles)
    still = summarise([0.0] * len(samples), percentiles)
    enqueue = summarise([s.enqueue for s in samples], percentiles)
    lines = [
        "=== Performance summary ===",
        f"Throughput: {number(len(samples) / wall * 1e3)} qps",
        f"Latency: {fields(latency)}",
        f"Enqueue Time: {fields(enqueue)}",
        f"H2D Latency: {fields(still)}",
        f"GPU Compute Time: {fields(latency)}",
        f"D2H Latency: {fields(still)}",
        f"Total Host Walltime: {number(wall / 1e3)} s",
        f"Total GPU Compute Time: {number(sum(s.latency for s in samples) / 1e3)} s",
        "The device is this CPU: compute time is host latency, and nothing is transferred or enqueued.",
    ]
    if latency.variation > UNSTABLE:
        lines.append(
            f"* compute time is unstable, with coefficient of variation = {number(100 * latency.variation)}%. "
            "Leave the machine to this process, or pin it, for steadier figures."
        )
    return lines, {"qps": len(samples) / wall * 1e3, "latency_ms": _plain(latency), "runs": len(samples)}


def fields(s: Summary) -> str:
    """`min = a ms, max = b ms, …`"""
    ranks = [f"percentile({number(p)}%) = {number(v)} ms" for p, v in s.percentiles.items()]
    head = [f"min = {number(s.minimum)} ms", f"max = {number(s.maximum)} ms", f"mean = {number(s.mean)} ms"]
    return ", ".join([*head, f"median = {number(s.median)} ms", *ranks])


def _plain(s: Summary) -> dict[str, float]:
    ranks = {f"p{number(p)}": v for p, v in s.percentiles.items()}
    return {"min": s.minimum, "max": s.maximum, "mean": s.mean, "median": s.median, **ranks}


def times_json(samples: Sequence[Sample]) -> list[dict[str, float]]:
    """--exportTimes"""
    return [
        {
            "startEnqMs": s.start, "endEnqMs": s.start + s.enqueue, "startH2dMs": s.start, "endH2dMs": s.start,
            "startComputeMs": s.start, "endComputeMs": s.end, "startD2hMs": s.end, "endD2hMs": s.end,
            "h2dMs": 0.0, "computeMs": s.latency, "d2hMs": 0.0, "latencyMs": s.latency,
        }
        for s in samples
    ]  # fmt: skip


def profile_json(runs: Sequence[Sequence[StepTime]]) -> list[dict[str, Any]]:
    """--exportProfile: a count, then a row per step."""
    rows = []
    columns = list(zip(*runs, strict=True))
    total = sum(t.microseconds for run in runs for t in run) or 1.0
    for times in columns:
        milliseconds = [t.microseconds / 1e3 for t in times]
        rows.append(
            {
                "name": layer_name(times[0]), "timeMs": sum(milliseconds), "averageMs": sum(milliseconds) / len(times),
                "medianMs": float(np.median(milliseconds)), "percentage": 100 * sum(milliseconds) * 1e3 / total,
            }
        )  # fmt: skip
    return [{"count": len(runs)}, *rows]


def layer_name(step: StepTime) -> str:
    """A step by the user's nodes it computes."""
    return " + ".join(step.nodes) or step.name


def profile_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """--dumpProfile"""
    lines = [
        f"=== Profile ({rows[0]['count']} iterations) ===",
        "   Time(ms)     Avg.(ms)   Median(ms)   Time(%)   Layer",
    ]
    lines += [
        f"{r['timeMs']:11.2f} {r['averageMs']:12.4f} {r['medianMs']:12.4f} {r['percentage']:9.1f}   {r['name']}"
        for r in rows[1:]
    ]
    total = sum(row["timeMs"] for row in rows[1:])
    average = sum(row["averageMs"] for row in rows[1:])
    return [*lines, f"{total:11.2f} {average:12.4f} {sum(r['medianMs'] for r in rows[1:]):12.4f} {100.0:9.1f}   Total"]


def layers_json(plan: Plan, detailed: bool) -> dict[str, Any]:
    """--exportLayerInfo"""
    layers: list[Any] = []
    for segment in plan.segments:
        steps = steps_of(segment)
        for step in steps:
            entry: dict[str, Any] = {"Name": " + ".join(step.nodes) or step.name, "LayerType": step.op}
            if detailed:
                entry |= {
                    "Inputs": [_tensor(plan, i) for i in step.inputs if i is not None],
                    "Outputs": [_tensor(plan, i) for i in step.outputs],
                    "TacticName": step.kernel, "Tactic": dict(step.tactic), "Bytes": step.bytes, "Flops": step.flops,
                    "Place": "host" if isinstance(segment, HostSegment) else segment.kind,
                }  # fmt: skip
            layers.append(entry if detailed else entry["Name"])
    return {"Layers": layers, "Bindings": [plan.values[i].name for i in (*plan.inputs, *plan.outputs)]}


def _tensor(plan: Plan, index: int) -> dict[str, Any]:
    value = plan.values[index]
    return {"Name": value.name, "Dimensions": list(value.shape), "Format/Datatype": f"{value.layout} {value.dtype}"}

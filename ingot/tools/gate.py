"""`ingot gate old.engine new.engine --data …`: may the new engine take the old one's place? 1 if not, with the samples
that changed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ingot
from ingot.errors import ConfigError
from ingot.precision import budget, metric
from ingot.precision.data import samples
from ingot.precision.metric import Change, Metric
from ingot.precision.spool import held
from ingot.tools import files

_LISTED = 20


@dataclass(frozen=True)
class Verdict:
    """Scores of both engines, what may be lost, and what became of every sample."""

    metric: str
    old: float
    new: float
    allowed: float
    passed: bool
    samples: int
    lowest_cosine: float
    decibels: float
    changes: tuple[Change, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("old", help="the engine that is in use")
    parser.add_argument("new", help="the engine that shall replace it")
    parser.add_argument("--data", required=True, help="samples: .npy, .npz, a folder of them, or a Python file")
    built_in = ", ".join(metric.BUILT_IN)
    parser.add_argument("--metric", help=f"a Python file with metric(outputs, samples), or {built_in}")
    parser.add_argument("--max-drop", default="0", help="what may be lost, e.g. 0.5%% or 0.02 or 30dB; default nothing")
    parser.add_argument("--max-changed", type=int, help="also refuse when more samples than this changed")
    parser.add_argument("--samples", type=int, help="use the first so many samples")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Ask both engines, print the verdict; 0 if the new one passes."""
    verdict = judge(arguments)
    content = asdict(verdict)
    print(files.json_text(content) if arguments.json else "\n".join(_lines(verdict)))
    return 0 if verdict.passed else 1


def judge(arguments: argparse.Namespace) -> Verdict:
    """The verdict on two engine files."""
    old, new = (ingot.Engine.load(path) for path in (arguments.old, arguments.new))
    _refuse_others(old, new)
    judged = metric.load(arguments.metric)
    allowed = budget.parse(_limit(arguments.max_drop, judged), judged)
    data = samples(arguments.data, old.inputs)
    chosen = held(data if arguments.samples is None else data.take(arguments.samples))
    before, after = (_answers(engine, chosen, arguments.threads) for engine in (old, new))
    was, now = judged(before, chosen, before), judged(after, chosen, before)
    changed = tuple(metric.changes(before, after))
    few = arguments.max_changed is None or len(changed) <= arguments.max_changed
    return Verdict(
        judged.name, was, now, allowed.floor(was), allowed.allows(now, was) and few, len(chosen),
        min(metric.cosines(after, before), default=1.0), metric.decibels(after, before), changed,
    )  # fmt: skip


def _limit(text: str, judged: Metric) -> str:
    """Nothing may be lost unless it is said; of decibels there is no "nothing"."""
    return "200dB" if judged.name == "snr" and text == "0" else text


def _refuse_others(old: ingot.Engine, new: ingot.Engine) -> None:
    names = [[spec.name for spec in engine.inputs] for engine in (old, new)]
    if names[0] != names[1]:
        raise ConfigError(f"{old.source} takes {', '.join(names[0])}, {new.source} takes {', '.join(names[1])}: "
                          "these are not two engines of one model")  # fmt: skip
    missing = {spec.name for spec in old.outputs} - {spec.name for spec in new.outputs}
    if missing:
        raise ConfigError(f"{new.source} has no output {min(missing)!r}, which {old.source} has")


def _answers(engine: ingot.Engine, chosen: Sequence[Any], threads: int | None) -> list[dict[str, Any]]:
    with ingot.Session(engine, threads=threads) as session:
        return metric.answers(session.run, chosen, [spec.name for spec in engine.inputs])


def _lines(verdict: Verdict) -> list[str]:
    lines = [
        f"{'PASSED' if verdict.passed else 'FAILED'} {verdict.metric}: old {verdict.old:.6g}, new {verdict.new:.6g}, "
        f"at least {verdict.allowed:.6g} needed",
        f"outputs: lowest cosine {verdict.lowest_cosine:.6f}, signal to noise {verdict.decibels:.1f} dB",
        f"{len(verdict.changes)} of {verdict.samples} samples changed",
    ]
    lines += [
        f"  sample {c.index}: {c.output} was {c.was}, is {c.now} (cosine {c.cosine:.4f})"
        for c in verdict.changes[:_LISTED]
    ]
    hidden = len(verdict.changes) - _LISTED
    return [*lines, f"  … and {hidden} more (--json lists all)"] if hidden > 0 else lines

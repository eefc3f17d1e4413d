"""`ingot release publish`: build, verify, gate on accuracy, benchmark, register the version, start its rollout.

The step of a CI pipeline, in one command, and resumable: what is done is kept in the work folder under the digest
of the model and of all that matters to the step, and passed over the next time.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ingot.engine import Engine
from ingot.release.access import reached
from ingot.release.spec import ReleaseError
from ingot.runtime.session import Session

_BATCH = 64


class GateClosed(ReleaseError):
    """The model was built, but is not good or fast enough."""


@dataclass
class Publication:
    """A run: its arguments, what earlier steps found, what has been done before."""

    arguments: argparse.Namespace
    folder: Path
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> Path:
        """The built file."""
        return self.folder / "model.engine"

    @property
    def registered(self) -> Path:
        """The engine's place in the repository."""
        return (
            Path(self.arguments.repository) / f"{self.arguments.name}_{self.arguments.version}" / "1" / "model.engine"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What it takes."""
    add = parser.add_argument
    add("model", type=Path, help="an ONNX file")
    add("--name", required=True, help="the model's name in rollout.yaml")
    add("--version", required=True, help="the new version's name")
    add("--data", type=Path, required=True, help=".npz: an array for each input, and `labels`")
    add("--metric", default="accuracy", help="accuracy, or module:function(outputs, labels) -> float, larger is better")
    add("--minimum", type=float, required=True, help="least value of the metric")
    add("--drop", type=float, default=None, help="largest loss against --baseline")
    add("--baseline", type=Path, help="the stable version's engine")
    add("--max-latency", type=float, metavar="MS", help="largest median latency of one request")
    add("--repository", type=Path, required=True, help="the servers' model repository")
    add("--rollout", type=Path, help="rollout.yaml to apply at the end")
    add("--shapes", default="", help="as in `ingot build`")
    add("--level", type=int, default=1, help="as in `ingot build`")
    add("--work", type=Path, default=Path("build/publish"), help="where finished steps are kept")


def run(arguments: argparse.Namespace) -> int:
    """Every step in order; a step that is done is passed over. GateClosed ends it before anything is registered."""
    folder = arguments.work / f"{arguments.name}_{arguments.version}"
    folder.mkdir(parents=True, exist_ok=True)
    publication = Publication(arguments, folder)
    for step in STEPS:
        begun = time.monotonic()
        key = _key(publication, step)
        done = _done(publication, step, key)
        publication.found[step.name] = done if done is not None else step.action(publication)
        if done is None:
            _remember(publication, step, key)
        took = "done before" if done is not None else f"{time.monotonic() - begun:.1f} s"
        print(f"{step.name:9} {took:>12}  {_said(publication.found[step.name])}", flush=True)
    return 0


@dataclass(frozen=True)
class Step:
    """One step; `matters` names the arguments that it depends on besides what earlier steps found."""

    name: str
    action: Callable[[Publication], dict[str, Any]]
    matters: tuple[str, ...] = ()
    leaves: Callable[[Publication], Path] | None = None


def _key(publication: Publication, step: Step) -> str:
    """Changes when anything changes that the step depends on."""
    values = {name: _content(getattr(publication.arguments, name)) for name in step.matters}
    return hashlib.sha256(json.dumps([values, publication.found], sort_keys=True).encode()).hexdigest()


def _content(value: Any) -> Any:
    return _digest(value) if isinstance(value, Path) and value.is_file() else str(value)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _done(publication: Publication, step: Step, key: str) -> dict[str, Any] | None:
    path = publication.folder / f"{step.name}.json"
    if not path.exists() or (step.leaves is not None and not step.leaves(publication).exists()):
        return None
    content = json.loads(path.read_text())
    return content["found"] if content["key"] == key else None


def _remember(publication: Publication, step: Step, key: str) -> None:
    path = publication.folder / f"{step.name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"key": key, "found": publication.found[step.name]}, indent=1))
    os.replace(part, path)


def _said(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
    )


# -- steps ------------------------------------------------------------------------------------------------------------
def _build(publication: Publication) -> dict[str, Any]:
    """In a child: a release process never holds a compiler."""
    arguments = publication.arguments
    words = [sys.executable, "-m", "ingot", "build", str(arguments.model), "-o", str(publication.engine), "--quiet",
             f"--level={arguments.level}", *([f"--shapes={arguments.shapes}"] if arguments.shapes else [])]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ReleaseError(f"{arguments.model} was not built: {done.stderr.strip().splitlines()[-1]}")
    return {"engine": _digest(publication.engine)[:16], "bytes": publication.engine.stat().st_size}


def _verify(publication: Publication) -> dict[str, Any]:
    """The build compared it with the reference: an engine without that evidence is refused."""
    evidence = Engine.load(publication.engine).details.get("evidence")
    if not evidence:
        raise GateClosed(f"{publication.engine} holds no evidence that it computes what the model means")
    return {"outputs": len(evidence), "largest_difference": max(float(one["largest"]) for one in evidence)}


def _gate(publication: Publication) -> dict[str, Any]:
    """The metric on the data; against the baseline's where one is named."""
    arguments = publication.arguments
    value = measured(publication.engine, arguments.data, arguments.metric)
    found: dict[str, Any] = {arguments.metric: value}
    if value < arguments.minimum:
        raise GateClosed(f"{arguments.metric} {value:.4g} is below --minimum {arguments.minimum:g}")
    if arguments.baseline is not None and arguments.drop is not None:
        before = found["baseline"] = measured(arguments.baseline, arguments.data, arguments.metric)
        if before - value > arguments.drop:
            raise GateClosed(
                f"{arguments.metric} fell from {before:.4g} to {value:.4g}, more than --drop {arguments.drop:g}"
            )
    return found


def measured(engine: Path, data: Path, metric: str) -> float:
    """The metric of an engine on a file of data."""
    arrays = dict(np.load(data))
    if "labels" not in arrays:
        raise ReleaseError(f"{data} has no array `labels`")
    labels = arrays.pop("labels")
    with Session(Engine.load(engine), threads=1) as session:
        outputs = predicted(session, arrays, len(labels))
    return float(_metric(metric)(outputs, labels))


def predicted(session: Session, arrays: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Outputs for all rows, in batches the engine takes."""
    specs = session.engine.inputs
    if len(specs) == 1 and len(arrays) == 1:  # one input and one array: their names need not agree
        arrays = {specs[0].name: next(iter(arrays.values()))}
    missing = [spec.name for spec in specs if spec.name not in arrays]
    if missing:
        raise ReleaseError(f"--data has no array for the input {missing[0]!r}; it has {', '.join(sorted(arrays))}")
    size = min([_BATCH, *(spec.max[0] for spec in specs if spec.max)])
    pieces = []
    for start in range(0, count, size):
        feeds = {spec.name: arrays[spec.name][start : start + size].astype(spec.dtype) for spec in specs}
        pieces.append(session.run(feeds))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _metric(name: str) -> Callable[[dict[str, np.ndarray], np.ndarray], float]:
    if name == "accuracy":
        return lambda outputs, labels: float((next(iter(outputs.values())).argmax(-1) == labels).mean())
    module, found, function = name.partition(":")
    if not found:
        raise ReleaseError(f"--metric must be accuracy or module:function, not {name!r}")
    return getattr(importlib.import_module(module), function)


def _benchmark(publication: Publication) -> dict[str, Any]:
    """Median latency of single requests on this machine."""
    arrays = {name: array for name, array in np.load(publication.arguments.data).items() if name != "labels"}
    with Session(Engine.load(publication.engine), threads=1) as session:
        one = {name: array[:1] for name, array in arrays.items()}
        for _ in range(20):
            predicted(session, dict(one), 1)
        times = []
        for _ in range(200):
            begun = time.perf_counter()
            predicted(session, dict(one), 1)
            times.append(1e3 * (time.perf_counter() - begun))
    median, most = statistics.median(times), publication.arguments.max_latency
    if most is not None and median > most:
        raise GateClosed(f"median latency {median:.3g} ms is above --max-latency {most:g} ms")
    return {"p50_ms": median, "p99_ms": sorted(times)[197]}


def _register(publication: Publication) -> dict[str, Any]:
    """Into the repository, whole or not at all, with what is known of it beside it."""
    target = publication.registered
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    shutil.copy(publication.engine, part)
    os.replace(part, target)
    (target.parent.parent / "published.json").write_text(json.dumps(publication.found, indent=1))
    return {"model": target.parent.parent.name}


def _start(publication: Publication) -> dict[str, Any]:
    """Apply the rollout; the same one again changes nothing."""
    arguments = publication.arguments
    if arguments.rollout is None:
        return {"rollout": "none named"}
    access = reached(arguments.server, arguments.store, arguments.key_file)
    return {"rollout": access.apply(arguments.rollout.read_text(), str(arguments.rollout))["phase"]}


STEPS = (
    Step("build", _build, ("model", "shapes", "level"), lambda publication: publication.engine),
    Step("verify", _verify),
    Step("gate", _gate, ("data", "metric", "minimum", "drop", "baseline")),
    Step("benchmark", _benchmark, ("data", "max_latency")),
    Step("register", _register, ("repository",), lambda publication: publication.registered),
    Step("start", _start, ("rollout", "server", "store")),
)

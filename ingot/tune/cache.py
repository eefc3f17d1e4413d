"""The timing cache: what was measured, by node signature and candidate, in one JSON file for any number of places.

A place is a processor, an instruction set, a compiler and the generators' sources; times of another place are kept but
not used, and the build report says in a sentence what differs. Writing merges with what other builds wrote meanwhile.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ingot.errors import ConfigError
from ingot.ir.expression import Expression, Literal
from ingot.kernels import Candidate
from ingot.kernels.node import Node
from ingot.kernels.target import Target
from ingot.runtime import cuda

Outcome = float | str  # microseconds, or why the candidate has none
Times = dict[str, dict[str, Outcome]]
_SCALING = ("Mul", "Quantize", "Dequantize")
_FORMAT = "ingot timing cache 1"
_PARTS = ("processor", "instruction set", "compiler", "kernel generators")


@lru_cache(maxsize=1)
def generator_fingerprint() -> str:
    """Digest of the kernel generators' sources: a changed generator does not inherit old times."""
    sha = hashlib.sha256()
    root = Path(__file__).parents[1]
    measuring = (root / "tune" / f"{name}.py" for name in ("measure", "cold", "cuda_measure", "draws"))
    for path in (*sorted((root / "kernels").rglob("*.py")), *measuring):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor as the system names it: virtual machines differ in family and model where names are alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    found: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        found.setdefault(name.strip(), value.strip())
    numbers = "/".join(found.get(key, "?") for key in ("cpu family", "model", "stepping"))
    return f"{found.get('model name', 'unknown processor')} ({numbers})"


def place_of(target: Target) -> str:
    """Where times are taken: they are not comparable with those of another place."""
    if target.target == "cpu":
        return " | ".join((processor(), target.name, f"llvmlite {version('llvmlite')}", generator_fingerprint()))
    return " | ".join((cuda.select("cuda").name, target.name, f"triton {version('triton')}", generator_fingerprint()))


def signature(node: Node, distance: int = 0) -> str:
    """What of a node decides its speed: op, ports, attributes, epilogue, how far weights are (`cold.distance`); not
    names, not weights' values, nor those of quantized layers' scales."""
    ports = [p and [p.dtype, list(p.shape), p.constant is not None] for p in (*node.inputs, None, *node.outputs)]
    parts = [node.op, ports, sorted(node.attributes.items()), _shape_of(node.epilogue), distance]
    text = json.dumps(parts, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _shape_of(epilogue: Expression) -> str:
    """The epilogue but for numbers that are multiplied with: kernels of two layers that differ there take as long."""
    one = Literal(1.0)
    known = [replace(i, operands=tuple(one if isinstance(o, Literal) else o for o in i.operands))
             if i.op in _SCALING else i for i in epilogue.instructions]  # fmt: skip
    return repr(Expression(tuple(known)))


def candidate_key(candidate: Candidate) -> str:
    """A candidate as text."""
    ports = f"{','.join(candidate.ports.inputs)}>{','.join(candidate.ports.outputs)}"
    return f"{candidate.label} {ports}"


class TimingCache:
    """Outcomes by (place, node signature, candidate). Without a path it lasts as long as the build."""

    def __init__(self, path: Path | None, target: Target) -> None:
        self.path, self.place = path, place_of(target)
        places = read(path) if path is not None else {}
        self.times: Times = places.pop(self.place, {})
        self.foreign = tuple(places)
        self._new: Times = {}

    @property
    def mismatch(self) -> str | None:
        """Why a file with times has none for this place, in a sentence; None when it has some or is empty."""
        if self.times or not self.foreign:
            return None
        return min((_differences(other, self.place) for other in self.foreign), key=lambda d: d.count(";"))

    def get(self, node: str, candidate: str) -> float | None:
        """A measured time."""
        outcome = self.times.get(node, {}).get(candidate)
        return None if isinstance(outcome, str) else outcome

    def failure(self, node: str, candidate: str) -> str | None:
        """Why the candidate was lost when it was tried."""
        outcome = self.times.get(node, {}).get(candidate)
        return outcome if isinstance(outcome, str) else None

    def passed(self, node: str, candidates: Iterable[str]) -> dict[str, float]:
        """The times of those that have one."""
        return {name: time for name in candidates if (time := self.get(node, name)) is not None}

    def put(self, node: str, candidate: str, outcome: Outcome) -> None:
        """Remember a time or a failure."""
        kept = outcome if isinstance(outcome, str) else round(outcome, 3)
        self.times.setdefault(node, {})[candidate] = kept
        self._new.setdefault(node, {})[candidate] = kept

    def save(self) -> None:
        """Merge what is new into the file and replace it atomically. The file is there afterwards even when no node was
        worth timing: whoever asked for it reads it."""
        if self.path is not None and (self._new or not self.path.exists()):
            _update(self.path, {self.place: self._new} if self._new else {})
            self._new = {}


def merge(target: Path, sources: list[Path]) -> None:
    """Add the times of other files to `target`, which need not exist; the last file wins where both know a time."""
    for source in sources:
        if not source.exists():
            raise ConfigError(f"there is no timing cache {source}")
        _update(target, read(source))


def reset(path: Path) -> None:
    """Forget all times. ConfigError when the file is not a timing cache: it is left alone."""
    read(path)
    with _locked(path):
        _write(path, {})


def _update(path: Path, added: Mapping[str, Times]) -> None:
    with _locked(path):
        places = read(path)
        for place, times in added.items():
            known = places.setdefault(place, {})
            for node, outcomes in times.items():
                known.setdefault(node, {}).update(outcomes)
        _write(path, places)


def _differences(other: str, mine: str) -> str:
    """What sets two places apart."""
    pairs = zip(_PARTS, other.split(" | "), mine.split(" | "), strict=False)
    said = [_difference(part, theirs, ours) for part, theirs, ours in pairs if theirs != ours]
    return "; ".join(said)


def _difference(part: str, theirs: str, ours: str) -> str:
    if part == _PARTS[-1]:
        return "its times are of other sources of the kernel generators"
    return f"its times are of the {part} {theirs!r}, this build's is {ours!r}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Nobody else updates the file meanwhile. The lock is a file of its own, since the cache itself is replaced."""
    try:
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise ConfigError(f"cannot write the timing cache {path}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _write(path: Path, places: Mapping[str, Times]) -> None:
    text = json.dumps({"format": _FORMAT, "machines": places}, sort_keys=True)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigError(f"cannot write the timing cache {path}: {error.strerror}") from None
        raise


def read(path: Path) -> dict[str, Times]:
    """Times by place; none where there is no file yet. ConfigError when the file is something else."""
    if not path.exists():
        if not path.parent.is_dir():
            raise ConfigError(f"the timing cache {path} has no folder to be written in: make {path.parent} first")
        return {}
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise ConfigError(f"{path} is a {content['format']!r}, this Ingot writes {_FORMAT!r}; delete it and build")
        return {str(place): _checked(times) for place, times in content["machines"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a timing cache ({said}); delete it or name another file") from None


def _checked(times: Any) -> Times:
    for node, outcomes in times.items():
        for candidate, outcome in outcomes.items():
            if not isinstance(outcome, str) and (isinstance(outcome, bool) or not 0 <= outcome < float("inf")):
                raise ValueError(f"the time of {candidate!r} of node {node} is {outcome!r}")
    return dict(times)

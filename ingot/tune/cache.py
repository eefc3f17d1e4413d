"""The timing cache: what was measured, by node signature and candidate, in one JSON file that machines do not share.

The file names the processor and the generator's fingerprint it belongs to; entries of another are kept but not used,
and
the build report says so. Writing merges with what another build wrote meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from ingot.errors import ConfigError
from ingot.kernels import Candidate
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.node import Node

_FORMAT = "ingot timing cache 1"


@lru_cache(maxsize=1)
def generator_fingerprint() -> str:
    """Digest of the kernel generators' sources: a changed generator does not inherit old times."""
    sha = hashlib.sha256()
    for path in sorted((Path(__file__).parents[1] / "kernels").rglob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def signature(node: Node) -> str:
    """What of a node decides its speed: op, ports, attributes, epilogue; not names, not weights' values."""
    ports = [p and [p.dtype, list(p.shape), p.constant is not None] for p in (*node.inputs, None, *node.outputs)]
    text = json.dumps([node.op, ports, sorted(node.attributes.items()), repr(node.epilogue)], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def candidate_key(candidate: Candidate) -> str:
    """A candidate as text."""
    ports = f"{','.join(candidate.ports.inputs)}>{','.join(candidate.ports.outputs)}"
    return f"{candidate.label} {ports}"


class TimingCache:
    """Microseconds by (machine, node signature, candidate)."""

    def __init__(self, path: Path | None, isa: Isa) -> None:
        self._path, self._place = path, f"{processor()} | {isa.name} | {generator_fingerprint()}"
        self._all = _read(path)
        self.times: dict[str, dict[str, float]] = self._all.setdefault(self._place, {})
        self.changed = False

    @property
    def foreign(self) -> list[str]:
        """Other machines or generators the file holds times of."""
        return [place for place in self._all if place != self._place]

    def get(self, node: str, candidate: str) -> float | None:
        """A measured time."""
        return self.times.get(node, {}).get(candidate)

    def put(self, node: str, candidate: str, microseconds: float) -> None:
        """Remember a time (infinite: the candidate failed)."""
        self.times.setdefault(node, {})[candidate] = round(microseconds, 3)
        self.changed = True

    def save(self) -> None:
        """Merge into the file and replace it atomically."""
        if self._path is None or not self.changed:
            return
        merged = _read(self._path)
        mine = merged.setdefault(self._place, {})
        for node, times in self.times.items():
            mine.setdefault(node, {}).update(times)
        _write(self._path, json.dumps({"format": _FORMAT, "machines": merged}, sort_keys=True))


def _write(path: Path, text: str) -> None:
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


def _read(path: Path | None) -> dict[str, Any]:
    if path is None or not path.exists():
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"the timing cache {path} has no folder to be written in: make {path.parent} first")
        return {}
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise KeyError("format")
        return dict(content["machines"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a timing cache ({error}); delete it or name another file") from None

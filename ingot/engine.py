"""The engine file: header and variants (plan, code, packed weights), every byte covered by a SHA-256.

Layout: magic, header length (u64), SHA-256 of the header, header (JSON); then sections at multiples of 4 KiB. The
header
lists each section's offset, size and one digest per 4 MiB chunk. Weights are mapped, never copied. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ingot.errors import EngineError
from ingot.plan.plan import Plan, TensorSpec, decode, from_json, to_json

MAGIC = b"INGOTENG"
FORMAT = 1
CHUNK = 4 << 20
PAGE = 4096
_PREFIX = struct.Struct("<8sIIQ32s")  # magic, format, reserved, header length, header digest
_MAX_HEADER = 256 << 20
Bytes = bytes | memoryview


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to run the model: `requires` are the machine features it needs, `symbols` the code's entry points."""

    target: str
    isa: str
    requires: tuple[str, ...]
    plan_json: Bytes
    code: Bytes = b""
    symbols: Mapping[str, int] = field(default_factory=dict)
    weights: Bytes = b""

    @cached_property
    def plan(self) -> Plan:
        """The plan, read on first use."""
        return from_json(bytes(self.plan_json))


@dataclass(frozen=True, eq=False)
class Engine:
    """A compiled model. `details` holds profiles, config, model digest, toolchain, evidence and requirements."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: tuple[Variant, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    source: str = "this engine"
    _pending: _WeightCheck | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Engine:
        """Map an engine file: header, plans and code are checked now, weights in the background (see `verified`)."""
        return _load(Path(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write atomically: a failure (a full disk, Ctrl-C) leaves an older file at `path` as it was."""
        _save(self, Path(path))

    def to_bytes(self) -> bytes:
        """The file's bytes; the same engine gives the same bytes."""
        return b"".join(bytes(part) for part in _parts(self))

    def verified(self) -> Engine:
        """Wait until every weight byte has been checked; EngineError if one is wrong."""
        if self._pending is not None:
            self._pending.wait()
        return self

    def pick(self, targets: Sequence[str], features: frozenset[str], machine: str) -> Variant:
        """The best variant (first in the file's order) of the targets that runs on a machine with these features."""
        for variant in self.variants:
            if variant.target in targets and frozenset(variant.requires) <= features:
                return variant
        held = "; ".join(f"{v.target} {v.isa}".strip() for v in self.variants) or "nothing"
        raise EngineError(
            f"{self.source} holds no variant for this machine: it holds {held}; this machine is {machine}. "
            "Rebuild it here, or add the variant with --variants"
        )


class _WeightCheck:
    """Digests of weight chunks, computed on two threads from load on."""

    def __init__(self, jobs: Sequence[tuple[memoryview, str]], source: str) -> None:
        self._source, self._lock, self._done = source, threading.Lock(), False
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="ingot-verify")
        self._results = [self._pool.submit(_matches, chunk, digest) for chunk, digest in jobs]

    def wait(self) -> None:
        with self._lock:
            if self._done:
                return
            good = [result.result() for result in self._results]
            self._pool.shutdown()
            if not all(good):
                raise EngineError(
                    f"{self._source}: weight chunk {good.index(False)} is damaged; copy or build it again"
                )
            self._done = True


def _matches(chunk: memoryview, digest: str) -> bool:
    return hashlib.sha256(chunk).hexdigest() == digest


# -- writing ----------------------------------------------------------------------------------------------------------


def _digests(data: Bytes) -> list[str]:
    view = memoryview(data)
    return [hashlib.sha256(view[i : i + CHUNK]).hexdigest() for i in range(0, len(view), CHUNK)]


def _parts(engine: Engine) -> list[Bytes]:
    sections: list[tuple[Bytes, dict[str, Any]]] = []
    variants = []
    for variant in engine.variants:
        entry: dict[str, Any] = {
            "target": variant.target, "isa": variant.isa, "requires": list(variant.requires),
            "symbols": dict(variant.symbols),
        }  # fmt: skip
        for name, data in (("plan", variant.plan_json), ("code", variant.code), ("weights", variant.weights)):
            entry[name] = len(sections)
            sections.append((data, {"size": len(data), "sha256": _digests(data)}))
        variants.append(entry)
    offset = 0
    for data, entry in sections:
        entry["offset"] = offset
        offset += -(-len(data) // PAGE) * PAGE
    header = {
        "inputs": [_spec_json(s) for s in engine.inputs],
        "outputs": [_spec_json(s) for s in engine.outputs],
        "variants": variants,
        "sections": [entry for _, entry in sections],
        "details": dict(engine.details),
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _PREFIX.size) % PAGE)
    parts: list[Bytes] = [_PREFIX.pack(MAGIC, FORMAT, 0, len(text), hashlib.sha256(text).digest()), text]
    for data, _ in sections:
        parts += [data, b"\0" * (-len(data) % PAGE)]
    return parts


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "shape": spec.shape,
        "min": spec.min,
        "opt": spec.opt,
        "max": spec.max,
    }


def _save(engine: Engine, path: Path) -> None:
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file():
        raise EngineError(f"cannot write {path}: it is not a file that could be replaced")
    parts = _parts(engine)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise EngineError(f"cannot write {path}: {error.strerror}; what was there before is untouched") from None
        raise


# -- reading ----------------------------------------------------------------------------------------------------------


def _load(path: Path) -> Engine:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _PREFIX.size:
                raise EngineError(f"{path} is not an Ingot engine: it is only {size} bytes long")
            data = memoryview(mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from None
    return _parse(data, str(path))


def _parse(data: memoryview, source: str) -> Engine:
    magic, version, reserved, length, digest = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise EngineError(f"{source} is not an Ingot engine (its first bytes are {bytes(magic)!r})")
    if version != FORMAT or reserved:
        raise EngineError(
            f"{source} has engine format {version}, this Ingot reads {FORMAT}; rebuild it or update Ingot"
        )
    text = data[_PREFIX.size : _PREFIX.size + length]
    if length > _MAX_HEADER or len(text) != length or hashlib.sha256(text).digest() != digest:
        raise EngineError(f"{source}: the header is damaged; copy or build it again")
    try:
        return _from_header(json.loads(bytes(text)), data, _PREFIX.size + length, source)
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise EngineError(f"{source}: the header makes no sense ({error}); build it again") from None


def _from_header(header: dict[str, Any], data: memoryview, start: int, source: str) -> Engine:
    views = [_section(entry, data, start) for entry in header["sections"]]
    _check_padding(header["sections"], data, start, source)
    weight_jobs: list[tuple[memoryview, str]] = []
    variants = []
    for entry in header["variants"]:
        for name in ("plan", "code"):
            _check_now(views[entry[name]], header["sections"][entry[name]]["sha256"], f"{source}: the {name}")
        weights = views[entry["weights"]]
        weight_jobs += _chunks(weights, header["sections"][entry["weights"]]["sha256"])
        variants.append(
            Variant(
                entry["target"], entry["isa"], tuple(entry["requires"]), views[entry["plan"]], views[entry["code"]],
                entry["symbols"], weights,
            )
        )  # fmt: skip
    specs = [tuple(decode(TensorSpec, s) for s in header[side]) for side in ("inputs", "outputs")]
    return Engine(specs[0], specs[1], tuple(variants), header["details"], source, _WeightCheck(weight_jobs, source))


def _section(entry: dict[str, Any], data: memoryview, start: int) -> memoryview:
    offset, size = entry["offset"], entry["size"]
    if offset < 0 or size < 0 or offset % PAGE or start + offset + size > len(data):
        raise ValueError("a section lies outside the file; it was cut short")
    if len(entry["sha256"]) != -(-size // CHUNK):
        raise ValueError("a section has too few digests")
    return data[start + offset : start + offset + size]


def _check_padding(sections: list[dict[str, Any]], data: memoryview, start: int, source: str) -> None:
    """The gaps between sections are zero and the file ends with the last one: no byte goes unchecked."""
    end = start
    for entry in sorted(sections, key=lambda s: (s["offset"], s["size"])):
        if start + entry["offset"] != end and entry["size"]:
            raise ValueError("sections overlap or leave a hole")
        stop = start + entry["offset"] + entry["size"]
        end = start + entry["offset"] + -(-entry["size"] // PAGE) * PAGE
        if any(data[stop:end]):
            raise EngineError(f"{source}: bytes between sections are damaged; copy or build it again")
    if end != len(data):
        raise EngineError(f"{source} is {len(data)} bytes long, its header says {end}; copy or build it again")


def _chunks(view: memoryview, digests: list[str]) -> list[tuple[memoryview, str]]:
    return [(view[i * CHUNK : (i + 1) * CHUNK], digest) for i, digest in enumerate(digests)]


def _check_now(view: memoryview, digests: list[str], what: str) -> None:
    if not all(_matches(chunk, digest) for chunk, digest in _chunks(view, digests)):
        raise EngineError(f"{what} is damaged; copy or build it again")


def plan_bytes(plan: Plan) -> bytes:
    """A plan as the bytes of its section."""
    return to_json(plan).encode()

"""Ranges in a text file: calibrated once, used by every build of the same model.

    Ingot-1 model 0123456789abcdef samples 256
    conv1/input: 3c010a14 {"low": -0.9, "high": 1.0, …}

After the name comes the scale of symmetric 8 bits, a float32 in hexadecimal, as TensorRT writes it. Its caches are read
too: their ranges are as wide below 0 as above.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ingot.errors import ConfigError
from ingot.precision import nodes
from ingot.precision.ranges import Ranges, TensorRange
from ingot.tools import files

Array = np.ndarray[Any, Any]
_LARGEST = 127
_OURS = re.compile(r"Ingot-1 model (?P<model>[0-9a-f]{16}) samples (?P<samples>\d+)")
_TENSORRT = re.compile(r"TRT-\d+-(?P<calibrator>\w+)")
_LINE = re.compile(r"(?P<name>.+): (?P<scale>[0-9a-fA-F]{1,8})(?: (?P<more>\{.*\}))?")
_ARRAYS = ("lows", "highs", "energy")


def save(path: str | Path, ranges: Ranges, model: ir.Model) -> None:
    """Write the file, whole or not at all. ConfigError names the reason it cannot be written."""
    lines = [f"Ingot-1 model {fingerprint(model)} samples {ranges.samples}"]
    lines += [f"{name}: {_hexadecimal(known.magnitude / _LARGEST)} {_more(known)}" for name, known in ranges.items()]
    files.write(path, "\n".join(lines) + "\n")


def load(path: str | Path, model: ir.Model) -> Ranges:
    """The ranges; ConfigError where the file is none, or of another model."""
    text = _text(Path(path))
    header, _, rest = text.partition("\n")
    ours, theirs = _OURS.fullmatch(header.strip()), _TENSORRT.match(header.strip())
    if ours is None and theirs is None:
        raise ConfigError(f"{path} is no calibration cache: it begins with {header[:40]!r}, not with Ingot-1 or TRT-")
    tensors = dict(_tensors(rest, Path(path), theirs["calibrator"] if theirs else "cache"))
    if ours is not None and ours["model"] != fingerprint(model):
        raise ConfigError(f"{path} was calibrated for another model, or for other weights: give a new file name to "
                          "calibrate this one, or delete it")  # fmt: skip
    missing = [t for t in nodes.targets(nodes.prepared(model)) if ours is None and t.x.name not in tensors]
    if missing:
        raise ConfigError(f"{path} has no range for {missing[0].x.name!r}, which node {missing[0].name!r} reads, "
                          f"nor for {len(missing) - 1} more: it is of another model")  # fmt: skip
    return Ranges(tensors, int(ours["samples"]) if ours else 0)


def remembered(path: str | Path | None, model: ir.Model, calibrated: Callable[[], Ranges]) -> Ranges:
    """What the file holds if there is one; else what `calibrated` finds, written there."""
    if path is not None and Path(path).exists():
        return load(path, model)
    if path is not None and not Path(path).parent.is_dir():  # said before the samples have been gone through
        raise ConfigError(f"cannot write {path}: there is no folder {Path(path).parent}")
    found = calibrated()
    if path is not None:
        save(path, found, model)
    return found


def fingerprint(model: ir.Model) -> str:
    """Of the products that may be narrow: their names, what they read, their weights."""
    sha = sha256()
    for target in nodes.targets(nodes.prepared(model)):
        sha.update(f"{target.name}:{target.x.name}:{target.array.shape}:{target.array.dtype};".encode())
        sha.update(np.ascontiguousarray(target.array).data)
    return sha.hexdigest()[:16]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the calibration cache {path} cannot be read: {error}") from None


def _tensors(text: str, path: Path, calibrator: str) -> Iterator[tuple[str, TensorRange]]:
    for number, line in enumerate(text.splitlines(), 2):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line.rstrip())
        known = _range(found, calibrator) if found else None
        if found is None or known is None:
            raise ConfigError(f"{path}, line {number}: {line[:60]!r} is no tensor's name with its scale; the file is "
                              "damaged: delete it to calibrate again")  # fmt: skip
        yield found["name"], known


def _range(found: re.Match[str], calibrator: str) -> TensorRange | None:
    """None where the numbers are none."""
    magnitude = struct.unpack(">f", bytes.fromhex(found["scale"].zfill(8)))[0] * _LARGEST
    if not np.isfinite(magnitude) or magnitude < 0:
        return None
    if found["more"] is None:
        return TensorRange(-magnitude, magnitude, calibrator)
    try:
        return _described(json.loads(found["more"]))
    except (ValueError, KeyError, TypeError):
        return None


def _described(more: Mapping[str, Any]) -> TensorRange:
    low, high, clipped = (float(more[key]) for key in ("low", "high", "clipped"))
    if not -np.inf < low <= 0 <= high < np.inf:
        raise ValueError("the range does not hold 0")
    arrays = {key: np.frombuffer(base64.b64decode(more[key]), "<f4") for key in _ARRAYS if key in more}
    return TensorRange(low, high, str(more["calibrator"]), clipped, **arrays)


def _more(known: TensorRange) -> str:
    stated: dict[str, Any] = {"low": known.low, "high": known.high, "calibrator": known.calibrator}
    stated["clipped"] = known.clipped
    for key in _ARRAYS:
        array: Array | None = getattr(known, key)
        if array is not None:
            stated[key] = base64.b64encode(array.astype("<f4").tobytes()).decode()
    return json.dumps(stated)


def _hexadecimal(scale: float) -> str:
    return struct.pack(">f", scale).hex()

"""A folder in Hugging Face's form: config.json and safetensors, mapped into memory and never copied as a whole."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import ImportFailure

Array = np.ndarray[Any, Any]
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_QUANTIZATION = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # old places, who wrote there
_LARGEST_HEADER = 100 << 20  # the format's own limit
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(eq=False)
class Checkpoint:
    """config.json and the tensors by name, as views of mapped files; `take` notes what has been used. quantization:
    what quantization_config says, empty for floats."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    quantization: Mapping[str, Any] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.tensors

    def take(self, name: str, *shape: int) -> Array:
        """A tensor that must be there, of this shape."""
        found = self.tensors.get(name)
        if found is None:
            raise ImportFailure(
                f"{self.folder}: there is no tensor {name!r} of shape {list(shape)}; config.json says that this is a "
                f"{self.config.get('model_type')} model: is it the right config for these weights?"
            )
        if shape and found.shape != shape:
            raise ImportFailure(
                f"{self.folder}: tensor {name!r} has shape {list(found.shape)}, config.json makes it {list(shape)}; "
                "config.json and the weights are of different models"
            )
        self.taken.add(name)
        return found

    def take_if(self, name: str, *shape: int) -> Array | None:
        """A tensor that may be missing."""
        return self.take(name, *shape) if self.has(name) else None

    def refuse_leftovers(self, ignored: Sequence[str] = ()) -> None:
        """ImportFailure when there are tensors that nobody took and whose names do not end in one of `ignored`."""
        left = sorted(name for name in self.tensors.keys() - self.taken if not name.endswith(tuple(ignored)))
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ImportFailure(
                f"{self.folder}: nothing in a {self.config.get('model_type')} model uses tensor {left[0]!r}{more}; "
                "the weights are of another model than config.json says"
            )

    def number(self, key: str, default: int | None = None) -> int:
        """A positive whole number of config.json."""
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ImportFailure(f"{self.folder / 'config.json'}: {key!r} must be a positive number, it is {value!r}")
        return value

    def count(self, key: str, default: int = 0) -> int:
        """A whole number of config.json that may be 0; absent or null means the default."""
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ImportFailure(f"{self.folder / 'config.json'}: {key!r} must be a whole number, it is {value!r}")
        return value

    def real(self, key: str, default: float, above: float = -math.inf) -> float:
        """A number of config.json, greater than `above`; absent or null means the default."""
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < math.inf:
            least = "" if above == -math.inf else f" greater than {above:g}"
            raise ImportFailure(f"{self.folder / 'config.json'}: {key!r} must be a number{least}, it is {value!r}")
        return float(value)

    def listed(self, key: str) -> list[Any] | None:
        """An array of config.json, None where it is absent or null."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, list):
            raise ImportFailure(f"{self.folder / 'config.json'}: {key!r} must be an array, it is {value!r}")
        return value

    def layers(self, key: str) -> int:
        """How many layers config.json says there are: no more than there are tensors."""
        found = self.number(key)
        if found > len(self.tensors):
            raise ImportFailure(f"{self.folder / 'config.json'}: {key!r} is {found}, and there are {len(self.tensors)} "
                                "tensors; config.json and the weights are of different models")  # fmt: skip
        return found

    def settings(self, name: str) -> Mapping[str, Any]:
        """A JSON file beside config.json; empty where there is none."""
        return _json(self.folder / name) if (self.folder / name).is_file() else {}

    def files(self) -> dict[str, bytes]:
        """Tokenizer, templates and defaults of generation, those that are there."""
        return {name: (self.folder / name).read_bytes() for name in FILES if (self.folder / name).is_file()}


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read config.json, map the weights."""
    folder = Path(folder)
    config = _json(folder / "config.json")
    inner = config.get("text_config") or {}
    if not isinstance(inner, dict):
        raise ImportFailure(f"{folder / 'config.json'}: 'text_config' is {inner!r}, not an object")
    tensors: dict[str, Array] = {}
    for path in _weight_files(folder):
        tensors.update(_tensors(path))
    return Checkpoint(folder, inner or config, tensors, _quantization(folder, config))


def _quantization(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """quantization_config of config.json, or of a file of its own."""
    inner = config.get("text_config") or {}
    found = config.get("quantization_config") or inner.get("quantization_config") or {}
    for name, method in _QUANTIZATION.items():
        if not found and (folder / name).is_file():
            found = {"quant_method": method, **_json(folder / name)}
    if not isinstance(found, dict):
        raise ImportFailure(f"{folder / 'config.json'}: quantization_config is {found!r}, not an object")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ImportFailure(f"cannot read {path}: {error.strerror}; a checkpoint is a folder with config.json, "
                            "model.safetensors and tokenizer.json") from None  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise ImportFailure(f"{path} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ImportFailure(f"{path} holds {type(found).__name__}, not an object")
    return found


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        places = _json(folder / _INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ImportFailure(f"{folder / _INDEX} has no weight_map; download it again")
        return [folder / name for name in sorted(set(map(str, places.values())))]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise ImportFailure(
        f"{folder} holds neither {_SINGLE} nor {_INDEX}; weights in other forms must be converted first "
        "(examples/llama2c converts llama2.c's)"
    )


def _tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """(name, view) of a safetensors file: a u64 length, JSON, data; every extent is checked."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    except OSError as error:
        raise ImportFailure(f"cannot read {path}: {error.strerror}") from None
    length = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else 0
    if not 2 <= length <= min(_LARGEST_HEADER, len(data) - 8):
        raise ImportFailure(f"{path} is no safetensors file, or it was cut short; download it again")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in entries:
            yield name, _view(path, name, entry, data[8 + length :])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImportFailure(f"{path}: its header makes no sense ({error}); download it again") from None


def _view(path: Path, name: str, entry: Mapping[str, Any], data: memoryview) -> Array:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ImportFailure(f"{path}: tensor {name!r} has the unknown type {entry['dtype']!r}")
    dtype, shape = numpy_dtype(DTYPES[entry["dtype"]]), tuple(map(int, entry["shape"]))
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise ImportFailure(f"{path}: tensor {name!r} of {list(shape)} does not fit its {end - begin} bytes")
    if end > len(data):
        raise ImportFailure(
            f"{path} was cut short: tensor {name!r} ends at byte {end} of {len(data)}; download it again"
        )
    return np.frombuffer(data[begin:end], dtype).reshape(shape)

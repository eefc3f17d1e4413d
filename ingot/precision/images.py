"""Pictures as a model wants them: a frozen description of the preprocessing, and the function it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import ConfigError, DeviceError
from ingot.plan.plan import TensorSpec

Array = np.ndarray[Any, Any]
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Preprocess:
    """(pixel * scale - mean) / deviation per channel, of the picture brought to the model's height and width.

    resize: "stretch" takes the whole picture out of proportion; "crop" scales the shorter side to the model's extent
    divided by `centre` and takes the middle; "none" wants pictures of the right extents. order: "RGB" or "BGR".
    """

    resize: str = "crop"
    centre: float = 1.0
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)
    order: str = "RGB"

    def __post_init__(self) -> None:
        for name, known in (("resize", ("stretch", "crop", "none")), ("order", ("RGB", "BGR"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"preprocessing: {name} is {getattr(self, name)!r}; use one of {', '.join(known)}")
        if not 0 < self.centre <= 1 or not all(self.deviation):
            raise ConfigError("preprocessing: centre lies in (0, 1] and no deviation is 0")


def preprocessing(given: Any, spec: TensorSpec) -> Callable[[Path], Array]:
    """The function from a file to the input's array. `given`: Preprocess, a mapping of its fields, or a JSON file of
    one; None only where the input takes bytes as they are."""
    steps = _described(given, spec)
    channels_last, extents, channels = _layout(spec)

    def picture(path: Path) -> Array:
        pixels = _pixels(path, steps, extents, _CHANNELS[channels])
        scaled: Array = pixels.astype(np.float32) * np.float32(steps.scale)
        values: Array = (scaled - np.asarray(steps.mean, np.float32)) / np.asarray(steps.deviation, np.float32)
        ordered = values if channels_last else values.transpose(2, 0, 1)
        return np.ascontiguousarray(ordered[None], numpy_dtype(spec.dtype))

    return picture


def _described(given: Any, spec: TensorSpec) -> Preprocess:
    if isinstance(given, Preprocess):
        return given
    if given is None and spec.dtype == "uint8":
        return Preprocess()
    if given is None:
        raise ConfigError(
            f"the images need a description of how input {spec.name!r} wants its pixels: --preprocess FILE.json, e.g. "
            '{"scale": 0.00392157, "mean": [0.485, 0.456, 0.406], "deviation": [0.229, 0.224, 0.225]}'
        )
    if isinstance(given, Mapping):
        return _of_fields(given, "preprocessing")
    try:
        content = json.loads(Path(given).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the preprocessing {str(given)!r} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"the preprocessing {str(given)!r} is no JSON object")
    return _of_fields(content, str(given))


def _of_fields(content: Mapping[str, Any], label: str) -> Preprocess:
    known = [field.name for field in fields(Preprocess)]
    unknown = [name for name in content if name not in known]
    if unknown:
        raise ConfigError(f"{label}: there is no {unknown[0]!r}; known are {', '.join(known)}")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
    return Preprocess(**values)


def _layout(spec: TensorSpec) -> tuple[bool, tuple[int, int], int]:
    """(channels last, (height, width), channels) of a picture input."""
    shape = spec.opt or spec.shape
    if len(shape) == 4:
        for last, (channels, height, width) in ((False, shape[1:]), (True, (shape[3], *shape[1:3]))):
            if channels in _CHANNELS and isinstance(height, int) and isinstance(width, int):
                return last, (height, width), int(channels)
    raise ConfigError(f"input {spec.name!r} of shape {list(spec.shape)} is no picture: [N, 1|3|4, H, W] or "
                      "[N, H, W, 1|3|4] with known H and W is; give arrays or a Python file")  # fmt: skip


def _pixels(path: Path, steps: Preprocess, extents: tuple[int, int], mode: str) -> Array:
    """[height, width, channels], bytes."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DeviceError("images are read with Pillow, which is not installed: pip install pillow") from None
    height, width = extents
    try:
        picture = Image.open(path).convert(mode)
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"{path} is not an image that can be read: {error}") from None
    if steps.resize == "none" and picture.size != (width, height):
        raise ConfigError(f"{path} has {picture.size[1]}x{picture.size[0]} pixels, the model takes {height}x{width}")
    if steps.resize == "crop":
        picture = picture.crop(_middle(picture.size, width / height, steps.centre))
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)).reshape(height, width, -1)
    return pixels[..., ::-1] if steps.order == "BGR" else pixels


def _middle(size: tuple[int, int], proportion: float, centre: float) -> tuple[int, int, int, int]:
    """The largest box of the proportion in the middle, made smaller by `centre`."""
    width, height = size
    side = min(width, height * proportion) * centre, min(height, width / proportion) * centre
    left, top = (width - side[0]) / 2, (height - side[1]) / 2
    return round(left), round(top), round(left + side[0]), round(top + side[1])

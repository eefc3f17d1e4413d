"""Samples to calibrate and to judge with: a stream of feeds from whatever holds them, each checked against the model.

Nothing is kept in memory but the sample at hand; an array in a file stays there, mapped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import ConfigError
from ingot.plan.plan import TensorSpec
from ingot.precision import images
from ingot.precision.user_code import module_of

Array = np.ndarray[Any, Any]
Sample = dict[str, Any]
Placed = tuple[str, Mapping[str, Any]]  # where a sample comes from, in words, and the sample


@dataclass(frozen=True)
class Samples:
    """Feeds one after the other; iterating again starts anew. Keys that are no inputs (labels) travel along."""

    inputs: tuple[TensorSpec, ...]
    stream: Callable[[], Iterator[Placed]]
    label: str

    def __iter__(self) -> Iterator[Sample]:
        """Each sample, checked; ConfigError names the place of the one that does not fit, or that there is none."""
        empty = True
        for place, sample in self.stream():
            yield checked(sample, self.inputs, place)
            empty = False
        if empty:
            raise ConfigError(f"{self.label} holds no samples: give at least one, a few hundred for calibration")

    def take(self, count: int) -> Samples:
        """The first `count`."""
        return replace(self, stream=lambda: itertools.islice(self.stream(), count))

    def halves(self) -> tuple[Samples, Samples]:
        """Every other one, so that what is sorted by class is spread over both."""
        even, odd = (lambda s=start: itertools.islice(self.stream(), s, None, 2) for start in (0, 1))
        return replace(self, stream=even), replace(self, stream=odd)

    def batched(self, count: int) -> Iterator[Sample]:
        """`count` samples in one along axis 0, where all inputs have a symbolic extent there; else one at a time."""
        return batches(self, self.inputs, count)


def batches(samples: Iterable[Mapping[str, Any]], inputs: Sequence[TensorSpec], count: int) -> Iterator[Sample]:
    """The inputs of `count` samples at a time, joined along axis 0; one by one where the model cannot take them so."""
    names = [spec.name for spec in inputs]
    feeds = ({name: np.asarray(sample[name]) for name in names} for sample in samples)
    if not _has_batch(inputs):
        yield from feeds
        return
    for _, alike in itertools.groupby(feeds, key=lambda feed: tuple(feed[name].shape[1:] for name in names)):
        while group := list(itertools.islice(alike, count)):
            yield {name: np.concatenate([feed[name] for feed in group]) for name in names}


def _has_batch(inputs: Sequence[TensorSpec]) -> bool:
    """Whether the first axis of every input is one and the same symbol."""
    first = {spec.shape[0] if spec.shape else None for spec in inputs}
    return len(first) == 1 and isinstance(next(iter(first)), str)


def samples(source: Any, inputs: Sequence[TensorSpec], preprocess: Any = None) -> Samples:
    """Samples from an iterable of feeds, a function that gives one, .npy, .npz, a Python file with
    `def samples()`, or a folder of arrays or of images (with `preprocess`, see `images.Preprocess`)."""
    specs = tuple(inputs)
    if isinstance(source, Samples):
        return replace(source, inputs=specs)
    if not isinstance(source, str | Path):
        return Samples(specs, _of_iterable(source), "the data given")
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"the data {str(path)!r} does not exist: give .npy, .npz, a folder of them or of images, "
                          "or a Python file with `def samples()`")  # fmt: skip
    if path.is_dir():
        return Samples(specs, _of_folder(path, specs, preprocess), str(path))
    return Samples(specs, _of_file(path, specs, preprocess), str(path))


def _of_iterable(source: Any) -> Callable[[], Iterator[Placed]]:
    """A generator can be gone through once only; it says so the second time."""
    if isinstance(source, np.ndarray | Mapping) or not (callable(source) or isinstance(source, Iterable)):
        raise ConfigError(f"samples cannot be a {type(source).__name__}: give an iterable of {{input name: array}}")
    spent = False

    def stream() -> Iterator[Placed]:
        nonlocal spent
        given = source() if callable(source) else source
        if spent and given is iter(given):
            raise ConfigError("the samples are a generator that has been used up: give the function that makes it")
        spent = given is iter(given) and not callable(source)
        return ((f"sample {index}", sample) for index, sample in enumerate(given))

    return stream


def _of_file(path: Path, specs: tuple[TensorSpec, ...], preprocess: Any) -> Callable[[], Iterator[Placed]]:
    if path.suffix == ".npy":
        return lambda: _rows({_only(specs, path).name: _array(path)}, specs, path)
    if path.suffix == ".npz":
        return lambda: _rows(_arrays(path), specs, path)
    if path.suffix == ".py":
        return _of_iterable(_function(path))
    if path.suffix.lower() in images.SUFFIXES:
        return lambda: _images([path], specs, preprocess)
    raise ConfigError(f"{path} is none of .npy, .npz, .py, an image: it holds no samples that Ingot can read")


def _of_folder(path: Path, specs: tuple[TensorSpec, ...], preprocess: Any) -> Callable[[], Iterator[Placed]]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    pictures = [file for file in files if file.suffix.lower() in images.SUFFIXES]
    arrays = [file for file in files if file.suffix in (".npy", ".npz")]
    if pictures and arrays:
        raise ConfigError(f"{path} holds images and arrays: put the samples into a folder of their own")
    if not pictures and not arrays:
        raise ConfigError(f"{path} holds neither .npy, .npz nor images: there are no samples in it")
    if pictures:
        return lambda: _images(pictures, specs, preprocess)
    return lambda: itertools.chain.from_iterable(_of_file(file, specs, None)() for file in arrays)


def _images(files: Sequence[Path], specs: tuple[TensorSpec, ...], preprocess: Any) -> Iterator[Placed]:
    spec = _only(specs, files[0])
    steps = images.preprocessing(preprocess, spec)
    return ((str(file), {spec.name: steps(file)}) for file in files)


def _only(specs: tuple[TensorSpec, ...], path: Path) -> TensorSpec:
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise ConfigError(f"{path} holds one array a sample and the model has inputs {names}: use .npz with these keys")
    return specs[0]


def _array(path: Path) -> Array:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a .npy array of numbers: {error}") from None


def _arrays(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not an archive of arrays of numbers: {error}") from None


def _function(path: Path) -> Callable[[], Iterable[Mapping[str, Any]]]:
    """`samples` of a Python file."""
    module = module_of(path, str(path))
    found = getattr(module, "samples", None)
    if not callable(found):
        raise ConfigError(f"{path} has no function `samples()` that yields {{input name: array}}")
    return lambda: _guarded(found, path)


def _guarded(function: Callable[[], Iterable[Mapping[str, Any]]], path: Path) -> Iterator[Mapping[str, Any]]:
    """What it yields; ConfigError says how far the user's code came."""
    count = 0
    try:
        for count, sample in enumerate(function(), 1):  # noqa: B007
            yield sample
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{path}: samples() failed after {count}: {type(error).__name__}: {error}") from error


def _rows(arrays: Mapping[str, Array], specs: Sequence[TensorSpec], path: Path) -> Iterator[Placed]:
    """Arrays with the samples along their first axis, or one sample as the model takes it."""
    missing = [spec.name for spec in specs if spec.name not in arrays]
    if missing:
        held = ", ".join(arrays) or "nothing"
        raise ConfigError(f"{path} has no array for input {missing[0]!r}; it holds {held}")
    counts = {spec.name: _count(arrays[spec.name], spec) for spec in specs}
    long = {name: count for name, count in counts.items() if count is not None}
    if len(set(long.values())) > 1:
        raise ConfigError(f"{path} has different numbers of samples: {long}")
    if not long:
        yield str(path), dict(arrays)
        return
    known = {spec.name: spec for spec in specs}
    for index in range(next(iter(long.values()))):
        yield f"{path}, sample {index}", {n: _row(a, index, known.get(n), long.get(n)) for n, a in arrays.items()}


def _count(array: Array, spec: TensorSpec) -> int | None:
    """How many samples an array holds; None where it is one input as it stands."""
    rank = len(spec.shape)
    if array.ndim == rank + 1:
        return len(array)
    if array.ndim == rank and rank and isinstance(spec.shape[0], str):
        return len(array)
    if array.ndim == rank and rank and len(array) != spec.shape[0] and not len(array) % int(spec.shape[0] or 1):
        return len(array) // int(spec.shape[0] or 1)
    return None


def _row(array: Array, index: int, spec: TensorSpec | None, count: int | None) -> Any:
    if spec is None:  # labels and the like: an entry of each where they are as many
        return array[index] if array.ndim and len(array) > index else array
    if count is None or array.ndim != len(spec.shape):
        return array if count is None else np.ascontiguousarray(array[index])
    size = len(array) // count
    return np.ascontiguousarray(array[index * size : (index + 1) * size])


# checks


def checked(sample: Mapping[str, Any], inputs: Sequence[TensorSpec], place: str) -> Sample:
    """The sample with its inputs as arrays; ConfigError says what of it does not fit the model."""
    if not isinstance(sample, Mapping):
        raise ConfigError(f"{place} is a {type(sample).__name__}, not a dictionary of {{input name: array}}")
    found = dict(sample)
    bound: dict[str, int] = {}
    for spec in inputs:
        if spec.name not in found:
            held = ", ".join(map(str, found)) or "nothing"
            raise ConfigError(f"{place} has no array for input {spec.name!r}; it holds {held}")
        found[spec.name] = np.asarray(found[spec.name])
        _check_type(found[spec.name], spec, place)
        _check_shape(found[spec.name], spec, place, bound)
        _check_values(found[spec.name], spec, place)
    return found


def _check_type(array: Array, spec: TensorSpec, place: str) -> None:
    if spec.dtype not in ("string", "object") and array.dtype != numpy_dtype(spec.dtype):
        raise ConfigError(f"{place}: input {spec.name!r} is {array.dtype}, the model takes {spec.dtype}: convert it "
                          f"with .astype({spec.dtype!r}) where that is what is meant")  # fmt: skip


def _check_shape(array: Array, spec: TensorSpec, place: str, bound: dict[str, int]) -> None:
    fits = array.ndim == len(spec.shape)
    for given, wanted in zip(array.shape, spec.shape, strict=False):
        if isinstance(wanted, int):
            fits = fits and given == wanted
        elif wanted.isidentifier():
            fits = fits and given == bound.setdefault(wanted, given)
    if not fits:
        raise ConfigError(f"{place}: input {spec.name!r} has shape {list(array.shape)}, "
                          f"the model takes {list(spec.shape)}")  # fmt: skip
    for given, wanted, low, high in zip(array.shape, spec.shape, spec.min or (), spec.max or (), strict=False):
        if not low <= given <= high:
            raise ConfigError(f"{place}: input {spec.name!r} has {wanted}={given}, the profile is for {low} to {high}: "
                              "widen --shapes, or give samples of such shapes")  # fmt: skip


def _check_values(array: Array, spec: TensorSpec, place: str) -> None:
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    bad = np.argwhere(~np.isfinite(array))
    raise ConfigError(f"{place}: input {spec.name!r} holds {len(bad)} NaN or infinities, the first at "
                      f"{bad[0].tolist()}: nothing can be learnt from them")  # fmt: skip

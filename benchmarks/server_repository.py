"""The models that the server's benchmarks serve: built once, laid out as model repositories."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

import ingot
from benchmarks.models import model_path
from benchmarks.timing import available_threads
from examples import minilm

KEPT = Path("build/models")
LONGEST, LARGEST = 128, 16
_TOKENS = ((1, 8), (8, 32), (LARGEST, LONGEST))
_IMAGES = ((1, 1, 28, 28), (4, 1, 28, 28), (LARGEST, 1, 28, 28))
PROFILES: Mapping[str, Mapping[str, tuple[tuple[int, ...], ...]]] = {
    "mnist": {},
    "mnist_free": {"x": _IMAGES},
    "minilm": dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), _TOKENS),
}
CONFIGS = {"minilm_single": ("minilm", "max_batch_size: 1\n")}  # repositories that differ by their configuration


@dataclass(frozen=True)
class Models:
    """Engines in `folder`, and a repository for each with one model, named `model`."""

    folder: Path
    threads: int

    def engine(self, name: str) -> Path:
        """The engine file, as the repository holds it."""
        return self.repository(name) / "model" / "1" / "model.engine"

    def onnx(self, name: str) -> Path:
        """The model the engine was built from."""
        return source(name).resolve()

    def repository(self, name: str) -> Path:
        """A model repository; built on first use."""
        root = self.folder / name
        if not root.exists():
            origin, config = CONFIGS.get(name, (name, ""))
            version = root / "model" / "1"
            version.mkdir(parents=True)
            if origin != name:
                shutil.copy(self.engine(origin), version / "model.engine")
                (root / "model" / "config.pbtxt").write_text(config)
            else:
                build(name, version / "model.engine")
        return root


def source(name: str) -> Path:
    """The ONNX file; MiniLM's batch and length are symbols."""
    if name != "minilm":
        return model_path("mnist", 1 if name == "mnist" else "N")
    path = KEPT / "minilm_free.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(minilm.minilm_model(), path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    return path


def build(name: str, path: Path) -> None:
    """The engine; tuning results are kept between runs."""
    bounds = PROFILES[name]
    profiles = [ingot.Profile(**bounds)] if bounds else []
    config = ingot.BuildConfig(level=1, profiles=profiles, timing_cache=Path("build/timing.cache"))
    ingot.build(source(name), config).save(path)


def made_models(folder: Path) -> Models:
    return Models(folder, available_threads())

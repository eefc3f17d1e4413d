"""What cpu_peers measures: a case is a model at a batch and a precision, with inputs as it meets them."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import ingot
from benchmarks.models import MODELS, example_inputs, model_path
from benchmarks.quantized import quantized_path
from benchmarks.runtimes import Arrays

# The largest difference from onnxruntime's outputs, as a share of the largest one, that counts as the same result.
# int8: both round to 8 bits at every layer, and where one rounds up and the other down the next ones carry it on.
TOLERANCES = {"fp32": 1e-3, "bf16": 6e-2, "int8": 0.25}


@dataclass(frozen=True)
class Case:
    """`path` and `inputs` are asked for when the case's turn comes. family: which mean its int8 row belongs to."""

    name: str
    precision: str
    family: str
    path: Callable[[], Path]
    inputs: Callable[[], Arrays]
    profiles: tuple[ingot.Profile, ...] = field(default=(), compare=False)
    batch: int = 1

    @property
    def network(self) -> str:
        """The name without the batch."""
        return self.name.split()[0]

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"

    @property
    def build_precision(self) -> str:
        """What the engine is allowed: bfloat16 where the peers compute in it."""
        return "bf16" if self.precision == "bf16" else "fp32"


def benchmark_case(name: str, precision: str, batch: int = 1) -> Case:
    path = (lambda: quantized_path(name, batch)) if precision == "int8" else (lambda: model_path(name, batch))
    family = "convolution" if MODELS[name].convolutional else "transformer"
    label = f"{name} b{batch}" if batch > 1 else name
    return Case(label, precision, family, path, lambda: example_inputs(name, batch), batch=batch)


def assets_folder() -> Path | None:
    """The shared real models, where INGOT_ASSETS says that they lie."""
    folder = os.environ.get("INGOT_ASSETS")
    return Path(folder) if folder else None


def asset_case(name: str, folder: Path) -> Case:
    from benchmarks.assets import ASSETS
    from benchmarks.assets_speed import inputs_of

    asset = ASSETS[name]
    profiles = (ingot.Profile(**asset.profile),) if asset.profile else ()
    return Case(name, "fp32", "small", lambda: folder / asset.path, lambda: inputs_of(name, folder), profiles)


BENCHMARKS: Mapping[str, tuple[tuple[int, tuple[str, ...]], ...]] = {
    "resnet50": ((1, ("fp32", "bf16", "int8")), (8, ("fp32", "bf16", "int8"))),
    "mobilenet_v2": ((1, ("fp32", "int8")),),
    "bert_base": ((1, ("fp32", "bf16", "int8")),),
    "minilm": ((1, ("fp32", "int8")),),
    "mnist": ((1, ("fp32",)),),
}
SHARED = ("silero_vad", "superres")


def cases() -> list[Case]:
    """All that can be had here."""
    found = [
        benchmark_case(name, precision, batch)
        for name, batches in BENCHMARKS.items()
        for batch, precisions in batches
        for precision in precisions
    ]
    folder = assets_folder()
    return found if folder is None else [*found, *(asset_case(name, folder) for name in SHARED)]


def absent() -> str:
    """What is not measured and why; empty when everything is."""
    if assets_folder() is not None:
        return ""
    return f"INGOT_ASSETS does not name the folder of shared models: {', '.join(SHARED)} are absent"


def difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """The largest difference over all outputs, as a share of the largest magnitude of that output."""
    return max(float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in theirs)

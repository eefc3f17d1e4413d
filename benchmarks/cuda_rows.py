"""The networks that are measured on a GPU: what is asked of them, their export, what float32 gives for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ingot.plan.plan import TensorSpec

CACHE = Path(__file__).parent.parent / "build" / "cuda_peers"
CALIBRATORS = {"int8": "percentile", "fp8": "minmax"}  # E4M3 has the range, only clipping hurts


@dataclass(frozen=True)
class Row:
    """A network at a batch size, how much faster than torch.compile it must be, and what it must take at most. `form`:
    its layers are in int8 or fp8, which torch has no peer for; `faster` than our own fp16 it must be then. `library`:
    people have it from a library (transformers); its module, compiled, is what we are held against then."""

    model: str
    batch: int
    ratio: float | None
    most: float | None = None  # milliseconds
    form: str = ""
    faster: float | None = None
    library: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} b{self.batch} {self.form}".strip()

    @property
    def wide(self) -> "Row":
        """The same in fp16."""
        return row_of(f"{self.model} b{self.batch}")


ROWS = (
    Row("resnet50", 1, 2.0, 0.30), Row("bert_base", 1, 2.0, 0.35, library=True), Row("resnet50", 128, 1.0, 128 / 38.0),
    Row("bert_base", 128, 1.0, 6.0), Row("vit_b16", 1, 1.3), Row("mobilenet_v2", 1, 1.3), Row("detector", 1, 1.3),
    Row("unet_block", 1, 1.3), Row("vit_b16", 64, 1.0), Row("mobilenet_v2", 128, 1.0),
    Row("resnet50", 128, None, 128 / 50.0, "int8"), Row("bert_base", 128, None, None, "int8"),
    Row("resnet50", 128, None, None, "fp8"), Row("bert_base", 128, None, None, "fp8", 1.4),
)  # fmt: skip


def row_of(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def folder(row: Row) -> Path:
    return CACHE / row.name.replace(" ", "_")


# in a child: the export, and what float32 gives for the first item


def export(row: Row) -> dict[str, Any]:
    """model.onnx, inputs.npz and expected.npy (of the first item) in the row's folder."""
    return quantise(row) if row.form else _export(row)


def quantise(row: Row) -> dict[str, Any]:
    """The fp16 row's files; in the model every layer that can be has QuantizeLinear and DequantizeLinear, with ranges
    from what the network for one item is given there."""
    import onnx_ir

    from ingot.importers import onnx
    from ingot.ir import shapes
    from ingot.precision import formats
    from ingot.precision.calibrate import calibrate
    from ingot.precision.quantize import Float8, Int8

    form = {"int8": Int8(activations="int8"), "fp8": Float8()}[row.form]
    where, one = folder(row), row_of(f"{row.model} b1")
    for needed in (one, row.wide):
        if not (folder(needed) / "model.onnx").exists():
            _export(needed)
    where.mkdir(parents=True, exist_ok=True)
    small, whole = (onnx.load(folder(r) / "model.onnx") for r in (one, row.wide))
    for model in (small, whole):
        shapes.infer(model)
    held = np.load(folder(row.wide) / "inputs.npz")
    samples = [{str(v.name): x[i : i + 1] for v, x in zip(small.graph.inputs, held.values(), strict=True)}
               for i in range(min(8, row.batch))]  # fmt: skip
    ranges = calibrate(small, samples, CALIBRATORS[row.form])
    narrow = dict.fromkeys(formats.quantizable(whole, ranges), form)
    for name in ("inputs.npz", "expected.npy"):
        (where / name).write_bytes((folder(row.wide) / name).read_bytes())
    onnx_ir.save(formats.apply(whole, narrow, ranges), where / "model.onnx")
    return {}


def _export(row: Row) -> dict[str, Any]:
    import torch

    from benchmarks import torch_models

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    module, inputs = torch_models.module(row.model), torch_models.inputs(row.model, row.batch)
    where = folder(row)
    where.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.onnx.export(module, tuple(inputs), str(where / "partial.onnx"), dynamo=True, external_data=False)
    with torch.inference_mode():
        wanted = module.to(device)(*(x[:1].to(device) for x in inputs))
    np.save(where / "expected.npy", wanted.float().cpu().numpy())
    np.savez(where / "inputs.npz", *(x.numpy() for x in inputs))
    (where / "partial.onnx").rename(where / "model.onnx")
    return {}


def feeds_of(row: Row, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """The row's inputs as an engine takes them."""
    held = np.load(folder(row) / "inputs.npz")
    return {spec.name: held[key].astype(spec.dtype) for spec, key in zip(specs, held.files, strict=True)}


def difference(row: Row, mine: np.ndarray) -> float:
    """Of the first item, relative to the largest magnitude."""
    wanted = np.load(folder(row) / "expected.npy")
    return float(np.abs(mine[:1].astype(np.float64) - wanted).max() / np.abs(wanted).max())


def ratio_to_noise(row: Row, mine: np.ndarray) -> float:
    """Decibels of float32's results for the first item over what is added to them here."""
    wanted = np.load(folder(row) / "expected.npy").astype(np.float64)
    noise = mine[:1].astype(np.float64) - wanted
    return float(10 * np.log10((wanted**2).sum() / max((noise**2).sum(), 1e-300)))

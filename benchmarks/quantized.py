"""8-bit models as onnxruntime makes them: QDQ, weights per channel, ranges from the model's example inputs.

    python -m benchmarks.quantized resnet50 --batch 1      prints the path of the file, made on the first call

Activations are uint8 and weights int8 (U8S8). onnxruntime advises it for VNNI, and here it was faster with it than with
both in int8.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.models import MODELS, Batch, example_inputs, model_path

CALIBRATION_RUNS = 8


class _Examples:
    """The calibration data, in onnxruntime's form."""

    def __init__(self, name: str, batch: int) -> None:
        self._inputs = (example_inputs(name, batch, seed) for seed in range(CALIBRATION_RUNS))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._inputs, None)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self._inputs


def quantize(name: str, batch: int, path: Path) -> None:
    """Write the model's 8-bit form to `path`; of transformers the matrix products alone are in 8 bits."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(model_path(name, batch)), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(path), _Examples(name, batch), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=None if MODELS[name].convolutional else ["MatMul", "Gemm"],
        )  # fmt: skip


def quantized_path(name: str, batch: Batch = 1) -> Path:
    """The 8-bit ONNX file of a benchmark model, made on the first call."""
    full = model_path(name, batch)
    path = full.with_name(f"{full.stem}_int8_{CALIBRATION_RUNS}.onnx")
    if not path.exists():
        partial = path.with_suffix(".partial")
        quantize(name, int(batch), partial)
        partial.rename(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    print(quantized_path(options.name, options.batch))


if __name__ == "__main__":
    main()

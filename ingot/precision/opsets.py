"""A model in a newer opset, for operators that its own has not; large weights stay where they are."""

from __future__ import annotations

import onnx_ir as ir
from onnx.version_converter import ConvertError, convert_version

from ingot.errors import ConfigError
from ingot.importers import names, normalize
from ingot.ir import shapes


def raised(model: ir.Model, opset: int) -> ir.Model:
    """The model itself where its opset is as new; else a converted copy with the names kept."""
    present = model.opset_imports.get("", 1)
    if present >= opset:
        return model
    proto, weights = normalize.skeleton(model)
    try:
        converted = ir.from_proto(convert_version(proto, opset))
    except (RuntimeError, ConvertError, ir.serde.SerdeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"this precision needs opset {opset}, the model has {present} and cannot be converted "
                          f"({reason}): export it with that opset") from None  # fmt: skip
    normalize.restore_weights(converted, weights)
    names.name_nodes(converted)
    shapes.infer(converted)
    return converted
